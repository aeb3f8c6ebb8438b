"""A repository as its declaration: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import Output, writing
from repo_manager.cli.repository_options import RepositoryFlag
from repo_manager.declared.export import document_text, export_document
from repo_manager.errors import UsageError
from repo_manager.files import write_atomic

__all__ = ["app"]

app = typer.Typer()


@app.command("export")
@grouped
def export_command(
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="repository.yaml", help="Where to write; without it to stdout."),
    ] = None,
    *,
    place: RepositoryFlag,
    output: Output,
) -> None:
    """Write a repository as the YAML file that `apply` takes: applying it changes nothing."""
    terminal = output.terminal()
    if file is not None and file.exists():
        raise UsageError(f"{file} exists already", hint="Choose another name, or remove it first.")
    document, notes = export_document(place.root())
    for note in notes:
        terminal.warn(note)
    if file is not None:
        with writing(file):
            write_atomic(file, document_text(document).encode())
        terminal.note(f"Written: {file}")
    if output.json:
        terminal.result(document)
    elif file is None:
        typer.echo(document_text(document), nl=False)
