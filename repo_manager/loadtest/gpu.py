"""GPU utilisation, memory, power and energy over the measured time: Triton's metrics, else NVML."""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import re
import socket
from collections.abc import Mapping
from typing import Any

from repo_manager.errors import RepoManagerError
from repo_manager.loadtest.result import GpuUse
from repo_manager.server.http_wire import fetch_text

__all__ = ["GpuReading", "MetricsSource", "Nvml", "is_local", "open_nvml", "parse_metrics"]


# Power, energy, memory and utilisation of this machine's GPUs from NVIDIA's management library (NVML), by ctypes.
#
# If the server runs on this machine, NVML provides the values missing from Triton's metrics (a server without DCGM).
# Functions and units come from nvml.h: energy in millijoules since the driver was loaded, power in milliwatts.

_SUCCESS = 0
_LIBRARY = "libnvidia-ml.so.1"


@dataclasses.dataclass(frozen=True)
class GpuReading:
    """All GPUs at one moment. `None` where one of them does not tell.

    Attributes:
        energy_j: joules since the driver was loaded, summed.
        power_w: watts, summed over the GPUs.
        memory_used_bytes: memory in use, summed over the GPUs.
        utilization: mean share of time with a kernel running, 0 to 1.
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
        """Return the GPUs' present readings."""
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
        """Return one answer, or `None` when the GPU (an older one, a MIG slice) or the library does not have it."""
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
    """Return whether a host is this machine: an address this machine can bind."""
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


# GPU utilisation, memory, power and energy over the measured time, from Triton's metrics or else from NVML.

_LINE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?[ \t]+(\S+)", re.MULTILINE)
_WANTED = {
    "utilization": "nv_gpu_utilization",
    "memory_used_bytes": "nv_gpu_memory_used_bytes",
    "power_w": "nv_gpu_power_usage",
    "energy_j": "nv_energy_consumption",
}
_TITLES = {
    "utilization": "GPU utilisation",
    "memory_used_bytes": "GPU memory",
    "power_w": "GPU power",
    "energy_j": "energy",
}
_TIMEOUT_S = 2.0


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Return metric name -> values over all its label sets, for the GPU metrics present."""
    found: dict[str, list[float]] = {}
    for match in _LINE.finditer(text):
        if match.group(1) in _WANTED.values():
            try:
                found.setdefault(match.group(1), []).append(float(match.group(3)))
            except ValueError:
                continue
    return found


class MetricsSource:
    """Samples one server's metrics, and NVML for the missing ones. Absence is no error: it is reported as missing.

    Args:
        url: Triton's metrics. `None` when it is not known where they are.
        nvml: the GPUs of this machine, or in words why they cannot be asked.
    """

    def __init__(self, url: str | None, nvml: Nvml | str = "the server is not known to be on this machine") -> None:
        self._url = url
        self._nvml = nvml
        self._samples: list[dict[str, list[float]]] = []
        self._readings: list[GpuReading] = []
        self._inferences: list[int] = []
        self._problem = (
            None if url is not None else "no metrics: behind a gateway their URL is not known (--metrics-url)"
        )
        # False after a page without GPUs. The page is then not requested again, because each request costs server time.
        self._has_gpus = True

    @property
    def tells(self) -> bool:
        """Whether there is anything to sample."""
        return isinstance(self._nvml, Nvml) or self._scrapes

    @property
    def _scrapes(self) -> bool:
        return self._has_gpus and self._problem is None

    def sample(self, inferences: int) -> None:
        """Take one sample. `inferences` is the server's count at the same moment."""
        self._inferences.append(inferences)
        self._samples.append(self._scraped() if self._scrapes else {})
        if isinstance(self._nvml, Nvml):
            self._readings.append(self._nvml.read())

    def _scraped(self) -> dict[str, list[float]]:
        if self._url is None:
            return {}
        try:
            found = parse_metrics(fetch_text(self._url, timeout_s=_TIMEOUT_S))
        except RepoManagerError as exc:
            self._problem = f"no metrics at {self._url}: {exc.message}"
            return {}
        self._has_gpus = bool(found)
        return found

    def reset(self) -> None:
        """Forget the samples: a new level begins."""
        self._samples, self._inferences, self._readings = [], [], []

    def use(self, first: int = 0) -> GpuUse:
        """Summarise the samples from number `first` on."""
        samples, readings = self._samples[first:], self._readings[first:]
        if not samples:
            return GpuUse(missing=("no metrics were sampled",))
        found = _of_metrics(samples)
        lacking = [name for name, value in found.items() if value is None]
        taken = {name: value for name, value in _of_readings(readings).items() if name in lacking and value is not None}
        found.update(taken)
        missing = [] if self._problem is None else [self._problem]
        absent = [name for name in lacking if name not in taken]
        if absent:
            names = ", ".join(f"{_TITLES[name]} ({_WANTED[name]})" for name in absent)
            why = self._nvml if isinstance(self._nvml, str) else "NVML does not tell it for every GPU"
            missing.append(f"{names}: not in the server's metrics (no GPU, a MIG slice, no DCGM), and {why}")
        inferences = self._inferences[-1] - self._inferences[first]
        energy_j = found["energy_j"]
        return GpuUse(
            **found,
            energy_per_inference_j=energy_j / inferences if energy_j is not None and inferences > 0 else None,
            missing=tuple(missing),
            source=self._source(taken),
        )

    def _source(self, taken: Mapping[str, float]) -> str:
        """Name the numbers from NVML, and their GPUs."""
        if not taken or not isinstance(self._nvml, Nvml):
            return ""
        titles = ", ".join(_TITLES[name] for name in taken)
        return f"{titles}: from NVML, over all {self._nvml.gpus} GPUs of this machine, including other work on them"


def _of_metrics(samples: list[dict[str, list[float]]]) -> dict[str, float | None]:
    """Return each number as Triton's metrics give it, or `None` where they do not."""
    energy_j: float | None = None
    name = _WANTED["energy_j"]
    if len(samples) > 1 and name in samples[0] and name in samples[-1]:
        energy_j = sum(samples[-1][name]) - sum(samples[0][name])
    memory, power = _WANTED["memory_used_bytes"], _WANTED["power_w"]
    return {
        "utilization": _mean([value for sample in samples for value in sample.get(_WANTED["utilization"], [])]),
        "memory_used_bytes": max((sum(sample[memory]) for sample in samples if memory in sample), default=None),
        "power_w": _mean([sum(sample[power]) for sample in samples if power in sample]),
        "energy_j": energy_j,
    }


def _of_readings(readings: list[GpuReading]) -> dict[str, float | None]:
    """Return each number as NVML gives it, or `None` where it does not."""
    if not readings:
        return {}
    first, last = readings[0].energy_j, readings[-1].energy_j
    memory = [reading.memory_used_bytes for reading in readings if reading.memory_used_bytes is not None]
    return {
        "utilization": _mean([reading.utilization for reading in readings if reading.utilization is not None]),
        "memory_used_bytes": max(memory, default=None),
        "power_w": _mean([reading.power_w for reading in readings if reading.power_w is not None]),
        "energy_j": None if first is None or last is None or len(readings) < 2 else last - first,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
