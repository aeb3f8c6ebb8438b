"""Commands for another ONNX file: prune, convert."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    import onnx

from repo_manager.accuracy import AccuracyGate, AccuracyOptions, load_evaluator
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, ModelFile, Output, RuntimeFlags, check_outputs, parse_shapes, writing
from repo_manager.errors import UsageError
from repo_manager.files import document, work_folder, write_atomic
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.runtime import start_runtime
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.precision import ConvertOptions, convert, load_calibration
from repo_manager.pruning import PruneOptions, metric_of, prune_with_data
from repo_manager.report.progress import share_bar
from repo_manager.report.prune_tables import prune_view
from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.report.tables import conversion_view, format_bytes
from repo_manager.sparsity import PruneReport, prune, sparsity_report
from repo_manager.types import Precision, as_json

__all__ = ["AccuracyFlags", "ConversionFlags", "PrecisionOption", "app"]


# Conversion options, shared by every command that converts.

PrecisionOption = Annotated[Precision, typer.Option("--precision", "-p", help="Compute precision of the version.")]


@dataclasses.dataclass(frozen=True)
class ConversionFlags:
    """Calibration data, gates and exceptions."""

    PANEL: ClassVar[str] = "Conversion"
    calibration: str | None = option(
        "--calibration",
        metavar="DATA",
        help="Representative inputs, required for INT8: a .npz with one array per input, a folder of .npy files, a "
        "folder of images with its YAML, or module:function.",
    )
    shape: list[str] | None = option(
        "--shape",
        metavar="NAME:SIZES",
        sets=(ConvertOptions, "shapes"),
        read=lambda texts: parse_shapes(texts),
        help="Fix the sizes of an input for the conversion, if the model runs only with some, e.g. input:1,512 (may "
        "be given often). The served model still takes any size.",
    )
    keep_fp32: list[str] | None = option(
        "--keep-fp32",
        metavar="PATTERN",
        sets=(ConvertOptions, "keep_fp32"),
        help="Layers to leave in FP32 (may be given often).",
    )
    auto_keep: int = option(
        "--auto-keep",
        sets=(ConvertOptions, "auto_keep"),
        min=0,
        help="Find up to N layers to keep in FP32, so the gate passes.",
    )
    allow_unchanged: bool = option(
        "--allow-unchanged",
        sets=(ConvertOptions, "allow_unchanged"),
        help="Publish even if no layer could become INT8.",
    )
    max_drift: float | None = option(
        "--max-drift",
        sets=(ConvertOptions, "max_drift"),
        min=0.0,
        help="Largest relative error of an output against the source [default: the precision's].",
    )

    def convert_options(self) -> ConvertOptions:
        """Return the library's options."""
        return ConvertOptions(**settings_of(ConvertOptions, self))


@dataclasses.dataclass(frozen=True)
class AccuracyFlags:
    """Held-out data with known answers, and limits for the result."""

    PANEL: ClassVar[str] = "Accuracy"
    evaluated_on: str | None = option(
        "--eval",
        metavar="DATA",
        help="Held-out data for an accuracy score: FILE.npz:LABELS (an array per input, and class "
        "numbers as LABELS), FILE.npz:LABELS:OUTPUT for one of several outputs, or module:function, called with a "
        "function that runs the model.",
    )
    min_accuracy: float | None = option(
        "--min-accuracy", metavar="SHARE", help="With --eval: smallest accepted accuracy, e.g. 0.98."
    )
    max_accuracy_drop: float | None = option(
        "--max-accuracy-drop",
        metavar="SHARE",
        min=0.0,
        help="With --eval: largest accepted loss of accuracy against the source (tune: today's configuration), "
        "e.g. 0.005.",
    )

    def accuracy_options(self) -> AccuracyOptions | None:
        """Return the library's options, or `None` without data.

        Raises:
            UsageError: there is a limit and no data.
        """
        if self.evaluated_on is not None:
            return AccuracyOptions(self.evaluated_on, self.min_accuracy, self.max_accuracy_drop)
        if self.min_accuracy is not None or self.max_accuracy_drop is not None:
            raise UsageError(
                "--min-accuracy and --max-accuracy-drop need data to measure on", hint="Give --eval FILE.npz:LABELS."
            )
        return None


app = typer.Typer()
OutputFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where to write.", show_default=False)
]


