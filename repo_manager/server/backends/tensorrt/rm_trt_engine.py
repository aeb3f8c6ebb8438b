"""One engine on one GPU: kept buffers, one context per profile, one stream, one wait per answer.

No repo_manager here: it runs in Triton's stub. `tensorrt` from 8.6 on and `tensorrt_rtx` share the calls used.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rm_trt_cuda import Cuda, host_bytes  # type: ignore[import-not-found]  # beside this file, in the stub's sys.path
from rm_trt_shapes import TRITON_TYPES, Mismatch, Profile, Tensor, choose_profile  # type: ignore[import-not-found]

Array = np.ndarray[Any, Any]
_TAGS = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}


@dataclasses.dataclass
class _Buffer:
    """The same bytes on the device and in pinned memory."""

    device: int
    host: int
    size_bytes: int


def import_library(name: str) -> Any:
    """Import TensorRT.

    Raises:
        Mismatch: it is not installed where the server runs.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        package = name.replace("_", "-")
        raise Mismatch(f"{name} cannot be imported where the server runs: {exc}; pip install {package} there") from None


def check_plan(name: str, version: str, path: Path) -> None:
    """Check a plan's first bytes before the library sees it: each failed load costs GPU memory.

    Args:
        name: name of the library, `tensorrt` or `tensorrt_rtx`. The plan must be its own.
        version: version of the TensorRT library the server runs with, compared with the plan's.
        path: file with the plan. Only its first 36 bytes are read.

    Raises:
        Mismatch: the file is missing, no plan, another library's, or another version's.
    """
    try:
        with path.open("rb") as file:
            head = file.read(36)
    except OSError as exc:
        raise Mismatch(f"{path.name} cannot be read: {exc.strerror}") from None
    if head[:4] != _TAGS[name]:
        raise Mismatch(f"{path.name} is no plan of {name}: it starts with {head[:4]!r}, expected {_TAGS[name]!r}")
    built = ".".join(str(part) for part in head[24:28])
    ours = version.split("+")[0].split(".")
    if built.split(".")[0] != ours[0]:
        raise Mismatch(
            f"{path.name} was built with {name} {built}; the server has {version}: build it with this version"
        )


