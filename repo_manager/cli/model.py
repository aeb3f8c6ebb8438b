"""Commands on an ONNX file: inspect, prune, convert, add."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repo_manager.cli.options import (
    DryRun,
    JsonOutput,
    ModelFile,
    Quiet,
    Repository,
    parse_shapes,
    resolve_repository,
    writing,
)
from repo_manager.errors import UsageError
from repo_manager.types import Precision

__all__ = ["read_labels_file", "register"]

Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where to write.", show_default=False)]
PrecisionOption = Annotated[Precision, typer.Option("--precision", "-p", help="Compute precision of the version.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help="Representative inputs, needed for INT8: a .npz with one array per input, a folder of .npy "
        "files, a folder of images with its YAML, or module:function.",
        show_default=False,
    ),
]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option("--keep-fp32", metavar="PATTERN", help="Layers that stay in FP32 (may be given often)."),
]
MaxDrift = Annotated[
    float | None,
    typer.Option("--max-drift", min=0.0, help="Largest relative error of an output against the source."),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of an input with dynamic axes, e.g. ids:1,128."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(inspect)
    app.command("prune")(prune_command)
    app.command("convert")(convert_command)
    app.command("add")(add_command)


def inspect(
    model: ModelFile,
    shape: Shapes = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a one-file HTML page.")
    ] = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's inputs, outputs, size, and the 2:4 state of every weight."""
    from repo_manager.files import write_atomic
    from repo_manager.pipeline import inspect_model
    from repo_manager.report.tables import inspection_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    inspection = inspect_model(model, shapes=parse_shapes(shape) or None)
    if html is not None:
        from repo_manager.report.sparsity_html import sparsity_page

        with writing(html):
            write_atomic(html, sparsity_page(inspection.sparsity, title=model.name).encode())
        terminal.note(f"Page: {html}")
    terminal.result(inspection, *inspection_view(inspection))


