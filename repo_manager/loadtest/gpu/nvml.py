"""Power, energy, memory and utilisation of this machine's GPUs from NVIDIA's management library, by ctypes.

The fallback for what Triton's metrics lack (a server without DCGM), when the server runs on this machine. The
functions and units are those of nvml.h: energy in millijoules since the driver was loaded, power in milliwatts.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import socket
from typing import Any

__all__ = ["GpuReading", "Nvml", "is_local", "open_nvml"]

_SUCCESS = 0
_LIBRARY = "libnvidia-ml.so.1"


@dataclasses.dataclass(frozen=True)
class GpuReading:
    """All GPUs at one moment; `None` where one of them does not tell.

    Attributes:
        energy_j: joules since the driver was loaded, summed.
        power_w: watts, summed.
        memory_used_bytes: summed.
        utilization: mean share of time in which a kernel ran, 0 to 1.
    """

    energy_j: float | None
    power_w: float | None
    memory_used_bytes: float | None
    utilization: float | None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """The library, initialised, with a handle for each GPU.

    Args:
        library: the loaded library, or an object with the same functions.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        self._handles: list[ctypes.c_void_p] = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == _SUCCESS:
                self._handles.append(handle)

    @property
    def gpus(self) -> int:
        """How many GPUs it knows."""
        return len(self._handles)

    def read(self) -> GpuReading:
        """Return what the GPUs say now."""
        energy = [
            self._ask("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.c_ulonglong) for handle in self._handles
        ]
        power = [self._ask("nvmlDeviceGetPowerUsage", handle, ctypes.c_uint) for handle in self._handles]
        memory = [self._ask("nvmlDeviceGetMemoryInfo", handle, _Memory) for handle in self._handles]
        busy = [self._ask("nvmlDeviceGetUtilizationRates", handle, _Utilization) for handle in self._handles]
        shares = [None if one is None else one.gpu / 100 for one in busy]
        total = _sum(shares, 1.0)
        return GpuReading(
            energy_j=_sum([None if one is None else one.value for one in energy], 1e-3),
            power_w=_sum([None if one is None else one.value for one in power], 1e-3),
            memory_used_bytes=_sum([None if one is None else one.used for one in memory], 1.0),
            utilization=None if total is None else total / len(shares),
        )

    def _ask(self, function: str, handle: ctypes.c_void_p, kind: type[Any]) -> Any:
        """Return one answer; `None` when the GPU (an older one, a MIG slice) or the library does not have it."""
        answer = kind()
        call = getattr(self._library, function, None)
        if call is None or call(handle, ctypes.byref(answer)) != _SUCCESS:
            return None
        return answer

    def close(self) -> None:
        """Give the library back."""
        self._library.nvmlShutdown()


def _sum(values: list[Any], scale: float) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return float(sum(values)) * scale


def open_nvml() -> Nvml | str:
    """Return the library, or in words why there is none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return f"{_LIBRARY} is not on this machine (no NVIDIA driver)"
    code = library.nvmlInit_v2()
    if code != _SUCCESS:
        return f"{_LIBRARY} cannot be initialised (NVML error {code})"
    found = Nvml(library)
    return found if found.gpus else f"{_LIBRARY} knows no GPU"


def is_local(host: str) -> bool:
    """Say whether a host is this machine: an address that can be bound here."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in addresses:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False
