"""The proof of a version: requests to it, and the answers they must get."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from repo_manager.errors import ConfigError, ModelError
from repo_manager.optional import deferred
from repo_manager.repository.golden import GOLDEN_FILE_NAME, Exchange, Golden, read_golden
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import Manifest, read_manifest
from repo_manager.repository.transfer import version_files
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.ensembles import steps_of
from repo_manager.triton_messages import model_config_pb2

if TYPE_CHECKING:
    import ml_dtypes

    from repo_manager.onnx_model import inputs as onnx_inputs
else:
    ml_dtypes = deferred("ml_dtypes")
    onnx_inputs = deferred("repo_manager.onnx_model.inputs")

__all__ = [
    "DATA_TYPE",
    "Array",
    "Reference",
    "as_served",
    "dims_of",
    "numpy_type",
    "reference_of",
    "typed",
    "unknown_types",
]

Array = np.ndarray[Any, Any]
# For versions without a recorded tolerance: served version and reference are the same file on the same engine.
DEFAULT_TOLERANCE = 1e-2

DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR
_DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    **{f"TYPE_INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"TYPE_UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_BFLOAT16 = "TYPE_BF16"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Requests to send, and the answers they must get.

    Attributes:
        tries: samples. The next is sent where the server refuses a made-up one.
        source: `golden`, `onnxruntime` or `none`, with the meaning of `SmokeResult.reference`.
        tolerance: largest difference allowed for each output.
        promised: the configuration the version was published with. `None`: it has none.
        parts: model the version needs -> the version of it behind the answers.
        pinned: model the version, an ensemble, asks for by number -> that number.
    """

    tries: tuple[Golden, ...]
    source: str
    tolerance: float
    promised: ModelConfig | None = None
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pinned: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def changed_parts(self, client: TritonClient) -> str:
        """Return the models whose answering version differs from the recorded one. Empty for none."""
        if not self.parts:
            return ""
        ready: dict[str, int] = {}
        for entry in client.repository_index():
            if entry.state == "READY" and entry.version is not None:
                ready[entry.name] = max(entry.version, ready.get(entry.name, 0))
        ready.update(self.pinned)
        changed = {name: ready[name] for name, version in self.parts.items() if ready.get(name, version) != version}
        return ", ".join(f"{name} is {number} instead of {self.parts[name]}" for name, number in changed.items())


def recorded_reference(version: Location, config: ModelConfig) -> Reference:
    """Return a version's recorded sample with its tolerance. `tries` is empty where none was recorded.

    Args:
        version: folder or URL of the version.
        config: configuration the server runs the model with.
    """
    tolerance, parts = DEFAULT_TOLERANCE, {}
    promised = None
    with version_files(version, [GOLDEN_FILE_NAME]) as folder:
        if (folder / MANIFEST_FILENAME).is_file():
            manifest = read_manifest(folder)
            recorded, promised = manifest.golden, _promised(manifest, config)
            if isinstance(recorded, Mapping) and isinstance(recorded.get("tolerance"), int | float):
                tolerance = float(recorded["tolerance"])
            if isinstance(recorded, Mapping) and isinstance(recorded.get("parts"), Mapping):
                parts = {str(name): int(number) for name, number in recorded["parts"].items()}
        tries = (read_golden(folder / GOLDEN_FILE_NAME),) if (folder / GOLDEN_FILE_NAME).is_file() else ()
    pinned = {step.model: step.version for step in steps_of(config) if step.version is not None}
    return Reference(tries, "golden", tolerance, promised, parts, pinned)


def reference_of(version: Location, config: ModelConfig, kind: ModelKind) -> Reference:
    """Return requests with their right answers, where the answers come from, and the tolerance.

    Args:
        version: folder or URL of the version.
        config: configuration of the model (config.pbtxt).
        kind: how the model is asked: batched, stateful, decoupled.
    """
    reference = recorded_reference(version, config)
    if reference.tries and _is_taken(reference.tries[0], config):
        return reference
    if config.backend == "onnxruntime" and not kind.sequence and not config.is_ragged:
        with version_files(version) as folder:
            path = folder / (config.message().default_model_filename or "model.onnx")
            try:
                batched = config.max_batch_size > 0
                shapes = {entry.name: tuple(dims_of(entry, batched)) for entry in config.message().input}
                made_up = Golden(*onnx_inputs.natural_answers(path, shapes))
                return dataclasses.replace(reference, tries=(made_up,), source="onnxruntime")
            except ModelError:
                pass  # made-up inputs do not fit every model: use the shapes instead
    return dataclasses.replace(reference, tries=_made_up(config, kind), source="none")


