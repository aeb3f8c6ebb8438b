"""Controls of a sparse model: the other side of a comparison, so a gain is sparsity's and nothing else's.

`N__dense`: the same graph with dense weights, converted and built the same way. `N__noflag`: the same sparse weights,
with sparse kernels not offered. Accuracy of the dense twin means nothing. Its weights are made up.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.engine.builder import EngineBuild
from repo_manager.engine.evidence import LayerEvidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.optional import require
from repo_manager.sparsity.pattern import nonzero
from repo_manager.sparsity.uses import Use, weight_uses
from repo_manager.sparsity.verdict import obstacle_of
from repo_manager.types import Backend

__all__ = [
    "ControlTwin",
    "control_twins",
    "dense_twin",
    "join_times",
    "layer_times_of",
    "measure_layer_times",
    "profiler_for",
]


_WHOLE_BYTE_TYPES = {"float16", "float32", "float64", "bfloat16", "int8", "uint8", "int16"}


@dataclasses.dataclass(frozen=True)
class ControlTwin:
    """One control.

    Attributes:
        name: the model's name in the repository.
        dense: whether its weights are filled up, see `dense_twin`.
        sparse_flag: whether the builder may choose sparse kernels (`EngineOptions.sparse`).
        purpose: what comparing with it tells.
    """

    name: str
    dense: bool
    sparse_flag: bool
    purpose: str


def control_twins(name: str, backend: Backend) -> tuple[ControlTwin, ...]:
    """List the controls of a model: of an engine the dense twin and the one without the flag.

    ONNX Runtime's own kernels know no such flag, so there the dense twin is the only control.
    """
    dense = ControlTwin(f"{name}__dense", True, True, "dense against sparse weights, same graph, precision and builder")
    noflag = ControlTwin(f"{name}__noflag", False, False, "the same weights with and without sparse kernels")
    return (dense,) if backend is Backend.ONNXRUNTIME else (dense, noflag)


def dense_twin(model: Model, *, seed: int = 0) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model with every zero of its 2:4-capable weights filled. The argument is left alone.

    A zero becomes one of the same weight's other values with a random sign, so scales and ranges stay the same.
    Weights of zeros throughout, stored with a zero point other than 0, or in less than a byte a value are left alone.

    Args:
        model: the source, before its conversion.
        seed: seed of the drawn values. The same seed gives the same twin.

    Returns:
        (new model in memory, external data loaded; names of the filled weights).

    Raises:
        ModelError: there is nothing to fill: the model has no zeros where sparsity counts.
    """
    tensors = list(tensors_of(model.graph_only))  # kept alive to the end: id() identifies each tensor
    places = {id(tensor): index for index, tensor in enumerate(tensors)}
    data: dict[int, bytes] = {}
    names: list[str] = []
    for use in weight_uses(model.graph_only, model.weights):
        if obstacle_of(use) is not None or use.weight is None or use.weight.source is None:
            continue
        place = places.get(id(use.weight.source))
        if place is None or place in data or not _is_plain(use):
            continue
        stored = model.array(use.weight.source)
        filled = _filled(stored, np.random.default_rng([seed, zlib.crc32(use.weight.name.encode())]))
        if filled is not None:
            data[place] = np.ascontiguousarray(filled).tobytes()
            names.append(use.weight.name)
    if not names:
        raise ModelError(
            f"{model.path}: no weight where 2:4 counts holds a zero, so there is no denser twin",
            hint="--control compares a sparse model with its dense twin; prune the model first.",
        )
    return model.rebuild(lambda index, _: data.get(index)), tuple(names)


def _is_plain(use: Use) -> bool:
    """Whether a stored zero is a zero of the weight, in a type of whole bytes."""
    weight = use.weight
    assert weight is not None
    shifted = any(np.any(step.zero_point) for step in weight.steps if hasattr(step, "zero_point"))
    return weight.sparse is None and not shifted


def _filled(stored: NDArray[Any], generator: np.random.Generator) -> NDArray[Any] | None:
    if stored.dtype.name not in _WHOLE_BYTE_TYPES:
        return None
    kept = nonzero(stored)
    count = int(kept.size - np.count_nonzero(kept))
    values = stored[kept]
    if count == 0 or values.size == 0:
        return None
    filled = stored.copy()
    drawn = generator.choice(values, count)
    if stored.dtype.kind != "u":
        drawn = np.where(generator.integers(0, 2, count, dtype=bool), drawn, -drawn).astype(stored.dtype)
    filled[~kept] = drawn
    return filled


