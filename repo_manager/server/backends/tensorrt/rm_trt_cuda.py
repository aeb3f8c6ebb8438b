"""The few CUDA runtime calls a backend needs, by ctypes (no repo_manager here: it runs in Triton's stub)."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2
_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE = 75, 76


class CudaError(Exception):
    """CUDA refused, or there is no GPU."""


class Cuda:
    """One device's runtime.

    Raises:
        CudaError: no CUDA runtime library, no driver, or no such device.
    """

    def __init__(self, device: int = 0) -> None:
        self._lib = _load()
        count = ctypes.c_int(0)
        self._check(self._lib.cudaGetDeviceCount(ctypes.byref(count)), "find a GPU")
        if device >= count.value:
            raise CudaError(f"there is no GPU {device}; this machine has {count.value}")
        self._device = device
        self.enter()

    def enter(self) -> None:
        """Make the device this thread's."""
        self._check(self._lib.cudaSetDevice(self._device), f"use GPU {self._device}")

    def compute_capability(self) -> str:
        """Return the device's compute capability, for instance `8.0`."""
        values = []
        for attribute in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE):
            value = ctypes.c_int(0)
            call = self._lib.cudaDeviceGetAttribute(ctypes.byref(value), attribute, self._device)
            self._check(call, "ask for the compute capability")
            values.append(str(value.value))
        return ".".join(values)

    def stream(self) -> int:
        """Make a stream. Returns its handle."""
        handle = ctypes.c_void_p()
        self._check(self._lib.cudaStreamCreateWithFlags(ctypes.byref(handle), 1), "make a stream")
        return int(handle.value or 0)

    def synchronize(self, stream: int) -> None:
        """Wait for everything in a stream."""
        self._check(self._lib.cudaStreamSynchronize(ctypes.c_void_p(stream)), "run the engine")

    def to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        """Copy from pinned memory, without waiting.

        Args:
            device: address in the GPU's memory.
            host: source: address in pinned memory, from `allocate`. Leave it unchanged until `synchronize`.
            size_bytes: size of the memory in bytes.
            stream: handle of the CUDA stream.
        """
        self._copy(device, host, size_bytes, _TO_DEVICE, stream)

    def to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        """Copy to pinned memory, without waiting.

        Args:
            host: target: address in pinned memory, from `allocate`. Complete only after `synchronize`.
            device: address in the GPU's memory.
            size_bytes: size of the memory in bytes.
            stream: handle of the CUDA stream.
        """
        self._copy(host, device, size_bytes, _TO_HOST, stream)

    def _copy(self, target: int, source: int, size_bytes: int, kind: int, stream: int) -> None:
        arguments = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes), kind)
        self._check(self._lib.cudaMemcpyAsync(*arguments, ctypes.c_void_p(stream)), "copy")

    def allocate(self, size_bytes: int) -> tuple[int, int]:
        """Allocate the same size on the device and in pinned host memory.

        Returns:
            (device address, host address).
        """
        device, host = ctypes.c_void_p(), ctypes.c_void_p()
        size = ctypes.c_size_t(max(size_bytes, 1))
        self._check(self._lib.cudaMalloc(ctypes.byref(device), size), f"allocate {size_bytes} bytes on the GPU")
        call = self._lib.cudaHostAlloc(ctypes.byref(host), size, 0)
        if call != 0:
            self._lib.cudaFree(device)
        self._check(call, f"allocate {size_bytes} bytes of pinned memory")
        return int(device.value or 0), int(host.value or 0)

    def free(self, device: int, host: int) -> None:
        """Free the memory from `allocate`."""
        self._lib.cudaFree(ctypes.c_void_p(device))
        self._lib.cudaFreeHost(ctypes.c_void_p(host))

    def _check(self, code: int, what: str) -> None:
        if code != 0:
            text = self._lib.cudaGetErrorString(code).decode()
            raise CudaError(f"cannot {what}: {text} (CUDA error {code})")


def host_bytes(address: int, size_bytes: int) -> np.ndarray[Any, Any]:
    """Return pinned memory as bytes writable by NumPy. It must not outlive the allocation."""
    memory = (ctypes.c_uint8 * max(size_bytes, 1)).from_address(address)
    return np.asarray(np.ctypeslib.as_array(memory))


def _load() -> Any:
    for name in _candidates():
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.cudaGetErrorString.restype = ctypes.c_char_p
        return lib
    raise CudaError("no CUDA runtime library (libcudart) was found; install nvidia-cuda-runtime-cu12 beside TensorRT")


def _candidates() -> Iterator[str]:
    """Libraries to try: the system's, then those of NVIDIA's wheels."""
    yield from _NAMES
    found = ctypes.util.find_library("cudart")
    if found:
        yield found
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for name in _NAMES:
            yield from map(str, sorted(Path(root).glob(f"*/lib/{name}")))
