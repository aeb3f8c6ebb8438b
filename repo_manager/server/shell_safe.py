"""Paths that Triton's Python backend can start its stub with.

Triton 2.51 starts the stub by a shell command into which it writes the model's path as it is
(`StubLauncher::Launch` in triton-inference-server/python_backend): a blank in it shifts the stub's
arguments, the stub dies with `stol`, and the load never returns; other characters would be run. Such a
path gets a link with a plain name.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from repo_manager.errors import ServerError
from repo_manager.server.paths import cache_directory

__all__ = ["shell_safe"]

_PLAIN = re.compile(r"[A-Za-z0-9_./+:@%,=-]+")


def shell_safe(path: Path) -> Path:
    """Return `path`, or a link to it where its name would be misread by a shell.

    Args:
        path: an absolute path. The link lies in the user's cache, or in a folder of the user's own below
            `/tmp` when the cache's path is no better; the same path always gets the same link.

    Raises:
        ServerError: the folder below `/tmp` belongs to another user.
        OSError: no link can be made.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    folder = cache_directory() / "links"
    if not _PLAIN.fullmatch(str(folder)):
        folder = Path(f"/tmp/repo-manager-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ServerError(f"{folder} belongs to another user", hint="Set XDG_CACHE_HOME to a folder without blanks.")
    link = folder / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    if not (link.is_symlink() and link.readlink() == path):
        temporary = folder / f".{link.name}.{os.getpid()}"
        temporary.symlink_to(path)
        temporary.replace(link)
    return link