# Layer times of an engine on this machine's GPU, measured by TensorRT's profiler (IProfiler).
#
# The embedded server's backend module drives the engine, so the measurement covers the served code. The profiler adds
# work between layers: compare its times between layers, not between engines.

_BACKEND = Path(__file__).parent.parent / "server" / "backends" / "tensorrt"
_RUNS, _WARM_UP = 20, 5


def profiler_for(library: ModuleType) -> Any:
    """Make an `IProfiler` to keep the reported times.

    Returns:
        An object with `times_ns`: layer -> its times in nanoseconds, one a run.
    """

    def __init__(self: Any) -> None:  # noqa: N807 - a method of the class made below
        library.IProfiler.__init__(self)
        self.times_ns = {}

    def report_layer_time(self: Any, layer_name: str, ms: float) -> None:
        self.times_ns.setdefault(layer_name, []).append(round(ms * 1e6))

    members = {"__init__": __init__, "report_layer_time": report_layer_time}
    return type("RecordingProfiler", (library.IProfiler,), members)()


def layer_times_of(build: EngineBuild) -> dict[str, int] | None:
    """Measure a build's layers with the shapes it is tuned for. `None` without a GPU."""
    if not find_gpus() or not build.path.exists():
        return None
    shapes = {name: given.opt for name, given in build.profile.items()}
    return measure_layer_times(require(str(build.backend)), build.path, shapes)


def measure_layer_times(
    library: ModuleType, plan: Path, shapes: Mapping[str, tuple[int, ...]], *, runs: int = _RUNS
) -> dict[str, int]:
    """Run an engine on the GPU and time its layers.

    Args:
        library: module `tensorrt` or `tensorrt_rtx`: the one the plan was built with.
        plan: path of the engine's file.
        shapes: input name -> shape, batch axis included.
        runs: how many runs count. A few come before.

    Returns:
        Layer, by the engine's name for it -> median time in nanoseconds, in the order of execution.

    Raises:
        Exception: the backend module's own errors: no GPU, or the plan does not load.
    """
    cuda_module, engine_module = _backend_modules()
    engine = engine_module.Engine(library, plan, cuda_module.Cuda(0))
    try:
        feed = _feed(engine, shapes)
        engine.run(feed)  # sets shapes, addresses and data for all later runs
        (context,) = engine._contexts.values()
        profiler = profiler_for(library)
        context.profiler = profiler
        for _ in range(_WARM_UP + runs):
            engine.run(feed)
    finally:
        engine.close()
    return {name: round(statistics.median(times[-runs:])) for name, times in profiler.times_ns.items()}


def _backend_modules() -> tuple[Any, Any]:
    if str(_BACKEND) not in sys.path:
        sys.path.insert(0, str(_BACKEND))
    return importlib.import_module("rm_trt_cuda"), importlib.import_module("rm_trt_engine")


def _feed(engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Any]]:
    types = {tensor.name: tensor.numpy_type for tensor in engine.tensors if tensor.is_input}
    generator = np.random.default_rng(0)
    return {name: [generator.standard_normal(shape).astype(types[name])] for name, shape in shapes.items()}


def join_times(
    rows: Sequence[LayerEvidence],
    sparse_ns: Mapping[str, int],
    dense_rows: Sequence[LayerEvidence],
    dense_ns: Mapping[str, int],
) -> tuple[LayerEvidence, ...]:
    """Add the measured times to the evidence of a sparse engine.

    Args:
        rows: evidence of the sparse engine's layers. The result has these rows, in this order.
        sparse_ns: engine layer -> nanoseconds, of the same engine.
        dense_rows: of its dense twin, whose builder may have fused otherwise: rows are matched by the ONNX node.
        dense_ns: layer name -> nanoseconds in the dense twin.
    """
    dense_layer = {row.layer: row.engine_layer for row in dense_rows}
    return tuple(
        dataclasses.replace(
            row,
            time_sparse_ns=sparse_ns.get(row.engine_layer or ""),
            time_dense_ns=dense_ns.get(dense_layer.get(row.layer) or ""),
        )
        for row in rows
    )
