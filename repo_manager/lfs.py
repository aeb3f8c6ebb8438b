"""Git LFS pointers: small text files in place of a file until `git lfs pull` fetches it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from repo_manager.errors import InputError

__all__ = ["LFS_HINT", "LFS_MOST_BYTES", "LFS_POINTER", "is_lfs_pointer", "refuse_lfs_pointer"]

LFS_POINTER = "a Git LFS pointer, not the file itself"
LFS_HINT = "Fetch the file: git lfs pull"
LFS_MOST_BYTES = 1024
"""A pointer file is always smaller, by the format's specification."""
_LFS_START = b"version https://git-lfs"


def is_lfs_pointer(content: bytes) -> bool:
    """Return whether a file's first bytes are those of a Git LFS pointer, in place of a file not fetched yet."""
    return content.startswith(_LFS_START)


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer. An unreadable file passes.

    Raises:
        InputError: it is one.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        if is_lfs_pointer(file.read(len(_LFS_START))):
            raise InputError(f"{path} is {LFS_POINTER}", hint=LFS_HINT)
