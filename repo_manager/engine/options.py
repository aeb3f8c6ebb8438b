"""Options of an engine build, and contradictions between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from repo_manager.engine.capabilities import Capabilities
from repo_manager.engine.profiles import ShapeRange
from repo_manager.errors import UsageError
from repo_manager.validation import check_fields

__all__ = ["EngineOptions", "HardwareLevel", "PlanDetail", "check_options"]

PlanDetail = Literal["layer_names_only", "detailed", "none"]
"""How much a plan says of its own layers, TensorRT's ProfilingVerbosity."""

HardwareLevel = Literal["ampere_plus", "same_compute_capability"]
"""The GPUs beside the one at hand a plan is for, TensorRT's HardwareCompatibilityLevel."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of a build. The defaults give the fastest plan for the GPU at hand.

    Attributes:
        max_batch_size: the largest batch of the derived profile. `None` takes 8, `0` is a model without a batch axis.
        shapes: input name -> range, in place of the derived one.
        sparse: offer 2:4 weights to sparse kernels. Whether one is chosen is the builder's decision, and evidence
            (`EngineBuild.evidence`) tells.
        workspace_bytes: scratch memory a kernel may use. `None` is the builder's default.
        optimization_level: 0 (fastest build) to 5. `None` is the builder's default, 3.
        timing_cache: the file of measured kernel times. `None` is one per library version and GPU in the user's cache
            folder.
        deterministic: build from the timing cache alone: a measurement missing in it is an error.
        version_compatible: the plan also loads in later versions of the same major one. Triton needs
            `--backend-config=tensorrt,version-compatible=true`.
        hardware_compatibility: `ampere_plus` or `same_compute_capability`. `None` is this GPU only.
        compute_capabilities: the GPUs a TensorRT-RTX engine is for (`8.9`). Empty is every one it knows.
        strip: leave the weights out of the plan.
        refit: let the engine take other weights after the build. Needs `sparse=False`.
        plan_detail: one of `PlanDetail`. Evidence needs `detailed`.
        without_tactics: libraries whose kernels are left out (`cublas`, `cublas_lt`, `cudnn`, ...), for machines
            without them. Empty leaves the choice to the builder.
        plans: one engine per GPU kind: compute capability -> a plan built elsewhere, or `None` to build it here. Empty
            is one engine. See `plan_set.py`.
    """

    max_batch_size: int | None = None
    shapes: Mapping[str, ShapeRange] = dataclasses.field(default_factory=dict)
    sparse: bool = True
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    deterministic: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareLevel | None = None
    compute_capabilities: tuple[str, ...] = ()
    strip: bool = False
    refit: bool = False
    plan_detail: PlanDetail = "detailed"
    without_tactics: tuple[str, ...] = ()
    plans: Mapping[str, Path | None] = dataclasses.field(default_factory=dict, metadata={"json": False})

    def __post_init__(self) -> None:
        check_fields(self)


def check_options(options: EngineOptions, able: Capabilities) -> None:
    """Refuse options the builder would ignore, reject late, or use against sparsity.

    Raises:
        UsageError: naming the option, the reason and the alternative.
    """
    _check_numbers(options)
    _check_refit(options, able)
    _check_targets(options, able)
    _check_tactics(options, able)
    if able.timing_cache:
        return
    if options.timing_cache is not None:
        raise _refused("--timing-cache", able, "it measures no kernels when it builds", "Leave the option out.")
    if options.deterministic:
        raise _refused(
            "--deterministic",
            able,
            "it has no timing cache to pin, and two builds of one model differ in a few bytes",
            "Leave the option out; the version's manifest holds the engine's sha256.",
        )


def _check_numbers(options: EngineOptions) -> None:
    level, workspace = options.optimization_level, options.workspace_bytes
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"--optimization-level {level}: expected 0 (fastest build) to 5 (fastest engine)")
    if workspace is not None and workspace <= 0:
        raise UsageError(f"--workspace {workspace}: expected a number of bytes above 0")
    details = get_args(PlanDetail)
    if options.plan_detail not in details:
        raise UsageError(f"--plan-detail {options.plan_detail}: expected one of {', '.join(details)}")


def _check_refit(options: EngineOptions, able: Capabilities) -> None:
    if options.refit and options.sparse:
        raise UsageError(
            "--refit contradicts sparse kernels: new weights that are not 2:4 fail in a layer that runs sparse",
            hint="Build a refittable dense plan with --no-sparse, or leave --refit out and add a new version instead.",
        )
    if options.strip and able.strip_flag is None:
        raise _refused("--strip", able, "this version has no such flag", "Use TensorRT 10 or newer.")
    if options.strip and options.sparse and "REFIT_IDENTICAL" not in able.builder_flags:
        raise _refused(
            "--strip with sparse kernels",
            able,
            "it cannot promise that the weights put back are the ones it was built with",
            "Add --no-sparse, or use TensorRT 10 or newer.",
        )


def _check_targets(options: EngineOptions, able: Capabilities) -> None:
    level = options.hardware_compatibility
    if level is not None and level.upper() not in able.hardware_levels:
        levels = ", ".join(name.lower() for name in able.hardware_levels) or "none"
        raise _refused(
            f"--hardware-compatibility {level}", able, f"it offers: {levels}", "Build one plan per GPU kind."
        )
    unknown = [target for target in options.compute_capabilities if target not in able.compute_capabilities]
    if not unknown:
        return
    if not able.compute_capabilities:
        raise _refused(
            f"--compute-capability {unknown[0]}",
            able,
            "a TensorRT plan is for the GPU that it is built on",
            "Build on a machine with that GPU, or use --backend tensorrt_rtx.",
        )
    raise _refused(
        f"--compute-capability {unknown[0]}",
        able,
        f"it builds for {', '.join(able.compute_capabilities)}",
        "Choose one.",
    )


def _check_tactics(options: EngineOptions, able: Capabilities) -> None:
    unknown = [name for name in options.without_tactics if name.upper() not in able.tactic_sources]
    if unknown:
        known = ", ".join(name.lower() for name in able.tactic_sources) or "none"
        raise _refused(f"--without-tactics {unknown[0]}", able, f"its sources are: {known}", "Choose among these.")


def _refused(option: str, able: Capabilities, reason: str, hint: str) -> UsageError:
    return UsageError(f"{option}: {able.backend} {able.version} cannot do this: {reason}", hint=hint)
