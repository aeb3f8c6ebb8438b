"""Times of an engine's layers on this machine's GPU, by TensorRT's own profiler (IProfiler).

The engine is driven by the module that the embedded server's backend uses, so that what is measured is what is served.
The profiler adds work between layers: its times compare layers with layers, not engines with engines.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from repo_manager.engine.builder import EngineBuild
from repo_manager.engine.evidence import LayerEvidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.optional import require

__all__ = ["join_times", "layer_times_of", "measure_layer_times", "profiler_for"]

_BACKEND = Path(__file__).parent.parent / "server" / "backends" / "tensorrt"
_RUNS, _WARM_UP = 20, 5


def profiler_for(library: ModuleType) -> Any:
    """Make an `IProfiler` that keeps what it is told.

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
    """Measure a build's layers with the shapes that it is tuned for; `None` without a GPU."""
    if not find_gpus() or not build.path.exists():
        return None
    shapes = {name: given.opt for name, given in build.profile.items()}
    return measure_layer_times(require(str(build.backend)), build.path, shapes)


def measure_layer_times(
    library: ModuleType, plan: Path, shapes: Mapping[str, tuple[int, ...]], *, runs: int = _RUNS
) -> dict[str, int]:
    """Run an engine on the GPU and time its layers.

    Args:
        library: `tensorrt` or `tensorrt_rtx`.
        plan: the engine's file.
        shapes: input -> shape.
        runs: how many runs count; a few come before.

    Returns:
        Layer, by the engine's name for it -> median time in nanoseconds, in the order of execution.

    Raises:
        Exception: the backend module's own errors: no GPU, or the plan does not load.
    """
    cuda_module, engine_module = _backend_modules()
    engine = engine_module.Engine(library, plan, cuda_module.Cuda(0))
    try:
        engine.run(_feed(engine, shapes))  # shapes, addresses and data are set from here on
        (context,) = engine._contexts.values()
        profiler = profiler_for(library)
        context.profiler = profiler
        for _ in range(_WARM_UP + runs):
            engine.run(_feed(engine, shapes))
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
        rows: of the sparse engine.
        sparse_ns: engine layer -> nanoseconds, of the same engine.
        dense_rows: of its dense twin, whose builder may have fused otherwise: rows are matched by the ONNX node.
        dense_ns: of the twin.
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
