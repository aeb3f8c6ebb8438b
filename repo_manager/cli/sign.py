"""The command that signs a version: sign."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from repo_manager.cli.option_groups import grouped, option
from repo_manager.cli.options import DryRun, Output
from repo_manager.cli.repository_options import RepositoryFlag, Target
from repo_manager.cli.signing import PASSWORD_VARIABLE, signing_key
from repo_manager.errors import UsageError
from repo_manager.report.signing_tables import signature_view
from repo_manager.repository import resolve_version, sign_version

__all__ = ["app"]

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
    target: Target, *, flags: KeyFlags, place: RepositoryFlag, dry_run: DryRun = False, output: Output
) -> None:
    """Sign a version in the OpenSSF model-signing format. No running server loads anything again for it."""
    if flags.chain and flags.certificate is None:
        raise UsageError("--chain belongs to --certificate", hint="Give the key's own certificate as well.")
    root = place.root()
    name, version = resolve_version(root, target)
    key = signing_key(flags.key, flags.password_file, flags.certificate, tuple(flags.chain or ()))
    result = sign_version(root, name, version, key or flags.key, dry_run=dry_run)
    output.terminal().result(result, *signature_view(result))
