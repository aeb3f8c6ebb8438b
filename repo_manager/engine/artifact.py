"""The files of a version's folder for its backend to load."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.engine.build_log import BuildProgress
from repo_manager.engine.builder import EngineBuild, build_engine
from repo_manager.engine.capabilities import capabilities_of
from repo_manager.engine.evidence import BuilderEvidence, join_evidence
from repo_manager.engine.fit import read_plan_header
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.layers import precision_mismatches
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.plan_set import AdoptedPlan, adopt_plans, check_buildable, check_one_version, plan_name
from repo_manager.engine.profiles import derive_profile, find_dim_ranges
from repo_manager.errors import UsageError, WiderPrecisionError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import require
from repo_manager.sparsity import SparsityReport, sparsity_report
from repo_manager.types import Backend, Precision

__all__ = ["ENGINE_FILE_NAMES", "Artifact", "EngineSource", "build_artifact"]

_ONNX_FILE_NAME = "model.onnx"
ENGINE_FILE_NAMES = {Backend.TENSORRT: "model.plan", Backend.TENSORRT_RTX: "model.engine"}
"""The file each engine backend loads by default."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The files of one version, and their facts.

    Attributes:
        backend: the Triton backend for them.
        files: name inside the version's folder -> the file now.
        facts: entries for the manifest: engine version, compute capability, layer evidence.
        by_capability: compute capability -> name, where there is an engine per GPU kind, else empty.
    """

    backend: Backend
    files: Mapping[str, Path]
    facts: Mapping[str, Any]
    by_capability: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EngineSource:
    """Facts of the converted model for an engine build, beyond its files.

    Attributes:
        precision: what it was converted to.
        batched: whether its first axis is a batch axis.
        max_batch_size: of the config. `0` and `None` take the profile's default.
        sparsity: of the converted file. `None` makes the report here.
        sample: input -> shape of a sample the model runs with, batch axis included. `None` looks for one.
        folder: where engines are written. `None` is `engine` beside the model's file.
        kept: nodes the conversion left out of INT8 on purpose, although their data may come quantised.
    """

    precision: Precision = Precision.FP32
    batched: bool = True
    max_batch_size: int | None = None
    sparsity: SparsityReport | None = None
    sample: Mapping[str, tuple[int, ...]] | None = None
    folder: Path | None = None
    kept: frozenset[str] = frozenset()


def build_artifact(
    files: tuple[Path, ...],
    backend: Backend,
    *,
    source: EngineSource | None = None,
    options: EngineOptions | None = None,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> Artifact:
    """Make the files for `backend` out of a converted ONNX model.

    Engines are written into `source.folder`, by default a new folder `engine` beside the model's file.

    Args:
        files: the converted model's file first, then its external data.
        backend: onnxruntime serves the ONNX file as it is.
        source: the model, its profiles and its folder, for the engine backends. `None`: another backend.
        options: how the engine is built. `None`: the defaults.
        progress: called with each step of an engine build, in the building thread. `None`: nothing is reported.
        cancelled: set it from another thread to stop the build. `None`: the build cannot be stopped.

    Raises:
        MissingDependencyError: the backend's builder is not installed.
        UsageError: the options contradict each other or the builder.
        EngineError: the engine cannot be built, or a given plan does not fit.
        WiderPrecisionError: a convolution or matrix product runs in a wider type than the graph asks for.
    """
    source, options = source or EngineSource(), options or EngineOptions()
    if backend is Backend.ONNXRUNTIME:
        if options.plans:
            raise UsageError("--for names one engine per GPU kind, and the onnxruntime backend has none")
        model, *external = files
        named = {_ONNX_FILE_NAME: model, **{path.name: path for path in external}}
        return Artifact(backend, named, {"format": "onnx"})
    adopted = adopt_plans(options.plans, backend)
    if options.plans and len(adopted) == len(options.plans):
        return _adopted_only(files[0], backend, adopted, source)
    make = _Maker(files[0], backend, source, options, progress, cancelled)
    return make.one() if not options.plans else make.set_of(adopted)


class _Maker:
    """Builds engines of one model with one library."""

    def __init__(
        self,
        path: Path,
        backend: Backend,
        source: EngineSource,
        options: EngineOptions,
        progress: BuildProgress | None,
        cancelled: threading.Event | None,
    ) -> None:
        self.backend, self.source, self.options = backend, source, options
        self.library = require(str(backend))
        self.model = load_model(path, hashed=False)
        self.folder = source.folder or path.parent / "engine"
        self.folder.mkdir(exist_ok=True)
        self._watch = (progress, cancelled)
        self.profile = derive_profile(
            signature_of(self.model),
            batched=source.batched,
            max_batch_size=source.max_batch_size if options.max_batch_size is None else options.max_batch_size,
            free=_free_ranges(self.model, source, options),
            overrides=options.shapes,
        )

    @property
    def report(self) -> SparsityReport:
        """The 2:4 report of the model built."""
        return self.source.sparsity or sparsity_report(self.model)

    def one(self) -> Artifact:
        """Build the one engine."""
        build = self._build(ENGINE_FILE_NAMES[self.backend], self.options)
        return Artifact(self.backend, {build.path.name: build.path}, _facts(build, self.report))

    def set_of(self, adopted: Mapping[str, AdoptedPlan]) -> Artifact:
        """Build the engines of a set not given."""
        able = capabilities_of(self.library)
        wanted = [capability for capability, path in self.options.plans.items() if path is None]
        for capability in wanted:
            check_buildable(capability, able, find_gpus())
        builds: dict[str, EngineBuild] = {}
        for capability in wanted:
            targets = (capability,) if able.compute_capabilities else ()
            one = dataclasses.replace(self.options, compute_capabilities=targets, plans={})
            builds[capability] = self._build(plan_name(self.backend, capability), one)
        return _plan_set(self.backend, tuple(self.options.plans), adopted, builds, self.report)

    def _build(self, name: str, options: EngineOptions) -> EngineBuild:
        progress, cancelled = self._watch
        build = build_engine(
            self.model,
            self.library,
            self.folder / name,
            self.profile,
            precision=self.source.precision,
            options=options,
            progress=progress,
            cancelled=cancelled,
        )
        _check_precision(build, self.source)
        return build


def _adopted_only(path: Path, backend: Backend, adopted: Mapping[str, AdoptedPlan], source: EngineSource) -> Artifact:
    """Take plans all built elsewhere: neither the library nor a GPU is needed."""
    report = source.sparsity or sparsity_report(load_model(path))
    return _plan_set(backend, tuple(adopted), adopted, {}, report)


def _plan_set(
    backend: Backend,
    order: tuple[str, ...],
    adopted: Mapping[str, AdoptedPlan],
    builds: Mapping[str, EngineBuild],
    report: SparsityReport,
) -> Artifact:
    """Join given and built plans. The order is as in the options, and the first one is the default."""
    check_one_version({c: builds[c].version if c in builds else adopted[c].version for c in order})
    files: dict[str, Path] = {}
    plans: dict[str, Any] = {}
    for capability in order:
        name = plan_name(backend, capability)
        if capability in builds:
            files[name] = builds[capability].path
            plans[capability] = {
                "file": name,
                "built": "here",
                "backend": backend,
                **_facts(builds[capability], report),
            }
        else:
            plan = adopted[capability]
            files[name] = plan.path
            told = join_evidence(report, BuilderEvidence(), ())
            plans[capability] = {
                "file": name,
                "built": "elsewhere",
                "backend": backend,
                "plan_version": plan.version,
                "plan": plan,
                "layers": told,
            }
    first = plans[order[0]]
    facts = {
        "format": f"{backend} engines, one per GPU kind",
        "compute_capabilities": order,
        "plan_version": first["plan_version"],
        "plans": plans,
        "layers": first["layers"],
        "sparsity_reported": any(plan.get("sparsity_reported", False) for plan in plans.values()),
    }
    return Artifact(backend, files, facts, {capability: plan["file"] for capability, plan in plans.items()})


def _free_ranges(model: Model, source: EngineSource, options: EngineOptions) -> Mapping[str, Any]:
    """Look for ranges only when some input needs one not given."""
    signature = signature_of(model)
    if all(spec.name in options.shapes for spec in signature.inputs):
        return {}
    return find_dim_ranges(model, signature, batched=source.batched, sample=source.sample)


def _check_precision(build: EngineBuild, source: EngineSource) -> None:
    int8 = source.precision.facts.quantizes
    found = precision_mismatches(build.precision, int8_wanted=int8)
    wrong = [row for row in found if not (row.one_sided and row.node in source.kept)]
    if not wrong:
        return
    build.path.unlink()
    rows = "\n".join(
        f"  {row.node} ({row.op_type}): asked for {row.asked}, runs in {row.found}: {row.detail}" for row in wrong
    )
    raise WiderPrecisionError(
        f"{build.path.name}: {len(wrong)} layer(s) do not run in the precision that the model asks for:\n{rows}",
        hint="Quantise data and weight of these layers alike, or keep them out of the conversion with --keep-fp32.",
        not_in_int8=tuple(row.node for row in wrong if row.asked == "int8" and not row.one_sided),
    )


def _facts(build: EngineBuild, report: SparsityReport) -> dict[str, Any]:
    """The manifest's record of an engine."""
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