@dataclasses.dataclass(frozen=True)
class PruneFlags:
    """Layers to prune, and the method."""

    layers: list[str] | None = option(
        "--layers", metavar="PATTERN", sets=(PruneOptions, "layers"), help="Only these layers (may be given often)."
    )
    exclude: list[str] | None = option(
        "--exclude",
        "--keep-dense",
        metavar="PATTERN",
        sets=(PruneOptions, "exclude"),
        help="Skip these layers (may be given often).",
    )
    all_valid: bool = option(
        "--all-valid",
        sets=(PruneOptions, "all_valid"),
        help="Also prune layers ASP skips but whose shape allows 2:4.",
    )
    calibration: str | None = option(
        "--calibration",
        metavar="DATA",
        help="Representative inputs to solve each layer on and to judge the result: a .npz with one array "
        "per input, a folder of .npy files, a folder of images with its YAML, or module:function.",
    )
    max_drift: float | None = option(
        "--max-drift",
        sets=(PruneOptions, "max_drift"),
        min=0.0,
        help="Largest relative error of the outputs on held-out samples, with 95 % confidence. Prunes as much compute "
        "as it allows [default: prune every layer].",
    )
    metric: str | None = option(
        "--metric",
        metavar="DATA",
        help="Your own metric, in the forms of --eval: FILE.npz:LABELS[:OUTPUT], or module:function, called with a "
        "function that runs the model. Prunes as much compute as --max-loss allows.",
    )
    max_loss: float = option(
        "--max-loss", sets=(PruneOptions, "max_loss"), min=0.0, help="Largest accepted loss of the metric."
    )
    permute: bool = option(
        "--permute",
        sets=(PruneOptions, "permute"),
        help="Reorder channels first, so large weights do not share a group of four.",
    )
    distill: bool = option(
        "--distill",
        sets=(PruneOptions, "distill"),
        help="Then train the remaining values in PyTorch, masks fixed, against the dense model's outputs.",
    )
    epochs: int = option(
        "--epochs", sets=(PruneOptions, "epochs"), min=1, help="With --distill: how often each sample is trained on."
    )
    work: Path | None = option(
        "--work",
        metavar="FOLDER",
        sets=(PruneOptions, "work"),
        help="Folder for solved layers, so a stopped command can resume.",
    )
    seed: int = option(
        "--seed", sets=(PruneOptions, "seed"), min=0, help="Seed of the random sampling of large activations."
    )
    html: Path | None = option("--html", metavar="FILE", help="Also write the report as a one-file HTML page.")


@app.command("prune")
@grouped
def prune_command(
    model: ModelFile,
    target: OutputFile,
    *,
    flags: PruneFlags,
    accuracy: AccuracyFlags,
    _runtime: RuntimeFlags,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Prune weights to 2:4, without retraining.

    With calibration data each layer is solved so that its outputs change least, and the model's answers are compared
    on inputs held out. Without data the smallest weights are removed, and accuracy suffers.
    """
    terminal = output.terminal()
    _check_target(model, target)
    check_outputs(flags.html)
    wanted = accuracy.accuracy_options()
    source, options = load_model(model), PruneOptions(**settings_of(PruneOptions, flags))
    gate = None if wanted is None else AccuracyGate.of(wanted, source)
    if flags.calibration is None:
        if options.has_budget or flags.metric is not None or options.permute or options.distill:
            raise UsageError("a budget, --permute and --distill need --calibration DATA: the layers are solved on it")
        proto, report = prune(source, layers=options.layers, exclude=options.exclude, all_valid=options.all_valid)
    else:
        signature = signature_of(source)
        data = load_calibration(flags.calibration, signature)
        if flags.metric is not None:
            metric = metric_of(load_evaluator(flags.metric, signature, model=source))
            options = dataclasses.replace(options, metric=metric)
        with share_bar(terminal, "Pruning") as progress:
            proto, report = prune_with_data(source, data, options, progress)
    external = True if source.external_files else None  # external data stays external
    with writing(target):
        if gate is not None:
            found = gate.save(proto, target, external=external, keep=not dry_run)
            report = dataclasses.replace(report, accuracy=found)
        elif not dry_run:
            save_model(proto, target, external=external)
    if flags.html is not None:
        _write_page(flags.html, proto, report, target.name)
        terminal.note(f"Page: {flags.html}")
    terminal.result(report, *prune_view(report, None if dry_run else target))
    if flags.calibration is None:
        terminal.warn(
            "magnitude pruning alone costs accuracy; give --calibration DATA, or retrain with the mask fixed "
            f"({document('sparsity.md')} shows how)."
        )


@app.command("convert")
@grouped
def convert_command(
    model: ModelFile,
    target: OutputFile,
    precision: PrecisionOption,
    *,
    conversion: ConversionFlags,
    accuracy: AccuracyFlags,
    _runtime: RuntimeFlags,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Convert a model to another precision, and check the result before it is written."""
    terminal = output.terminal()
    _check_target(model, target)
    wanted = accuracy.accuracy_options()
    terminal.progress(f"Converting {model} to {precision}")
    start_runtime()
    source = load_model(model)
    data = None if conversion.calibration is None else load_calibration(conversion.calibration, signature_of(source))
    judge = None if wanted is None else AccuracyGate.of(wanted, source).judge
    with contextlib.ExitStack() as stack:
        place = target
        if dry_run:
            place = stack.enter_context(work_folder("repo-manager-convert-")) / target.name
        stack.enter_context(writing(place))
        options = conversion.convert_options()
        result = convert(source, precision, place, calibration=data, options=options, judge=judge)
        size = sum(file.stat().st_size for file in result.files)
        if dry_run:
            result = dataclasses.replace(result, files=())
    terminal.result(result, *conversion_view(result))
    terminal.note(
        f"Dry run: {target} was not written ({format_bytes(size)})."
        if dry_run
        else f"Written: {', '.join(map(str, result.files))} ({format_bytes(size)})."
    )


def _write_page(path: Path, proto: onnx.ModelProto, report: PruneReport, title: str) -> None:
    with writing(path):
        write_atomic(path, sparsity_page(sparsity_report(proto), title=title, pruned=as_json(report)).encode())


def _check_target(model: Path, target: Path) -> None:
    """Check the output: it must be writable and must not replace its source.

    Raises:
        UsageError: it would.
        InputError: it cannot be written.
    """
    if target.exists() and model.exists() and target.samefile(model):
        raise UsageError(
            f"--output {target} is the source itself", hint="Name another file. The source is never replaced."
        )
    check_outputs(target)
