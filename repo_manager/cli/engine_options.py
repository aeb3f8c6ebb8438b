"""Options of engines, and of the configuration that they are served with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from repo_manager.engine import AcceleratorOptions, EngineOptions, FitTarget
    from repo_manager.types import Precision

__all__ = ["AcceleratorFlags", "EngineFlags", "KindFlags"]


@dataclasses.dataclass(frozen=True)
class EngineFlags:
    """How an engine is built."""

    shape_range: Annotated[
        list[str] | None,
        typer.Option(
            "--shape-range",
            "--profile",
            metavar="NAME:MIN:OPT:MAX",
            help="Engine: shapes of an input, e.g. x:1,8:4,8:16,8, or x:4,8 for one.",
        ),
    ] = None
    sparse_tactics: Annotated[
        bool, typer.Option("--sparse/--no-sparse", help="Engine: offer 2:4 weights to sparse kernels.")
    ] = True
    workspace: Annotated[
        int | None, typer.Option("--workspace", min=0, help="Engine: scratch memory of a kernel, in bytes.")
    ] = None
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="Engine: 0 (fast build) to 5.")
    ] = None
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="Engine: measured kernel times [default: cache]."),
    ] = None
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Engine: from the timing cache alone; a miss is an error.")
    ] = False
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engine: also for later versions of the same major one.")
    ] = False
    hardware_compatibility: Annotated[
        str | None,
        typer.Option("--hardware-compatibility", help="Engine: ampere_plus or same_compute_capability."),
    ] = None
    compute_capability: Annotated[
        list[str] | None,
        typer.Option("--compute-capability", metavar="8.9", help="TensorRT-RTX: the GPUs it is for [default: all]."),
    ] = None
    strip: Annotated[bool, typer.Option("--strip", help="Engine: leave the weights out.")] = False
    refit: Annotated[bool, typer.Option("--refit", help="Engine: allow other weights later.")] = False
    plan_detail: Annotated[
        str, typer.Option("--plan-detail", help="Engine: what it tells of its layers; evidence needs detailed.")
    ] = "detailed"
    without_tactics: Annotated[
        list[str] | None,
        typer.Option("--without-tactics", metavar="cublas", help="Engine: leave a library's kernels out."),
    ] = None

    def engine_options(self, plans: dict[str, Path | None]) -> EngineOptions:
        """Return the library's options.

        Args:
            plans: see `KindFlags.plans`.
        """
        from repo_manager.engine import EngineOptions, parse_shape_range

        return EngineOptions(
            shapes=dict(parse_shape_range(text) for text in self.shape_range or []),
            sparse=self.sparse_tactics,
            workspace_bytes=self.workspace,
            optimization_level=self.optimization_level,
            timing_cache=self.timing_cache,
            deterministic=self.deterministic,
            version_compatible=self.version_compatible,
            hardware_compatibility=self.hardware_compatibility,
            compute_capabilities=tuple(self.compute_capability or ()),
            strip=self.strip,
            refit=self.refit,
            plan_detail=self.plan_detail,
            without_tactics=tuple(self.without_tactics or ()),
            plans=plans,
        )


@dataclasses.dataclass(frozen=True)
class KindFlags:
    """Which servers and kinds of GPU a version is for."""

    for_gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="8.0=FILE",
            help="An engine per GPU kind: a plan built elsewhere, or 8.9 alone to build it here (may be given often).",
        ),
    ] = None
    model_config: Annotated[
        list[str] | None,
        typer.Option(
            "--model-config",
            metavar="NAME=9.0",
            help="Also configs/NAME.pbtxt for tritonserver --model-config-name: the plan of a GPU kind, or a file of "
            "overrides. With the model's first version only.",
        ),
    ] = None
    for_server: Annotated[
        str | None,
        typer.Option(
            "--for-server",
            metavar="26.07[:9.0]",
            help="Stop when the engine will not load on this Triton release (and GPU).",
        ),
    ] = None
    control: Annotated[
        bool,
        typer.Option("--control", help="Also publish NAME__dense and, of an engine, NAME__noflag, to compare with."),
    ] = False

    def plans(self) -> dict[str, Path | None]:
        """Return compute capability -> plan, `None` for one to build."""
        from repo_manager.engine import parse_for

        return parse_for(self.for_gpu or [])

    def model_configs(self) -> dict[str, str]:
        """Return name -> what the variant is."""
        from repo_manager.engine import parse_config_names

        return parse_config_names(self.model_config or [])

    def target(self) -> FitTarget | None:
        """Return the server that was named.

        Raises:
            UsageError: the release is not in the table, or the GPU kind has another form.
        """
        return None if self.for_server is None else parse_server(self.for_server)


def parse_server(text: str) -> FitTarget:
    """Read `26.07` or `26.07:9.0`.

    Raises:
        UsageError: another form, or the release is not in the table.
    """
    from repo_manager.engine import FitTarget, release_of_container, releases

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

    accelerator: Annotated[
        str | None,
        typer.Option("--accelerator", help="onnxruntime: tensorrt, to build and run an engine on the server's GPU."),
    ] = None
    engine_cache: Annotated[
        str | None,
        typer.Option("--engine-cache", metavar="DIR", help="Accelerator: a folder on the server that keeps engines."),
    ] = None
    accelerator_precision: Annotated[
        str | None,
        typer.Option("--accelerator-precision", help="Accelerator: fp32, fp16 or int8 [default: --precision]."),
    ] = None

    def accelerator_options(self, precision: Precision, engine: EngineOptions) -> AcceleratorOptions | None:
        """Return the library's options; `None` when no accelerator is asked for.

        Args:
            precision: of the version.
            engine: whose sparsity and workspace hold for the accelerator, too.

        Raises:
            UsageError: another accelerator, precision, or options of one without it.
        """
        from repo_manager.engine import AcceleratorOptions
        from repo_manager.types import Precision

        if self.accelerator is None:
            if self.engine_cache is not None or self.accelerator_precision is not None:
                raise UsageError("--engine-cache and --accelerator-precision go with --accelerator tensorrt")
            return None
        if self.accelerator != "tensorrt":
            raise UsageError(f"--accelerator {self.accelerator}: expected tensorrt")
        wanted = self.accelerator_precision
        allowed = ("fp32", "fp16", "int8")
        if wanted is not None and wanted not in allowed:
            raise UsageError(f"--accelerator-precision {wanted}: expected one of {', '.join(allowed)}")
        return AcceleratorOptions(
            precision=precision if wanted is None else Precision(wanted),
            workspace_bytes=engine.workspace_bytes,
            sparse=engine.sparse,
            engine_cache=self.engine_cache,
        )
