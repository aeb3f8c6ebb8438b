"""The command for a look at an ONNX file: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import ModelFile, Output, check_outputs, parse_shapes, writing
from repo_manager.files import write_atomic
from repo_manager.pipeline.inspect import inspect_model
from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.report.tables import inspection_view

__all__ = ["app"]

app = typer.Typer()


@app.command("inspect")
@grouped
def inspect_command(
    model: ModelFile,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of an input with dynamic axes, e.g. ids:1,128."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a one-file HTML page.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Show a model's inputs, outputs, size, and the 2:4 state of every weight."""
    terminal = output.terminal()
    check_outputs(html)
    inspection = inspect_model(model, shapes=parse_shapes(shape) or None)
    if html is not None:
        with writing(html):
            write_atomic(html, sparsity_page(inspection.sparsity, title=model.name, pruned=inspection.pruned).encode())
        terminal.note(f"Page: {html}")
    terminal.result(inspection, *inspection_view(inspection))