class Engine:
    """A loaded engine.

    Args:
        library: module `tensorrt` or `tensorrt_rtx`, of the major version behind the engine.
        path: file with the engine, checked by `check_plan` and then read as a whole.
        cuda: the device it runs on.

    Raises:
        Mismatch: the library does not take it. With the library's reasons.
    """

    def __init__(self, library: Any, path: Path, cuda: Cuda) -> None:
        check_plan(library.__name__, library.__version__, path)
        self._library, self._cuda = library, cuda
        errors: list[str] = []
        self._logger = _logger(library, errors)
        self._runtime = library.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # version-compatible plans contain their own runtime
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise Mismatch(f"{path.name} does not load: {'; '.join(errors) or 'the library gave no reason'}")
        self.tensors = tuple(self._tensor(index) for index in range(self._engine.num_io_tensors))
        self.profiles = tuple(self._profile(index) for index in range(self._engine.num_optimization_profiles))
        self._inputs = {tensor.name: tensor for tensor in self.tensors if tensor.is_input}
        self._outputs = {tensor.name: tensor for tensor in self.tensors if not tensor.is_input}
        self._stream = cuda.stream()
        self._contexts: dict[int, Any] = {}
        self._buffers: dict[str, _Buffer] = {}

    def run(self, feed: Mapping[str, list[Array]]) -> dict[str, Array]:
        """Run one batch.

        Args:
            feed: input -> the arrays of the requests, joined along the first axis while they are copied.

        Returns:
            Output -> array in kept memory, valid until the next call.

        Raises:
            Mismatch: shapes the engine is not built for.
        """
        self._cuda.enter()
        shapes = {name: _joined_shape(arrays) for name, arrays in feed.items()}
        context = self._context(choose_profile(self.profiles, shapes).index)
        for name, arrays in feed.items():
            self._feed(context, self._inputs[name], arrays, shapes[name])
        results = {name: self._prepare(context, tensor) for name, tensor in self._outputs.items()}
        if not context.execute_async_v3(self._stream):
            raise Mismatch("the engine did not run")
        for name, (_, size_bytes) in results.items():
            buffer = self._buffers[name]
            self._cuda.to_host(buffer.host, buffer.device, size_bytes, self._stream)
        self._cuda.synchronize(self._stream)
        return {name: self._view(name, shape, size) for name, (shape, size) in results.items()}

    def close(self) -> None:
        """Free the buffers. The engine cannot be used afterwards."""
        self._contexts.clear()
        for buffer in self._buffers.values():
            self._cuda.free(buffer.device, buffer.host)
        self._buffers.clear()

    def _feed(self, context: Any, tensor: Tensor, arrays: list[Array], shape: tuple[int, ...]) -> None:
        size_bytes = math.prod(shape) * np.dtype(tensor.numpy_type).itemsize
        buffer = self._reserve(tensor.name, size_bytes)
        target = host_bytes(buffer.host, size_bytes)[:size_bytes].view(tensor.numpy_type).reshape(shape)
        if len(arrays) == 1:
            np.copyto(target, arrays[0])
        else:
            np.concatenate(arrays, out=target)
        self._cuda.to_device(buffer.device, buffer.host, size_bytes, self._stream)
        if not context.set_input_shape(tensor.name, shape):
            raise Mismatch(f"INVALID_ARGUMENT: input '{tensor.name}' cannot have the shape {list(shape)}")
        context.set_tensor_address(tensor.name, buffer.device)

    def _prepare(self, context: Any, tensor: Tensor) -> tuple[tuple[int, ...], int]:
        shape = tuple(context.get_tensor_shape(tensor.name))
        if any(size < 0 for size in shape):
            raise Mismatch(
                f"output '{tensor.name}' has a shape that depends on the data, which this backend cannot serve"
            )
        size_bytes = math.prod(shape) * np.dtype(tensor.numpy_type).itemsize
        context.set_tensor_address(tensor.name, self._reserve(tensor.name, size_bytes).device)
        return shape, size_bytes

    def _view(self, name: str, shape: tuple[int, ...], size_bytes: int) -> Array:
        data = host_bytes(self._buffers[name].host, size_bytes)[:size_bytes]
        return np.asarray(data.view(self._outputs[name].numpy_type).reshape(shape))

    def _reserve(self, name: str, size_bytes: int) -> _Buffer:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size_bytes < size_bytes:
            if buffer is not None:
                self._cuda.free(buffer.device, buffer.host)
            device, host = self._cuda.allocate(size_bytes)
            buffer = self._buffers[name] = _Buffer(device, host, size_bytes)
        return buffer

    def _context(self, profile: int) -> Any:
        context = self._contexts.get(profile)
        if context is None:
            context = self._engine.create_execution_context()
            if context is None:
                raise Mismatch("the GPU has no memory left for an execution context")
            context.set_optimization_profile_async(profile, self._stream)
            self._contexts[profile] = context
        return context

    def _tensor(self, index: int) -> Tensor:
        name = self._engine.get_tensor_name(index)
        type_name = self._engine.get_tensor_dtype(name).name
        if type_name not in TRITON_TYPES:
            raise Mismatch(f"tensor '{name}' has type {type_name}, which this backend does not carry")
        is_input = self._engine.get_tensor_mode(name) == self._library.TensorIOMode.INPUT
        return Tensor(name, is_input, *TRITON_TYPES[type_name], tuple(self._engine.get_tensor_shape(name)))

    def _profile(self, index: int) -> Profile:
        names = [tensor.name for tensor in self.tensors if tensor.is_input]
        shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in names}
        return Profile(index, {name: tuple(tuple(shape) for shape in triple) for name, triple in shapes.items()})


def _joined_shape(arrays: list[Array]) -> tuple[int, ...]:
    first = arrays[0].shape
    return first if len(arrays) == 1 else (sum(array.shape[0] for array in arrays), *first[1:])


def _logger(library: Any, errors: list[str]) -> Any:
    def __init__(self: Any) -> None:  # noqa: N807 - a method of the class made below
        library.ILogger.__init__(self)

    def log(_: Any, severity: Any, message: str) -> None:
        if "ERROR" in severity.name:
            errors.append(message)

    return type("Logger", (library.ILogger,), {"__init__": __init__, "log": log})()
