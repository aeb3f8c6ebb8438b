"""What commands that sign, or check signatures, share: the key of an option, and a repository's signatures."""

from __future__ import annotations

import os
from pathlib import Path

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository import (
    Location,
    Problem,
    SignatureCheck,
    SigningKey,
    check_signature,
    find_model,
    scan,
)
from repo_manager.repository.signing_format import check_key
from repo_manager.settings import load_settings

__all__ = ["PASSWORD_VARIABLE", "check_signatures", "signing_key"]

PASSWORD_VARIABLE = "REPO_MANAGER_KEY_PASSWORD"


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
    key = SigningKey(path, _read_password(password_file), certificate, chain)
    check_key(key)
    return key


def _read_password(file: Path | None) -> str | None:
    """Return a key's password from a file's first line, else from the environment; `None` when neither has one.

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
        root: the repository.
        name: one model; `None`: all.
        keys: the keys to trust; empty: those of the settings; nothing is checked when these are empty too.

    Returns:
        The signatures that hold, and a problem for each version that has none that does.
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
                problems.append(Problem(f"{model.name}/{entry.version}", exc.message, hint=exc.hint or ""))
    return checks, problems