def prune_command(
    model: ModelFile,
    output: Output,
    layers: Annotated[
        list[str] | None, typer.Option("--layers", metavar="PATTERN", help="Only these layers (may be given often).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Not these layers.")] = None,
    all_valid: Annotated[
        bool, typer.Option("--all-valid", help="Also layers that ASP leaves alone but whose shape allows 2:4.")
    ] = False,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Prune weights to 2:4 by magnitude, in one shot. Without retraining, accuracy suffers."""
    from repo_manager.onnx_model import load_model, save_model
    from repo_manager.report.tables import prune_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.sparsity import prune

    terminal = Terminal(as_json=json, quiet=quiet)
    source = load_model(model)
    proto, report = prune(source, layers=tuple(layers or ()), exclude=tuple(exclude or ()), all_valid=all_valid)
    if not dry_run:
        # What came with external data leaves with external data.
        with writing(output):
            save_model(proto, output, external=True if source.external_files else None)
    terminal.result(report, *prune_view(report, None if dry_run else output))
    terminal.warn(
        "magnitude pruning alone costs accuracy; retrain with the mask fixed to get it back "
        "(examples/README.md shows how)."
    )


def convert_command(
    model: ModelFile,
    output: Output,
    precision: PrecisionOption,
    calibration: Calibration = None,
    keep_fp32: KeepFp32 = None,
    auto_keep: Annotated[
        int, typer.Option("--auto-keep", min=0, help="Search up to N layers to keep so that the gate passes.")
    ] = 0,
    max_drift: MaxDrift = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model to another precision, and check the result before it is written."""
    from repo_manager.onnx_model import load_model, signature_of
    from repo_manager.precision import convert, load_calibration
    from repo_manager.report.tables import conversion_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    terminal.progress(f"Converting {model} to {precision}")
    source = load_model(model)
    data = None if calibration is None else load_calibration(calibration, signature_of(source))
    options = _convert_options(keep_fp32, auto_keep, max_drift)
    with writing(output):
        conversion = convert(source, precision, output, calibration=data, options=options)
    terminal.result(conversion, *conversion_view(conversion))


def add_command(
    model: ModelFile,
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="The model's name in Triton.")],
    repository: Repository = None,
    precision: PrecisionOption = Precision.FP32,
    calibration: Calibration = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="auto, onnxruntime, tensorrt or tensorrt_rtx.", show_default="auto"),
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option("--sparsity", help="Weights that are not 2:4: require (fail), report, or prune them."),
    ] = "report",
    max_batch_size: Annotated[
        int | None,
        typer.Option("--max-batch-size", min=0, help="0: no batching [default: 8 if the model has a batch axis]."),
    ] = None,
    instances: Annotated[int | None, typer.Option("--instances", min=1, help="Copies of the model to run.")] = None,
    instance_kind: Annotated[str, typer.Option("--instance-kind", help="auto, cpu or gpu.")] = "auto",
    queue_delay_us: Annotated[
        int, typer.Option("--queue-delay-us", min=0, help="How long a request may wait to be batched.")
    ] = 0,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="OUTPUT=FILE", help="Class names of an output, one a line."),
    ] = None,
    warmup: Annotated[bool, typer.Option("--warmup", help="Run a sample before the model is ready.")] = False,
    keep_fp32: KeepFp32 = None,
    auto_keep: Annotated[
        int, typer.Option("--auto-keep", min=0, help="Search up to N layers to keep so that the gate passes.")
    ] = 0,
    max_drift: MaxDrift = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="NAME:MIN:OPT:MAX", help="Engine: shapes of an input, e.g. x:1,8:4,8:16,8."),
    ] = None,
    sparse_tactics: Annotated[
        bool, typer.Option("--sparse/--no-sparse", help="Engine: offer 2:4 weights to sparse kernels.")
    ] = True,
    workspace: Annotated[
        int | None, typer.Option("--workspace", min=0, help="Engine: scratch memory of a kernel, in bytes.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="Engine: 0 (fast build) to 5.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="Engine: measured kernel times [default: cache]."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Engine: from the timing cache alone; a miss is an error.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engine: also for later versions of the same major one.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None,
        typer.Option("--hardware-compatibility", help="Engine: ampere_plus or same_compute_capability."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option("--compute-capability", metavar="8.9", help="TensorRT-RTX: the GPUs it is for [default: all]."),
    ] = None,
    strip: Annotated[bool, typer.Option("--strip", help="Engine: leave the weights out.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Engine: allow other weights later.")] = False,
    plan_detail: Annotated[
        str, typer.Option("--plan-detail", help="Engine: what it tells of its layers; evidence needs detailed.")
    ] = "detailed",
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Convert, check and publish a model as a new version. No server serves it until `deploy`."""
    from repo_manager.engine import EngineOptions, parse_shape_range
    from repo_manager.pipeline import AddOptions, SparsityMode, add
    from repo_manager.report.tables import added_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.settings import load_settings
    from repo_manager.triton_config import ConfigOptions

    terminal = Terminal(as_json=json, quiet=quiet)
    options = AddOptions(
        precision=precision,
        backend=backend or load_settings().backend,
        sparsity=_choice("--sparsity", sparsity, SparsityMode),
        calibration=calibration,
        config=ConfigOptions(
            max_batch_size=max_batch_size,
            instance_count=instances,
            instance_kind=instance_kind,
            max_queue_delay_us=queue_delay_us,
            labels=_read_labels(labels or []),
            warmup=warmup,
        ),
        engine=EngineOptions(
            shapes=dict(parse_shape_range(text) for text in profile or []),
            sparse=sparse_tactics,
            workspace_bytes=workspace,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
            deterministic=deterministic,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            compute_capabilities=tuple(compute_capability or ()),
            strip=strip,
            refit=refit,
            plan_detail=plan_detail,
        ),
        convert=_convert_options(keep_fp32, auto_keep, max_drift),
        dry_run=dry_run,
    )
    added = add(model, name, resolve_repository(repository), options, report=terminal.reporter())
    terminal.result(added, *added_view(added))


def _convert_options(keep_fp32: list[str] | None, auto_keep: int, max_drift: float | None) -> Any:
    from repo_manager.precision import ConvertOptions

    return ConvertOptions(keep_fp32=tuple(keep_fp32 or ()), auto_keep=auto_keep, max_drift=max_drift)


def _choice(option: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise UsageError(f"{option} {text}: expected one of {known}") from None


def _read_labels(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Read `--labels OUTPUT=FILE` options: one label a line."""
    labels: dict[str, tuple[str, ...]] = {}
    for text in texts:
        output, separator, path = text.partition("=")
        if not separator or not output or not path:
            raise UsageError(f"--labels {text}: expected OUTPUT=FILE")
        labels[output] = read_labels_file(Path(path))
    return labels


def read_labels_file(path: Path) -> tuple[str, ...]:
    """Read class labels, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: the labels cannot be read: {exc}") from exc
    return tuple(line.strip() for line in lines if line.strip())
