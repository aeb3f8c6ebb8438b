"""A thin ONNX Runtime session on the CPU, in the process of foreign models. Its errors are ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.runtime import RuntimeProcess, RuntimeRefusedError, SessionSource, runtime_process
from repo_manager.onnx_model.validate import one_line
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["Session"]

_LARGE_BYTES = 64 << 20


class Session:
    """Runs a model by ONNX Runtime on the CPU.

    Args:
        model: a loaded model or a path (external data works), or a model in memory (below 2 GB).
        optimize: let ONNX Runtime rewrite the graph. `False` runs it as written. From 64 MiB on, what keeps copies of
            the weights is left out, the layout optimisations and packed matrices: 1.2 instead of 3.0 times the model.
        threads: threads within one operator. `None` leaves it to ONNX Runtime.
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
        is_large = _size_bytes(model) >= _LARGE_BYTES
        # Prepacking copies all matrices, so it doubles the memory. The arena doubles each time it grows.
        entries = {"session.disable_prepacking": "1"} if is_large else {}
        wanted = "ORT_ENABLE_EXTENDED" if is_large else "ORT_ENABLE_ALL"
        level = wanted if optimize else "ORT_DISABLE_ALL"
        self.optimisations = {
            "ORT_ENABLE_ALL": "all optimisations",
            "ORT_ENABLE_EXTENDED": "all optimisations but those of the memory layout",
            "ORT_DISABLE_ALL": "no optimisations",
        }[level]
        self.where = "the model in memory" if isinstance(model, onnx.ModelProto) else str(getattr(model, "path", model))
        # A few models load only without the exact kernels. If every try fails, the last one gives the reason.
        tried = ({"session.x64quantprecision": "1"}, {}) if exact_int8 else ({},)
        self._source = SessionSource(
            model.SerializeToString() if isinstance(model, onnx.ModelProto) else self.where,
            level,
            tuple({**entries, **more} for more in tried),
            arena=not is_large,
            threads=threads,
        )
        described = self._open()
        self.input_names = tuple(str(value["name"]) for value in described["inputs"])
        self.output_names = tuple(str(value["name"]) for value in described["outputs"])
        self._low = {value["name"] for value in described["inputs"] if value["type"] == "tensor(float16)"}

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._process.close(self._number)

    def _open(self) -> dict[str, list[dict[str, Any]]]:
        """Load the model in the process running now."""
        self._process: RuntimeProcess = runtime_process()
        try:
            self._number, described = self._process.open(self._source, self.where)
        except RuntimeRefusedError as exc:
            raise ModelError(
                f"{self.where}: ONNX Runtime {self._process.version} does not take it: {one_line(exc)}"
            ) from exc
        return described

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            inputs: one array per input name, of the type and shape the model states.

        Returns:
            One array per output name.

        Raises:
            ModelError: wrong names, types or shapes, or an operator failed.
        """
        if not self._process.is_alive:  # an earlier run, perhaps of another model, ended it
            self._open()
        try:
            values = self._process.run(self._number, inputs, self.where)
        except RuntimeRefusedError as exc:
            raise ModelError(f"{self.where}: running it failed: {one_line(exc)}") from exc
        results: dict[str, NDArray[Any]] = {}
        for name, value in zip(self.output_names, values, strict=True):
            if not isinstance(value, np.ndarray):
                raise ModelError(f"{self.where}: output '{name}' is not a tensor but {value}")
            results[name] = value
        return results

    def as_taken(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return inputs as this model takes them: float32 becomes float16 where its inputs are float16."""
        return {
            name: array.astype(np.float16) if name in self._low and array.dtype == np.float32 else array
            for name, array in inputs.items()
        }


def _size_bytes(model: Model | Path | str | onnx.ModelProto) -> int:
    """Return a model's size. 0 when unknown: the load then explains it."""
    if isinstance(model, onnx.ModelProto):
        return int(model.ByteSize())
    if isinstance(model, Path | str):
        folder = Path(model).parent
        names = [Path(model).name, *(f"{Path(model).name}{ending}" for ending in (".data", "_data"))]
        return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    return model.size_bytes
