"""A real inference on a served version, its answer compared with ONNX Runtime's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from repo_manager.errors import ModelError, RepositoryError, ServerError
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.repository import Location, read_manifest, version_files
from repo_manager.repository.golden import GOLDEN_FILE_NAME, Golden, read_golden
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.server import TritonClient
from repo_manager.triton_config import ModelConfig
from repo_manager.triton_messages import model_config_pb2

__all__ = ["OutputComparison", "SmokeFailedError", "SmokeResult", "smoke_test"]

Array = np.ndarray[Any, Any]
# For a version that came without a recorded tolerance: served and reference are the same file on the same engine.
DEFAULT_TOLERANCE = 1e-2

_DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR
_DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    **{f"TYPE_INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"TYPE_UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


class SmokeFailedError(ServerError):
    """The version is READY and does not answer as it has to."""


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output against its reference.

    Attributes:
        output: its name.
        error: largest `|served - reference|`, divided by the largest `|reference|`; for other than floats
            the share of elements that differ.
        tolerance: the largest error allowed.
    """

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class SmokeResult:
    """What a smoke inference showed.

    Attributes:
        version: the version asked.
        reference: `golden` (recorded with the version), `onnxruntime` (run now on the version's ONNX file), or
            `none` (an answer came and has the shapes and types that the configuration promises).
        outputs: one comparison per output that has a reference.
        latency_ns: of the one inference, the client's work included.
    """

    version: int
    reference: str
    outputs: tuple[OutputComparison, ...]
    latency_ns: int


def smoke_test(
    client: TritonClient, folder: Location, name: str, version: int, config: ModelConfig, *, timeout_s: float = 60.0
) -> SmokeResult:
    """Send one inference to a version and compare its answer.

    Args:
        client: of the server.
        folder: the version's folder in the repository.
        name: the model.
        version: the version.
        config: what the server runs it with.
        timeout_s: deadline of the inference.

    Raises:
        SmokeFailedError: an output is wrong; with the numbers.
        ServerRefusedError: the inference failed on the server; with its reason.
        ServerUnreachableError: no answer.
    """
    golden, reference, tolerance = _reference(folder, config)
    batched = config.max_batch_size > 0
    message = config.message()
    dims = {entry.name: _dims(entry, batched) for entry in (*message.input, *message.output)}
    inputs = {key: _as_served(array, dims.get(key), batched) for key, array in golden.inputs.items() if key in dims}
    began_ns = time.perf_counter_ns()
    answer = client.infer(name, version, inputs, timeout_s=timeout_s)
    latency_ns = time.perf_counter_ns() - began_ns
    missing = {entry.name for entry in message.output} - answer.keys()
    if missing:
        raise SmokeFailedError(f"{name}:{version} answered without its outputs {', '.join(sorted(missing))}")
    comparisons = tuple(
        _compare(key, answer[key], expected, tolerance) for key, expected in golden.outputs.items() if key in answer
    )
    failed = [each for each in comparisons if not each.passed]
    if failed:
        details = "; ".join(f"{e.output} is off by {e.error:.3g}, allowed {e.tolerance:.3g}" for e in failed)
        raise SmokeFailedError(
            f"{name}:{version} answers, but not as ONNX Runtime does ({reference} reference): {details}",
            hint="The served file, the server's ONNX Runtime or its execution provider differs from the recorded one.",
        )
    return SmokeResult(version, reference, comparisons, latency_ns)


def _reference(version: Location, config: ModelConfig) -> tuple[Golden, str, float]:
    """Return inputs with their right outputs, where the outputs come from, and the tolerance."""
    tolerance = DEFAULT_TOLERANCE
    with version_files(version, [GOLDEN_FILE_NAME]) as folder:
        if (folder / MANIFEST_FILENAME).is_file():
            recorded = read_manifest(folder).golden
            if isinstance(recorded, Mapping) and isinstance(recorded.get("tolerance"), int | float):
                tolerance = float(recorded["tolerance"])
        if (folder / GOLDEN_FILE_NAME).is_file():
            return read_golden(folder / GOLDEN_FILE_NAME), "golden", tolerance
    if config.backend == "onnxruntime":
        with version_files(version) as folder:
            path = folder / (config.message().default_model_filename or "model.onnx")
            try:
                inputs = natural_inputs(signature_of(load_model(path)), batch=1)
                return Golden(inputs, Session(path).run(inputs)), "onnxruntime", tolerance
            except ModelError:
                pass  # made-up inputs do not suit every model: fall back to the shapes
    return Golden(_zeros(config), {}), "none", tolerance


def _zeros(config: ModelConfig) -> dict[str, Array]:
    """Make an input of zeros from a configuration alone; a dynamic dimension becomes 1."""
    message = config.message()
    arrays = {}
    for entry in message.input:
        kind = _DATA_TYPE.values_by_number[entry.data_type].name
        shape = [1] * bool(config.max_batch_size) + [max(1, size) for size in entry.dims]
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise RepositoryError(f"no smoke inference can be made for input {entry.name}: {kind} has no default value")
        arrays[entry.name] = np.full(shape, b"" if dtype is np.object_ else 0, dtype)
    return arrays


def _dims(entry: Any, batched: bool) -> list[int]:
    return [-1] * batched + list(entry.dims)


def _as_served(array: Array, dims: list[int] | None, batched: bool) -> Array:
    """Give an array the shape that clients send where the configuration reshapes (scalars have one axis there)."""
    if dims is None or array.ndim == len(dims):
        return array
    shape = [array.shape[0], *dims[1:]] if batched and array.ndim else dims
    if any(size < 0 for size in shape) or int(np.prod(shape)) != array.size:
        return array
    return array.reshape(shape)


def _compare(name: str, served: Array, expected: Array, tolerance: float) -> OutputComparison:
    if served.size != expected.size:
        return OutputComparison(name, float("inf"), tolerance)
    expected = expected.reshape(served.shape)
    if expected.dtype.kind == "O":
        pairs = zip(served.ravel().tolist(), expected.ravel().tolist(), strict=True)
        differ = sum(_text(one) != _text(other) for one, other in pairs)
        return OutputComparison(name, differ / max(1, served.size), 0.0)
    if expected.dtype.kind not in "fV":
        return OutputComparison(name, float(np.mean(served != expected)) if served.size else 0.0, 0.0)
    one, other = served.astype(np.float64), expected.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if bool(same.all()):
        return OutputComparison(name, 0.0, tolerance)
    scale = float(np.nanmax(np.abs(other[np.isfinite(other)]), initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):
        error = np.abs(one - other)[~same] / scale
    return OutputComparison(name, float("inf") if bool(np.isnan(error).any()) else float(error.max()), tolerance)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
