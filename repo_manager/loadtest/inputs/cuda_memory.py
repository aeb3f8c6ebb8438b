"""Memory of this machine's GPU a Triton server on the same machine maps, by CUDA's driver alone.

The driver's library comes with every NVIDIA driver, so no CUDA package is needed. It is separate from
`shared_memory.py` because it knows nothing of regions and requests.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from repo_manager.errors import InputError, UsageError
from repo_manager.server.transport import CudaHandle

__all__ = ["CudaMemory", "cuda_memory"]

_LIBRARY = "libcuda.so.1"
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY of cuda.h
_HINT = "It needs an NVIDIA GPU that this process and the server both use. Or leave --shared-memory out."


class _Driver:
    """Calls of CUDA's driver. The first failing one is an error.

    Raises:
        UsageError: there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as exc:
            raise UsageError(f"CUDA shared memory cannot be had here: no NVIDIA driver: {exc}", hint=_HINT) from exc
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            InputError: the GPU has no room.
            UsageError: the CUDA driver fails otherwise.
        """
        status = int(getattr(self._library, name)(*arguments))
        if not status:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        why = (text.value or b"").decode() or f"error {status}"
        if status == _OUT_OF_MEMORY:
            raise InputError(f"the GPU has no room for the inputs and outputs: {why}", hint="Use a smaller batch.")
        raise UsageError(f"CUDA shared memory cannot be had here: {name}: {why}", hint=_HINT)


class CudaMemory:
    """A piece of a GPU's memory.

    Args:
        driver: the opened driver. A context of the memory's GPU must be current.
        address: address in the GPU's memory.
        key: handle by which a server maps the memory.

    Attributes:
        key: handle by which a server maps it.
    """

    def __init__(self, driver: _Driver, address: int, key: CudaHandle) -> None:
        self._driver, self._address, self.key = driver, address, key

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes to the GPU. Returns when they are there."""
        if data:
            place = ctypes.c_uint64(self._address + offset)
            self._driver.call("cuMemcpyHtoD_v2", place, ctypes.c_char_p(data), ctypes.c_size_t(len(data)))


@contextlib.contextmanager
def cuda_memory(size_bytes: int, device: int = 0) -> Iterator[CudaMemory]:
    """Give memory of a GPU as long as the block lasts.

    Args:
        size_bytes: size of the memory in bytes.
        device: number of the GPU, as CUDA counts those left by CUDA_VISIBLE_DEVICES.

    Raises:
        UsageError: there is no GPU, or it cannot share memory.
        InputError: the GPU has no room for it.
    """
    driver = _Driver()
    number, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    handle = ctypes.create_string_buffer(_HANDLE_BYTES)
    driver.call("cuDeviceGet", ctypes.byref(number), device)
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    try:
        driver.call("cuCtxSetCurrent", context)
        driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        try:
            driver.call("cuIpcGetMemHandle", handle, address)
            yield CudaMemory(driver, address.value, CudaHandle(handle.raw, device))
        finally:
            driver.call("cuMemFree_v2", address)
    finally:
        driver.call("cuDevicePrimaryCtxRelease_v2", number)
