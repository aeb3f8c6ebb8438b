"""The declared state: apply."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_outputs, writing
from repo_manager.cli.repository_options import RepositoryFlag
from repo_manager.cli.rollout_options import RolloutFlags
from repo_manager.cli.signing import signing_key
from repo_manager.declared import Declaration, ModelPlan, Servers, plan_declaration, planned, read_declaration
from repo_manager.declared.export import document_text, export_document
from repo_manager.errors import ChangesNeededError, UsageError
from repo_manager.files import write_atomic
from repo_manager.pipeline.apply import ApplyOptions, carry_out, fetching
from repo_manager.pipeline.background import ensure_server
from repo_manager.report.added_view import apply_plan_view, apply_view
from repo_manager.report.terminal import Terminal
from repo_manager.repository.location import Location
from repo_manager.rollout.options import RolloutOptions
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import load_settings

__all__ = ["app"]


app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class ApplyFlags:
    """The scope of the change."""

    prune: bool = option("--prune", sets=(ApplyOptions, "prune"), help="Also remove undeclared models and versions.")
    check: bool = option("--check", default=False, help="Change nothing. Exit code 8 if there is something to change.")
    dry_run: bool = option("--dry-run", default=False, help="Show the planned changes without making them.")
    allow_code: bool = option(
        "--allow-code",
        sets=(ApplyOptions, "allow_code"),
        help="Allow calls of functions named in the file as calibration (module:function).",
    )
    sign: Path | None = option("--sign", metavar="KEY.pem", help="Sign each new version with this private key.")
    password_file: Path | None = option(
        "--password-file", metavar="FILE", help="A file with the key's password [default: $REPO_MANAGER_KEY_PASSWORD]."
    )

    def apply_options(self, rollout: RolloutFlags) -> ApplyOptions:
        """Return the library's options.

        Raises:
            UsageError: a password without a key, or a key unfit for signing.
        """
        if self.password_file is not None and self.sign is None:
            raise UsageError("--password-file belongs to --sign")
        return ApplyOptions(
            **settings_of(ApplyOptions, self),
            sign=signing_key(self.sign, self.password_file),
            code_modules=load_settings().code_modules,
            rollout=RolloutOptions(**rollout.settings(), signed_by=load_settings().signed_by),
        )


@app.command("apply")
@grouped
def apply_command(
    file: Annotated[Path, typer.Argument(metavar="repository.yaml", help="The declared state; - for standard input.")],
    *,
    place: RepositoryFlag,
    flags: ApplyFlags,
    rollout: RolloutFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Bring a repository and its servers to what a YAML file declares. A second run changes nothing.

    An unchanged source is recognised by its digest and is not converted again. A failed model keeps its previous
    state, and the other models are still done.
    """
    options = flags.apply_options(rollout)
    terminal = output.terminal()
    declaration = read_declaration(file)
    root, base = place.root(), Path() if str(file) == "-" else file.resolve().parent
    connected = client_options(connection, _urls(declaration))
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(_servers(root, base, connected, rollout.load_timeout_s, terminal))
        fetch = stack.enter_context(fetching(terminal.reporter()))
        what = declaration, base, root, servers
        if flags.check or flags.dry_run:
            signs = options.sign is not None
            plans = plan_declaration(*what, prune=flags.prune, fetch=fetch, rollout=options.rollout, signs=signs)
            _show_plans(terminal, plans, is_check=flags.check)
            return
        plans = stack.enter_context(planned(*what, prune=flags.prune, fetch=fetch, rollout=options.rollout))
        if not any(plan.steps or plan.error is not None for plan in plans):
            _show_plans(terminal, plans, is_check=False)
            return
        terminal.show(*apply_plan_view(plans))
        result = carry_out(plans, *what, options=options, report=terminal.reporter())
    terminal.result(result, *apply_view(result))
    if result.failed:
        raise typer.Exit(max(model.exit_code for model in result.failed) or 1)


def _show_plans(terminal: Terminal, plans: tuple[ModelPlan, ...], *, is_check: bool) -> None:
    """Print plans as a command's result.

    Raises:
        Exit: a model cannot be planned, or a check found something to change.
    """
    codes = [plan.exit_code for plan in plans if plan.error is not None]
    changes = any(plan.steps for plan in plans)
    terminal.result({"changes": changes, "models": plans}, *apply_plan_view(plans))
    if codes or (is_check and changes):
        raise typer.Exit(max(codes, default=ChangesNeededError.exit_code))


def _urls(declaration: Declaration) -> list[str]:
    """Return the servers named by their URL."""
    named = [*declaration.targets, *(target for model in declaration.models.values() for target in model.targets or ())]
    return [url for url in named if url.startswith(("grpc", "http"))]


def _servers(root: Location, base: Path, options: ClientOptions, timeout_s: float, terminal: Terminal) -> Servers:
    def start() -> str:
        return ensure_server(root, None, timeout_s=timeout_s, report=terminal.note).url

    return Servers(root, base, options, start)


# The `export` command: write the declaration of a repository.


@app.command("export")
@grouped
def export_command(
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="repository.yaml", help="Where to write \\[default: stdout]."),
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            "--sources",
            metavar="DIR",
            help="Folder with the ONNX files and calibration data of the models, found by digest (may be given often).",
        ),
    ] = None,
    *,
    place: RepositoryFlag,
    output: Output,
) -> None:
    """Write a repository as the YAML file that `apply` takes: applying it changes nothing.

    With the sources beside the file, or in --sources, applying it to an empty repository rebuilds the models.
    """
    terminal = output.terminal()
    if file is not None and file.exists():
        raise UsageError(f"{file} exists already", hint="Choose another name, or remove it first.")
    check_outputs(file)
    base = Path() if file is None else file.parent
    missing = [folder for folder in sources or () if not folder.is_dir()]
    if missing:
        raise UsageError(f"--sources {missing[0]}: the folder does not exist")
    document, notes = export_document(place.root(), base=base, sources=sources or ())
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
