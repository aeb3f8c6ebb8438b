"""Where the embedded server keeps its files: the user's cache, never the model repository."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from repo_manager.errors import RepositoryError

__all__ = ["cache_directory", "kept_files", "log_directory", "record_directory"]


def kept_files(folder: str, pattern: str) -> list[Path]:
    """Return files kept in a folder of the cache, in no order. None where there is no such folder.

    Read-only commands make no folder, so they work where the cache cannot be written.

    Args:
        folder: name of the folder below `cache_directory`.
        pattern: file pattern, as for `Path.glob`.

    Raises:
        RepositoryError: the cache belongs to another user.
    """
    return list((cache_directory() / folder).glob(pattern)) if (_cache() / folder).is_dir() else []


def cache_directory() -> Path:
    """Return `$XDG_CACHE_HOME/repo-manager`, created when missing. Nobody but its owner may enter it.

    Servers run its files and it holds their keys, so another user's folder is not used.

    Raises:
        RepositoryError: it belongs to another user, or cannot be made.
    """
    folder = _made(_cache())
    found = folder.stat()
    if os.geteuid() and found.st_uid not in (os.geteuid(), 0):
        raise RepositoryError(
            f"The cache folder {folder} belongs to another user (uid {found.st_uid})",
            hint="Set XDG_CACHE_HOME to a folder of your own.",
        )
    if stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == os.geteuid():
        try:
            folder.chmod(0o700)
        except OSError as exc:
            if exc.errno != errno.EROFS:
                raise
    return folder


def _cache() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification ignores relative paths.
    base = Path(configured) if configured and Path(configured).is_absolute() else Path.home() / ".cache"
    return base / "repo-manager"


def record_directory() -> Path:
    """Return the folder of the running servers' records, created when missing."""
    return _made(cache_directory() / "servers")


def sealed_directory() -> Path:
    """Return the folder of the private copies that servers read, created when missing."""
    return _made(cache_directory() / "sealed")


def log_directory() -> Path:
    """Return the folder of the servers' logs, created when missing."""
    return _made(cache_directory() / "logs")


def _made(folder: Path) -> Path:
    """Make a folder where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise RepositoryError(
            f"The cache folder {folder} cannot be made: {exc.strerror or exc}",
            hint="Set XDG_CACHE_HOME to a writable folder.",
        ) from exc
    return folder
