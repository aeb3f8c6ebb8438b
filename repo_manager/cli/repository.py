"""Commands that look at a repository: list, show, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.options import DryRun, JsonOutput, ModelName, Quiet, Repository, resolve_repository
from repo_manager.errors import RepositoryError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("list")(list_models)
    app.command("show")(show)
    app.command("verify")(verify_command)


def list_models(repository: Repository = None, json: JsonOutput = False, quiet: Quiet = False) -> None:
    """List the models of a repository: versions, what is served, backend."""
    from repo_manager.report.repository_tables import models_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import scan

    root = resolve_repository(repository)
    models = scan(root, deep=False)
    Terminal(as_json=json, quiet=quiet).result(models, *([] if json else models_view(root, models)))


def show(name: ModelName, repository: Repository = None, json: JsonOutput = False, quiet: Quiet = False) -> None:
    """Show one model: its versions, what each was made from, and what is served."""
    from repo_manager.report.repository_tables import model_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import find_model, model_state

    root = resolve_repository(repository)
    model, state = find_model(root, name), model_state(root, name)
    Terminal(as_json=json, quiet=quiet).result({"model": model, "state": state}, *model_view(model, state))


def verify_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model [default: all].")] = None,
    repository: Repository = None,
    digests: Annotated[bool, typer.Option(help="Read every file to compare its digest.")] = True,
    repair: Annotated[bool, typer.Option("--repair", help="First put right what can be put right.")] = False,
    copies: Annotated[
        list[str] | None, typer.Option("--copy", metavar="DIR|URL", help="Repositories to take damaged files from.")
    ] = None,
    signed_by: Annotated[
        list[Path] | None,
        typer.Option(
            "--signed-by",
            metavar="KEY.pub",
            help="Every version has to be signed by this key, or under this root certificate (may be given often) "
            "[default: the settings' signed_by].",
        ),
    ] = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Check a repository: layout, configurations, every file against its manifest, and signatures."""
    from repo_manager.cli.sign import check_signatures
    from repo_manager.report.repository_tables import problems_view, repairs_view
    from repo_manager.report.signing_tables import checks_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import Severity, parse_location, verify
    from repo_manager.repository import repair as repair_repository

    root = resolve_repository(repository)
    repairs = (
        repair_repository(root, name, copies=tuple(map(parse_location, copies or ())), dry_run=dry_run)
        if repair
        else ()
    )
    checks, unsigned = check_signatures(root, name, signed_by)
    problems = (*verify(root, name, digests=digests), *unsigned)
    views = [*repairs_view(repairs, dry_run=dry_run), *checks_view(checks), *problems_view(root, problems)]
    result = {"repairs": repairs, "signatures": checks, "problems": problems}
    Terminal(as_json=json, quiet=quiet).result(result, *views)
    errors = [problem for problem in problems if problem.severity is Severity.ERROR]
    if errors:
        raise RepositoryError(f"{root}: {len(errors)} problem(s) found", hint="See the list above.", is_shown=True)
