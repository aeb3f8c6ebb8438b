"""Commands on an ONNX file: inspect, prune, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.conversion_options import ConversionFlags, PrecisionOption
from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import DryRun, JsonOutput, ModelFile, Quiet, parse_shapes, writing
from repo_manager.errors import UsageError

__all__ = ["read_labels_file", "register"]

Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where to write.", show_default=False)]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of an input with dynamic axes, e.g. ids:1,128."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(inspect)
    app.command("prune")(prune_command)
    app.command("convert")(convert_command)


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


@grouped
def convert_command(
    model: ModelFile,
    output: Output,
    precision: PrecisionOption,
    conversion: ConversionFlags,
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
    data = None if conversion.calibration is None else load_calibration(conversion.calibration, signature_of(source))
    with writing(output):
        result = convert(source, precision, output, calibration=data, options=conversion.convert_options())
    terminal.result(result, *conversion_view(result))


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
