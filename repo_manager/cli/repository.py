"""Commands that look at a repository: list, show."""

from __future__ import annotations

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import ModelName, RepositoryFlag
from repo_manager.report.repository_tables import model_view, models_view
from repo_manager.repository import find_model, model_state, scan

__all__ = ["app"]

app = typer.Typer()


@app.command("list")
@grouped
def list_command(place: RepositoryFlag, output: Output) -> None:
    """List the models of a repository: versions, what is served, backend."""
    root = place.root()
    models = scan(root, deep=False)
    output.terminal().result(models, *([] if output.json else models_view(root, models)))


@app.command("show")
@grouped
def show_command(name: ModelName, place: RepositoryFlag, output: Output) -> None:
    """Show one model: its versions, what each was made from, and what is served."""
    root = place.root()
    model, state = find_model(root, name), model_state(root, name)
    output.terminal().result({"model": model, "state": state}, *model_view(model, state))
