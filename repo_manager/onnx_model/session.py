"""A thin ONNX Runtime session on the CPU whose errors are ours."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.validate import one_line
from repo_manager.optional import deferred, require
from repo_manager.sockets import Deputies

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["Session"]

_FATAL = 4  # ORT_LOGGING_LEVEL_FATAL: what matters comes back as an exception
_LARGE_BYTES = 64 << 20
_FOREVER_S = 1e8
_DEPUTIES = Deputies()


@functools.cache
def _runtime() -> Any:
    """Import ONNX Runtime, once a model is to run."""
    runtime = require("onnxruntime")
    runtime.set_default_logger_severity(_FATAL)
    return runtime


@functools.cache
def _runtime_errors() -> tuple[type[BaseException], ...]:
    """Return what ONNX Runtime raises: its own exceptions, which have no common base, and Python's."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, RuntimeError, ValueError, TypeError, IndexError, MemoryError)


class Session:
    """Runs a model by ONNX Runtime on the CPU.

    Args:
        model: a loaded model or a path (external data works), or a model in memory (below 2 GB).
        optimize: let ONNX Runtime rewrite the graph; `False` runs it as written. From 64 MiB on, what keeps
            copies of the weights is left out, the layout optimisations and packed matrices: 1.2 instead of 3.0
            times the model.
        threads: threads within one operator; `None` leaves it to ONNX Runtime.
        exact_int8: as the embedded onnxruntime backend serves: on an x86 CPU without VNNI, use INT8 kernels whose
            16-bit sums cannot saturate, where the model loads with them (onnxruntime#6004, onnxruntime#14642). No
            effect on other CPUs, or without `optimize`: an unfused graph computes INT8 exactly.

    Raises:
        ModelError: ONNX Runtime does not take the model.
    """

    def __init__(
        self,
        model: Model | Path | str | onnx.ModelProto,
        *,
        optimize: bool = True,
        threads: int | None = None,
        exact_int8: bool = False,
    ) -> None:
        onnxruntime = _runtime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        level = onnxruntime.GraphOptimizationLevel
        is_large = _size_bytes(model) >= _LARGE_BYTES
        if is_large:  # packed copies of matrices are another time the model; the arena grows by doubling
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        wanted = level.ORT_ENABLE_EXTENDED if is_large else level.ORT_ENABLE_ALL
        options.graph_optimization_level = wanted if optimize else level.ORT_DISABLE_ALL
        self.optimisations = {
            level.ORT_ENABLE_ALL: "all optimisations",
            level.ORT_ENABLE_EXTENDED: "all optimisations but those of the memory layout",
            level.ORT_DISABLE_ALL: "no optimisations",
        }[options.graph_optimization_level]
        if threads is not None:
            options.intra_op_num_threads = threads
        self.where = "the model in memory" if isinstance(model, onnx.ModelProto) else str(getattr(model, "path", model))
        try:
            source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else self.where
            self._session = _open(source, options, exact_int8=exact_int8)
        except _runtime_errors() as exc:
            raise ModelError(
                f"{self.where}: ONNX Runtime {onnxruntime.__version__} does not take it: {one_line(exc)}"
            ) from exc
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            inputs: one array per input name, of the type and shape that the model states.

        Returns:
            One array per output name.

        Raises:
            ModelError: wrong names, types or shapes, or an operator failed.
        """
        try:
            values = self._run(dict(inputs))
        except _runtime_errors() as exc:
            raise ModelError(f"{self.where}: running it failed: {one_line(exc)}") from exc
        for name, value in zip(self.output_names, values, strict=True):
            if not isinstance(value, np.ndarray):
                raise ModelError(f"{self.where}: output '{name}' is not a tensor but {type(value).__name__}")
        return dict(zip(self.output_names, values, strict=True))

    def as_taken(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return inputs as this model takes them: float32 becomes float16 where its inputs are float16."""
        low = {value.name for value in self._session.get_inputs() if value.type == "tensor(float16)"}
        return {
            name: array.astype(np.float16) if name in low and array.dtype == np.float32 else array
            for name, array in inputs.items()
        }

    def _run(self, inputs: dict[str, NDArray[Any]]) -> list[Any]:
        """Run in another thread: only so Ctrl-C and SIGTERM, which Python handles in the main one, end it."""
        if threading.current_thread() is not threading.main_thread():
            return list(self._session.run(list(self.output_names), inputs))
        options = _runtime().RunOptions()
        options.log_severity_level = _FATAL
        try:
            return list(_DEPUTIES.call(lambda: self._session.run(list(self.output_names), inputs, options), _FOREVER_S))
        except BaseException:
            options.terminate = True  # interrupted: the run ends at its next operator
            raise


def _open(source: bytes | str, options: Any, *, exact_int8: bool) -> Any:
    open_session, providers = _runtime().InferenceSession, ["CPUExecutionProvider"]
    if exact_int8:
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            return open_session(source, options, providers=providers)
        except _runtime_errors():  # a few models load without it only; otherwise the second try gives the reason
            options.add_session_config_entry("session.x64quantprecision", "0")
    return open_session(source, options, providers=providers)


def _size_bytes(model: Model | Path | str | onnx.ModelProto) -> int:
    """Return a model's size; 0 when it cannot be told, which the load then explains."""
    if isinstance(model, onnx.ModelProto):
        return int(model.ByteSize())
    if isinstance(model, Path | str):
        folder = Path(model).parent
        names = [Path(model).name, *(f"{Path(model).name}{ending}" for ending in (".data", "_data"))]
        return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    return model.size_bytes
