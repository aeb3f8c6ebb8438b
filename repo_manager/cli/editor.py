"""A person's editor, for `config --edit`."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import InputError, UsageError

__all__ = ["edited"]


@contextlib.contextmanager
def edited(text: str, *, name: str) -> Iterator[str]:
    """Give what a person makes of a text in `$VISUAL`, `$EDITOR` or vi.

    When the block refuses it, the person's text is kept, and the error says where.

    Args:
        text: what the editor shows.
        name: the file's name in the editor; its ending tells the editor the language.

    Raises:
        UsageError: the editor cannot be started, or it ended with an error; nothing of the text is used then.
    """
    folder = Path(tempfile.mkdtemp(prefix="repo-manager-edit-"))
    file = folder / name
    file.write_text(text, encoding="utf-8")
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.run([*shlex.split(command), str(file)], check=False).returncode
    except (OSError, ValueError) as exc:
        _discard(file)
        raise UsageError(
            f"The editor {command!r} cannot be started: {exc}", hint="Set $EDITOR, or use --file."
        ) from exc
    if status != 0:
        _discard(file)
        raise UsageError(f"The editor {command!r} ended with status {status}; nothing was changed")
    try:
        yield file.read_text(encoding="utf-8")
    except (InputError, UnicodeDecodeError) as exc:
        message = exc.message if isinstance(exc, InputError) else f"{name} is not UTF-8 text: {exc}"
        raise InputError(
            f"{message}\nYour text is kept in {file}",
            hint=f"Mend it there, then: repo-manager config NAME --file {file}",
        ) from exc
    _discard(file)


def _discard(file: Path) -> None:
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # an editor may have left something of its own beside it
        file.parent.rmdir()
