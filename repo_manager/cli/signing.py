"""Shared by commands with signatures: the key of an option, and a repository's signatures."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import typer

from repo_manager.cli.option_groups import grouped, option
from repo_manager.cli.options import DryRun, Output
from repo_manager.cli.repository_options import NamedVersion, RepositoryFlag
from repo_manager.errors import RepositoryError, UsageError
from repo_manager.report.repository_tables import signature_view
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.signing import SignatureCheck, SigningKey, check_signature, sign_version
from repo_manager.repository.signing_format import check_key
from repo_manager.repository.tags import resolve_version
from repo_manager.settings import load_settings
from repo_manager.triton_config.problems import Problem

__all__ = ["PASSWORD_VARIABLE", "app", "check_signatures", "signing_key"]


PASSWORD_VARIABLE = "REPO_MANAGER_KEY_PASSWORD"


def signing_key(
    path: Path | None,
    password_file: Path | None = None,
    certificate: Path | None = None,
    chain: tuple[Path, ...] = (),
) -> SigningKey | None:
    """Return the key of an option, tried before anything long is begun, or `None` when there is none.

    Args:
        path: private key in PEM. `None`: return `None`.
        password_file: file whose first line is the password. `None`: `$REPO_MANAGER_KEY_PASSWORD`, if set.
        certificate: the key's certificate in PEM. `None`: sign with the bare key.
        chain: certificates between `certificate` and its root.

    Raises:
        UsageError: it cannot sign.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    if path is None:
        return None
    key = SigningKey(path, _read_password(password_file), certificate, chain)
    check_key(key)
    return key


def _read_password(file: Path | None) -> str | None:
    """Return a key's password from a file's first line, else from the environment, or `None` when neither has one.

    Raises:
        UsageError: the file cannot be read.
    """
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE)
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
        root: folder of the model repository.
        name: one model, and the repository must have it. `None`: all models.
        keys: trusted public keys and root certificates. `None` or empty: those of the settings. If the settings have
            none either, nothing is checked.

    Returns:
        The valid signatures, and a problem for each version without one.
    """
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
                problems.append(
                    Problem(f"{model.name}/{entry.version}", exc.message, hint=exc.hint or "", rule="signature")
                )
    return checks, problems


# The `sign` command: sign a version.

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class KeyFlags:
    """The key, and its certificates."""

    key: Path = option(
        "--key", default=..., metavar="KEY.pem", help="Private elliptic curve key (P-256, P-384, P-521), PEM."
    )
    password_file: Path | None = option(
        "--password-file", metavar="FILE", help=f"The key's password [default: ${PASSWORD_VARIABLE}]."
    )
    certificate: Path | None = option("--certificate", metavar="CERT.pem", help="The key's certificate.")
    chain: list[Path] | None = option(
        "--chain", metavar="CERT.pem", help="Certificates between it and the root (may be given often)."
    )


@app.command("sign")
@grouped
def sign_command(
    named_version: NamedVersion, *, flags: KeyFlags, place: RepositoryFlag, dry_run: DryRun = False, output: Output
) -> None:
    """Sign a version in the OpenSSF model-signing format. No running server loads anything again for it."""
    if flags.chain and flags.certificate is None:
        raise UsageError("--chain belongs to --certificate", hint="Give the key's own certificate as well.")
    root = place.root()
    name, version = resolve_version(root, named_version)
    key = signing_key(flags.key, flags.password_file, flags.certificate, tuple(flags.chain or ()))
    result = sign_version(root, name, version, key or flags.key, dry_run=dry_run)
    output.terminal().result(result, *signature_view(result))
