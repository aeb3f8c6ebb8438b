"""Headers and tokens from files. Their content is never part of a message."""

from __future__ import annotations

import re
from pathlib import Path

from repo_manager.errors import UsageError

__all__ = ["check_header", "read_headers", "read_token"]

# RFC 9110, 5.6.2: a token, valid as a name in both protocols.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# gRPC metadata is printable ASCII. HTTP allows more, but one file serves both.
_VALUE = re.compile(r"[\x20-\x7e]*")


def check_header(name: str, value: str, where: str) -> None:
    """Check whether both protocols can carry a header.

    Args:
        name: letters, digits, hyphens and a few other signs (RFC 9110), without `-bin` at the end.
        value: printable ASCII or empty. Messages never have it.
        where: origin of the header, for messages.

    Raises:
        UsageError: they cannot. The message says neither name nor value when the name may be part of a secret.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{where}: expected `Name: value` with a name of letters, digits and hyphens")
    if name.lower().endswith("-bin"):
        raise UsageError(f"{where}: header {name} ends in -bin, which gRPC keeps for binary values")
    if not _VALUE.fullmatch(value):
        raise UsageError(f"{where}: the value of header {name} has characters other than printable ASCII")


def read_headers(path: Path) -> dict[str, str]:
    """Read `Name: value` lines. Blank lines and lines with `#` at the beginning do not count.

    Raises:
        UsageError: the file cannot be read, a line has another form, or a name comes twice.
    """
    headers: dict[str, str] = {}
    for number, line in enumerate(_read(path, "headers").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition(":")
        name, value = name.strip(), value.strip()
        where = f"{path}, line {number}"
        if not separator:
            raise UsageError(f"{where}: expected `Name: value`")
        check_header(name, value, where)
        if name.lower() in {each.lower() for each in headers}:
            raise UsageError(f"{where}: header {name} comes twice")
        headers[name] = value
    return headers


def read_token(path: Path) -> str:
    """Read a bearer token: the one line of a file.

    Raises:
        UsageError: the file cannot be read, or holds none or several lines.
    """
    lines = [line.strip() for line in _read(path, "the token").splitlines() if line.strip()]
    if len(lines) != 1:
        raise UsageError(f"{path}: expected one line with the token, found {len(lines)}")
    check_header("authorization", lines[0], str(path))
    return lines[0]


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: {what} cannot be read: it is not text") from exc
    except OSError as exc:
        raise UsageError(f"{path}: {what} cannot be read: {exc.strerror or exc}") from exc
