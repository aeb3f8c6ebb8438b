"""Signing versions: the command, and what `verify` and `add` need of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import DryRun, JsonOutput, Quiet, Repository, resolve_repository
from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from repo_manager.repository import Location, Problem, SignatureCheck, SigningKey

__all__ = ["check_signatures", "register", "signing_key"]

_PASSWORD_VARIABLE = "REPO_MANAGER_KEY_PASSWORD"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("sign")(sign_command)


def sign_command(
    target: Annotated[
        str,
        typer.Argument(metavar="NAME[:VERSION]", help="A number or a tag; without one the newest.", show_default=False),
    ],
    key: Annotated[
        Path,
        typer.Option("--key", metavar="KEY.pem", help="Private elliptic curve key (P-256, P-384, P-521), PEM."),
    ],
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help=f"The key's password [default: ${_PASSWORD_VARIABLE}]."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="CERT.pem", help="The key's certificate.")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option("--chain", metavar="CERT.pem", help="Certificates between it and the root (may be given often)."),
    ] = None,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Sign a version in the OpenSSF model-signing format. No running server loads anything again for it."""
    from repo_manager.report.signing_tables import signature_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import resolve_version, sign_version

    if chain and certificate is None:
        raise UsageError("--chain belongs to --certificate", hint="Give the key's own certificate as well.")
    root = resolve_repository(repository)
    name, version = resolve_version(root, target)
    with_what = signing_key(key, password_file, certificate, tuple(chain or ()))
    result = sign_version(root, name, version, with_what or key, dry_run=dry_run)
    Terminal(as_json=json, quiet=quiet).result(result, *signature_view(result))


def signing_key(
    path: Path | None,
    password_file: Path | None = None,
    certificate: Path | None = None,
    chain: tuple[Path, ...] = (),
) -> SigningKey | None:
    """Return the key of an option, tried before anything long is begun; `None` when there is none.

    Raises:
        UsageError: it cannot sign.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    if path is None:
        return None
    from repo_manager.repository import SigningKey
    from repo_manager.repository.signing_format import check_key

    key = SigningKey(path, _read_password(password_file), certificate, chain)
    check_key(key)
    return key


def _read_password(file: Path | None) -> str | None:
    """Return a key's password from a file's first line, else from the environment; `None` when neither has one.

    Raises:
        UsageError: the file cannot be read.
    """
    if file is None:
        return os.environ.get(_PASSWORD_VARIABLE)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--password-file {file}: it cannot be read: {reason}") from exc
    return lines[0] if lines else ""


def check_signatures(
    root: Location, name: str | None, keys: list[Path] | None
) -> tuple[list[SignatureCheck], list[Problem]]:
    """Check every version's signature, of one model or of all.

    Args:
        root: the repository.
        name: one model; `None`: all.
        keys: the keys to trust; empty: those of the settings; nothing is checked when these are empty too.

    Returns:
        The signatures that hold, and a problem for each version that has none that does.
    """
    from repo_manager.errors import RepositoryError
    from repo_manager.repository import Problem, check_signature, find_model, scan
    from repo_manager.settings import load_settings

    trusted = tuple(keys or ()) or load_settings().signed_by
    checks: list[SignatureCheck] = []
    problems: list[Problem] = []
    if not trusted:
        return checks, problems
    for model in scan(root, deep=False) if name is None else [find_model(root, name)]:
        for entry in model.versions:
            try:
                checks.append(check_signature(root, model.name, entry.version, trusted))
            except RepositoryError as exc:
                problems.append(Problem(f"{model.name}/{entry.version}", exc.message, hint=exc.hint or ""))
    return checks, problems
