"""The declared state: apply, export."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.options import DryRun, JsonOutput, Quiet, Repository, Timeout, resolve_repository, writing
from repo_manager.cli.sign import signing_key
from repo_manager.errors import ChangesNeededError, UsageError

if TYPE_CHECKING:
    from repo_manager.declared import Servers
    from repo_manager.pipeline.apply import ApplyOptions
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import Location
    from repo_manager.server import ClientOptions

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("apply")(apply_command)
    app.command("export")(export_command)


@connecting
def apply_command(
    file: Annotated[
        Path, typer.Argument(metavar="repository.yaml", help="What the repository is to be; - for standard input.")
    ],
    repository: Repository = None,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove what is not declared.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 8 when there is something to change.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", help="Sign each new version with this private key.")
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help="Its password [default: $REPO_MANAGER_KEY_PASSWORD]."),
    ] = None,
    keep_previous: Annotated[
        bool, typer.Option("--keep-previous", help="Leave the previous version loaded, so that going back is instant.")
    ] = False,
    timeout: Timeout = 600.0,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    connection: Connection,
) -> None:
    """Bring a repository and its servers to what a YAML file declares; a second run changes nothing.

    An unchanged source is recognised by its digest and is not converted again. A model that fails keeps what it had,
    and the others are done all the same.
    """
    from repo_manager.declared import plan_declaration, planned, read_declaration
    from repo_manager.report.apply_tables import plan_view
    from repo_manager.report.terminal import Terminal

    if password_file is not None and sign is None:
        raise UsageError("--password-file belongs to --sign")
    terminal = Terminal(as_json=json, quiet=quiet)
    declaration = read_declaration(file)
    root, base = resolve_repository(repository), Path() if str(file) == "-" else file.resolve().parent
    named = [*declaration.targets, *(target for model in declaration.models.values() for target in model.targets or ())]
    connected = client_options(connection, [url for url in named if url.startswith(("grpc", "http"))])
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(_servers(root, base, connected, timeout, terminal))
        if check or dry_run:
            plans = plan_declaration(declaration, base, root, servers, prune=prune)
        else:
            plans = stack.enter_context(planned(declaration, base, root, servers, prune=prune))
        codes = [plan.exit_code for plan in plans if plan.error is not None]
        changes = any(plan.steps for plan in plans)
        if check or dry_run or not (changes or codes):
            terminal.result({"changes": changes, "models": plans}, *plan_view(plans))
            if codes or (check and changes):
                raise typer.Exit(max(codes, default=ChangesNeededError.exit_code))
            return
        terminal.show(*plan_view(plans))
        # Imported here: without changes nothing is converted, and a second run takes a second.
        from repo_manager.pipeline.apply import carry_out
        from repo_manager.report.apply_tables import apply_view

        options = _options(prune, sign, password_file, keep_previous=keep_previous, timeout_s=timeout)
        result = carry_out(plans, declaration, base, root, servers, options=options, report=terminal.reporter())
    terminal.result(result, *apply_view(result))
    if result.failed:
        raise typer.Exit(max(model.exit_code for model in result.failed) or 1)


def _options(
    prune: bool, sign: Path | None, password_file: Path | None, *, keep_previous: bool, timeout_s: float
) -> ApplyOptions:
    from repo_manager.pipeline.apply import ApplyOptions
    from repo_manager.rollout import RolloutOptions
    from repo_manager.settings import load_settings

    key = signing_key(sign, password_file)
    rollout = RolloutOptions(keep_previous=keep_previous, load_timeout_s=timeout_s, signed_by=load_settings().signed_by)
    return ApplyOptions(prune=prune, sign=key, rollout=rollout)


def _servers(root: Location, base: Path, options: ClientOptions, timeout_s: float, terminal: Terminal) -> Servers:
    from repo_manager.declared import Servers

    def start() -> str:
        from repo_manager.pipeline.serving import ensure_server

        return ensure_server(root, None, timeout_s=timeout_s, report=terminal.note).url

    return Servers(root, base, options, start)


def export_command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="repository.yaml", help="Where to write [default: stdout].")
    ] = None,
    repository: Repository = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Write a repository as the YAML file that `apply` takes: applying it changes nothing."""
    from repo_manager.declared.export import document_text, export_document
    from repo_manager.files import write_atomic
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    if output is not None and output.exists():
        raise UsageError(f"{output} exists already", hint="Choose another name, or remove it first.")
    document, notes = export_document(resolve_repository(repository))
    for note in notes:
        terminal.warn(note)
    if output is not None:
        with writing(output):
            write_atomic(output, document_text(document).encode())
        terminal.note(f"Written: {output}")
    if json:
        terminal.result(document)
    elif output is None:
        typer.echo(document_text(document), nl=False)
