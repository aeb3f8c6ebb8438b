"""Options of engines, and of the configuration they are served with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from repo_manager.cli.option_groups import option, settings_of
from repo_manager.engine.fit import FitTarget, release_of_container, releases
from repo_manager.engine.options import EngineOptions, HardwareLevel, PlanDetail
from repo_manager.engine.plan_set import parse_for
from repo_manager.engine.profiles import parse_shape_range
from repo_manager.engine.triton_options import AcceleratorOptions, parse_config_names
from repo_manager.errors import UsageError
from repo_manager.pipeline.adding import AddOptions
from repo_manager.types import Precision

__all__ = ["AcceleratorFlags", "EngineFlags", "KindFlags", "parse_server"]


@dataclasses.dataclass(frozen=True)
class EngineFlags:
    """How an engine is built."""

    PANEL: ClassVar[str] = "Engine"
    shape_range: list[str] | None = option(
        "--shape-range",
        "--profile",
        metavar="NAME:MIN:OPT:MAX",
        sets=(EngineOptions, "shapes"),
        read=lambda texts: dict(parse_shape_range(text) for text in texts),
        help="Optimisation profile of an input, e.g. x:1,8:4,8:16,8, or x:4,8 for one (may be given often).",
    )
    sparse_tactics: bool = option(
        "--sparse/--no-sparse", sets=(EngineOptions, "sparse"), help="Offer 2:4 weights to sparse kernels."
    )
    workspace: int | None = option(
        "--workspace",
        sets=(EngineOptions, "workspace_bytes"),
        min=0,
        help="Largest scratch memory of a kernel, in bytes.",
    )
    optimization_level: int | None = option(
        "--optimization-level",
        sets=(EngineOptions, "optimization_level"),
        min=0,
        max=5,
        help="Builder effort: 0 (fast build) to 5.",
    )
    timing_cache: Path | None = option(
        "--timing-cache",
        metavar="FILE",
        sets=(EngineOptions, "timing_cache"),
        help="File of measured kernel times [default: in the user's cache].",
    )
    deterministic: bool = option(
        "--deterministic",
        sets=(EngineOptions, "deterministic"),
        help="Use only the timing cache. A miss is an error.",
    )
    version_compatible: bool = option(
        "--version-compatible",
        sets=(EngineOptions, "version_compatible"),
        help="Let the engine load on later versions with the same major number.",
    )
    hardware_compatibility: HardwareLevel | None = option(
        "--hardware-compatibility",
        sets=(EngineOptions, "hardware_compatibility"),
        help="Let the engine load on other GPUs [default: this GPU only].",
    )
    compute_capability: list[str] | None = option(
        "--compute-capability",
        metavar="8.9",
        sets=(EngineOptions, "compute_capabilities"),
        help="TensorRT-RTX: target GPUs (may be given often) [default: all].",
    )
    strip: bool = option("--strip", sets=(EngineOptions, "strip"), help="Build an engine without its weights.")
    refit: bool = option(
        "--refit", sets=(EngineOptions, "refit"), help="Build an engine whose weights can be replaced."
    )
    plan_detail: PlanDetail = option(
        "--plan-detail",
        sets=(EngineOptions, "plan_detail"),
        help="Detail of layer information in the engine. Sparsity evidence needs detailed.",
    )
    without_tactics: list[str] | None = option(
        "--without-tactics",
        metavar="cublas",
        sets=(EngineOptions, "without_tactics"),
        help="Exclude a library's kernels (may be given often).",
    )


@dataclasses.dataclass(frozen=True)
class KindFlags:
    """The servers and kinds of GPU for a version."""

    PANEL: ClassVar[str] = "Servers and GPU kinds"
    for_gpu: list[str] | None = option(
        "--for",
        metavar="8.0=FILE",
        sets=(EngineOptions, "plans"),
        read=parse_for,
        help="An engine per GPU kind: a plan built elsewhere, or 8.9 alone to build it here (may be given often).",
    )
    model_config: list[str] | None = option(
        "--model-config",
        metavar="NAME=9.0",
        sets=(AddOptions, "model_configs"),
        read=parse_config_names,
        help="Also configs/NAME.pbtxt for tritonserver --model-config-name: the plan of a GPU kind, or a file of "
        "overrides. With the model's first version only.",
    )
    for_server: str | None = option(
        "--for-server",
        metavar="26.07[:9.0]",
        sets=(AddOptions, "target"),
        read=lambda text: parse_server(text),
        help="Stop if the engine will not load on this Triton release (and GPU).",
    )
    control: bool = option(
        "--control",
        sets=(AddOptions, "control"),
        help="Also publish the controls NAME__dense and, for an engine, NAME__noflag.",
    )


def parse_server(text: str) -> FitTarget:
    """Read `26.07` or `26.07:9.0`.

    Raises:
        UsageError: another form, or the release is not in the table.
    """
    name, _, capability = text.partition(":")
    release = release_of_container(name)
    if release is None:
        first, last = releases()[0].release, releases()[-1].release
        raise UsageError(f"--for-server {text}: no Triton release {name!r} is known; the table has {first} to {last}")
    if capability and not capability.replace(".", "", 1).isdecimal():
        raise UsageError(f"--for-server {text}: expected RELEASE:CAPABILITY, for instance 26.07:9.0")
    return FitTarget(release, capability or None)


@dataclasses.dataclass(frozen=True)
class AcceleratorFlags:
    """TensorRT inside Triton's onnxruntime backend."""

    PANEL: ClassVar[str] = "Accelerator"
    accelerator: Literal["tensorrt"] | None = option(
        "--accelerator", help="Backend onnxruntime: build and run an engine on the server's GPU."
    )
    engine_cache: str | None = option(
        "--engine-cache",
        metavar="DIR",
        sets=(AcceleratorOptions, "engine_cache"),
        help="Folder on the server for a cache of engines.",
    )
    accelerator_precision: Literal["fp32", "fp16", "int8"] | None = option(
        "--accelerator-precision", help="Precision TensorRT may use [default: --precision]."
    )

    def accelerator_options(self, precision: Precision, engine: EngineOptions) -> AcceleratorOptions | None:
        """Return the library's options, or `None` when no accelerator is asked for.

        Args:
            precision: precision of the version, the default of `--accelerator-precision`.
            engine: its sparsity and workspace also apply to the accelerator.

        Raises:
            UsageError: options of an accelerator without it.
        """
        if self.accelerator is None:
            if self.engine_cache is not None or self.accelerator_precision is not None:
                raise UsageError("--engine-cache and --accelerator-precision go with --accelerator tensorrt")
            return None
        wanted = self.accelerator_precision
        return AcceleratorOptions(
            precision=precision if wanted is None else Precision(wanted),
            workspace_bytes=engine.workspace_bytes,
            sparse=engine.sparse,
            **settings_of(AcceleratorOptions, self),
        )
