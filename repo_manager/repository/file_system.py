"""Errors of the file system in words, and copying with a digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.types import Digest

__all__ = ["check_source", "copy_durably", "disk_errors", "write_durably"]

_CHUNK_BYTES = 4 << 20
_HINTS = {
    errno.ENOSPC: "The disk is full. Free some space, then run the command again.",
    errno.EDQUOT: "The disk quota is used up. Free some space, then run the command again.",
    errno.EROFS: "The file system is read-only. Mount it for writing.",
    errno.EACCES: "This user lacks the permission. Correct the permissions, or run as the owner.",
    errno.EPERM: "This user lacks the permission. Correct the permissions, or run as the owner.",
    errno.ESTALE: "The network file system went away. Mount it again.",
    errno.EIO: "The disk reports an error. Check it before going on.",
    errno.ENOTCONN: "The network file system went away. Mount it again.",
    errno.ENOLCK: "This file system has no locks. Mount it with locking, or keep the repository elsewhere.",
}


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `RepositoryError` with the action under way.

    Args:
        action: for instance `publish model m`.
    """
    try:
        yield
    except OSError as exc:
        path = exc.filename2 or exc.filename
        where = f" at {os.fsdecode(path)}" if isinstance(path, str | bytes | os.PathLike) else ""
        hint = _HINTS.get(exc.errno or 0)
        raise RepositoryError(f"cannot {action}: {exc.strerror or exc}{where}", hint=hint) from exc


def check_source(source: Path) -> None:
    """Check for a regular file, or a link to one, before a copy.

    Raises:
        RepositoryError: it is missing, a folder, a device, a pipe.
    """
    if not source.is_file():
        raise RepositoryError(f"{source} is not a regular file", hint="Give an existing file.")


def copy_durably(source: Path, target: Path) -> tuple[Digest, int]:
    """Copy a file's content and make it durable.

    Args:
        source: a regular file, or a link to one.
        target: must not exist. Its folder must.

    Returns:
        Digest and size in bytes of the written content.

    Raises:
        RepositoryError: `source` is not a regular file (a device, a pipe, a folder).
        OSError: it cannot be read or written.
    """
    check_source(source)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb", buffering=0) as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            _write_all(writer.fileno(), chunk, target)
        os.fsync(writer.fileno())
    return Digest("sha256:" + digest.hexdigest()), size


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and make its content durable.

    Raises:
        OSError: it exists, or cannot be written.
    """
    with path.open("xb", buffering=0) as writer:
        _write_all(writer.fileno(), data, path)
        os.fsync(writer.fileno())


def _write_all(descriptor: int, data: bytes, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as exc:
        exc.filename = str(path)  # os.write does not name the file
        raise