def _promised(manifest: Manifest, config: ModelConfig) -> ModelConfig | None:
    """Return the configuration a version was published with, where it names outputs."""
    try:
        published = parse_config(manifest.config, where=MANIFEST_FILENAME)
    except ConfigError:
        return None
    # The batch axis is part of the dims in only one of them, so all shapes differ.
    same_axes = (published.max_batch_size > 0) == (config.max_batch_size > 0)
    return published if published.message().output and same_axes else None


def _is_taken(golden: Golden, config: ModelConfig) -> bool:
    """Say whether the server takes a recorded sample: a person may have narrowed the dims since."""
    batched = config.max_batch_size > 0
    dims = {entry.name: dims_of(entry, batched) for entry in config.message().input}
    sent = [
        (dims[name], as_served(array, dims[name], batched).shape)
        for exchange in golden.exchanges
        for name, array in exchange.inputs.items()
        if name in dims
    ]
    return all(
        len(wanted) == len(shape) and all(size in (-1, have) for size, have in zip(wanted, shape, strict=True))
        for wanted, shape in sent
    )


def _made_up(config: ModelConfig, kind: ModelKind) -> tuple[Golden, ...]:
    """Make requests from a configuration alone: zeros without the optional inputs, then ones with all of them.

    Sizes of dynamic dimensions are those of a warm-up sample, else 1. A sequence has two requests.
    """
    entries = list(config.message().input)
    if unknown_types(config):
        return ()
    required = [entry for entry in entries if not entry.optional] or entries
    times = 2 if kind.sequence else 1
    return tuple(
        Golden.of([Exchange({entry.name: _filled(entry, config, fill) for entry in chosen}, ())] * times)
        for chosen, fill in ((required, 0), (entries, 1))
    )


def numpy_type(kind: str) -> np.dtype[Any] | None:
    """Return how NumPy holds one of Triton's data types, or `None` where it has no such type."""
    if kind == _BFLOAT16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_DTYPES[kind]) if kind in _DTYPES else None


def unknown_types(config: ModelConfig) -> str:
    """Return the inputs whose type has no values to make up."""
    kinds = {entry.name: DATA_TYPE.values_by_number[entry.data_type].name for entry in config.message().input}
    return ", ".join(f"input {name} ({kind})" for name, kind in kinds.items() if numpy_type(kind) is None)


def _filled(entry: Any, config: ModelConfig, fill: int) -> Array:
    """Return an input full of one value."""
    dtype = numpy_type(DATA_TYPE.values_by_number[entry.data_type].name)
    warm = [
        dict(sample.inputs)[entry.name].dims for sample in config.message().model_warmup if entry.name in sample.inputs
    ]
    dims = warm[0] if warm and len(warm[0]) == len(entry.dims) else entry.dims
    shape = [1] * bool(config.max_batch_size) + [max(1, size) for size in dims]
    if dtype == np.dtype(object):
        return np.full(shape, str(fill).encode(), dtype)
    return np.full(shape, fill).astype(dtype)


def typed(array: Array, entry: Any) -> Array:
    """Give a recorded input the type the file cannot hold."""
    if DATA_TYPE.values_by_number[entry.data_type].name == _BFLOAT16:
        return array.astype(ml_dtypes.bfloat16)
    return array


def dims_of(entry: Any, batched: bool) -> list[int]:
    """Return the dims of an input or output of the configuration, with the batch axis as -1."""
    return [-1] * batched + list(entry.dims)


def as_served(array: Array, dims: list[int] | None, batched: bool) -> Array:
    """Give an array the clients' shape where the configuration reshapes (scalars have one axis there).

    Args:
        array: one input of a request.
        dims: dimensions of the request. `None`: no reshape.
        batched: whether the arrays have a batch axis.
    """
    if dims is None or array.ndim == len(dims):
        return array
    shape = [array.shape[0], *dims[1:]] if batched and array.ndim else dims
    if any(size < 0 for size in shape) or int(np.prod(shape)) != array.size:
        return array
    return array.reshape(shape)
