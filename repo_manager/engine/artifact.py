"""What is placed in a version's folder for its backend to load."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.engine.builder import EngineBuild, build_engine
from repo_manager.engine.evidence import join_evidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.layer_precision import precision_mismatches
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.plan_header import read_plan_header
from repo_manager.engine.profiles import derive_profile, find_dim_ranges
from repo_manager.engine.progress import BuildProgress
from repo_manager.errors import GateError
from repo_manager.onnx_model import Model, load_model, signature_of
from repo_manager.optional import require
from repo_manager.sparsity import SparsityReport, sparsity_report
from repo_manager.types import Backend, Precision

__all__ = ["ENGINE_FILE_NAMES", "Artifact", "EngineSource", "build_artifact"]

_ONNX_FILE_NAME = "model.onnx"
ENGINE_FILE_NAMES = {Backend.TENSORRT: "model.plan", Backend.TENSORRT_RTX: "model.engine"}
"""The file that each engine backend loads by default."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The files of one version, and what is known of them.

    Attributes:
        backend: the Triton backend that loads them.
        files: name inside the version's folder -> the file now.
        facts: what the manifest records: engine version, compute capability, layer evidence.
    """

    backend: Backend
    files: Mapping[str, Path]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class EngineSource:
    """What an engine build has to know of the converted model beyond its files.

    Attributes:
        precision: what it was converted to.
        batched: whether its first axis is a batch axis.
        max_batch_size: of the config; `0` and `None` take the profile's default.
        sparsity: of the converted file; `None` makes the report here.
        sample: input -> shape of a sample that the model runs with, batch axis included; `None` looks for one.
    """

    precision: Precision = Precision.FP32
    batched: bool = True
    max_batch_size: int | None = None
    sparsity: SparsityReport | None = None
    sample: Mapping[str, tuple[int, ...]] | None = None


def build_artifact(
    files: tuple[Path, ...],
    backend: Backend,
    *,
    source: EngineSource | None = None,
    options: EngineOptions | None = None,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> Artifact:
    """Make what `backend` serves out of a converted ONNX model.

    An engine is written into a new folder `engine` beside the model's file.

    Args:
        files: the converted model's file first, then its external data.
        backend: onnxruntime serves the ONNX file as it is.
        source: for the engine backends.
        options: likewise; `None` takes the defaults.
        progress: told about the build's steps.
        cancelled: set it to stop the build.

    Raises:
        MissingDependencyError: the backend's builder is not installed.
        UsageError: the options contradict each other or the builder.
        EngineError: the engine cannot be built.
        GateError: a convolution or matrix product runs in a wider type than the graph asks for.
    """
    if backend is Backend.ONNXRUNTIME:
        model, *external = files
        named = {_ONNX_FILE_NAME: model, **{path.name: path for path in external}}
        return Artifact(backend, named, {"format": "onnx"})
    source, options = source or EngineSource(), options or EngineOptions()
    library = require(str(backend))
    loaded = load_model(files[0])
    signature = signature_of(loaded)
    profile = derive_profile(
        signature,
        batched=source.batched,
        max_batch_size=source.max_batch_size if options.max_batch_size is None else options.max_batch_size,
        free=_free_ranges(loaded, source, options),
        overrides=options.shapes,
    )
    output = files[0].parent / "engine" / ENGINE_FILE_NAMES[backend]
    output.parent.mkdir(exist_ok=True)
    build = build_engine(
        loaded,
        library,
        output,
        profile,
        precision=source.precision,
        options=options,
        progress=progress,
        cancelled=cancelled,
    )
    _check_precision(build, source.precision)
    return Artifact(backend, {output.name: output}, _facts(build, source.sparsity or sparsity_report(loaded)))


def _free_ranges(model: Model, source: EngineSource, options: EngineOptions) -> Mapping[str, Any]:
    """Look for ranges only when some input needs one that was not given."""
    signature = signature_of(model)
    if all(spec.name in options.shapes for spec in signature.inputs):
        return {}
    return find_dim_ranges(model, signature, batched=source.batched, sample=source.sample)


def _check_precision(build: EngineBuild, precision: Precision) -> None:
    int8 = precision in (Precision.INT8, Precision.INT8_FP16)
    wrong = precision_mismatches(build.precision, int8_wanted=int8)
    if not wrong:
        return
    build.path.unlink()
    rows = "\n".join(
        f"  {row.node} ({row.op_type}): asked for {row.asked}, runs in {row.found}: {row.detail}" for row in wrong
    )
    raise GateError(
        f"{build.path.name}: {len(wrong)} layer(s) do not run in the precision that the model asks for:\n{rows}",
        hint="Quantise data and weight of these layers alike, or keep them out of the conversion with --keep-fp32.",
    )


def _facts(build: EngineBuild, report: SparsityReport) -> dict[str, Any]:
    """What the manifest records of an engine."""
    header = read_plan_header(build.path)
    gpus = find_gpus()[:1]
    verified = [row for row in build.precision if row.found is not None]
    return {
        "format": f"{build.backend} engine",
        "build": build,
        "compute_capabilities": header.compute_capabilities or tuple(gpu.compute_capability for gpu in gpus),
        "plan_version": header.version,
        "precision_verified": len(verified),
        "precision_unverified": tuple(row.node for row in build.precision if row.found is None),
        "sparsity_reported": build.evidence.reported,
        "layers": join_evidence(report, build.evidence, build.layers),
    }
