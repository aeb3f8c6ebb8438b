"""Where the embedded server keeps its files: the user's cache, never the model repository."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory", "log_directory", "record_directory"]


def cache_directory() -> Path:
    """Return `$XDG_CACHE_HOME/repo-manager`, created when missing (readable by its owner only).

    Raises:
        OSError: it cannot be created.
    """
    configured = os.environ.get("XDG_CACHE_HOME")
    # The specification has a relative value ignored.
    base = Path(configured) if configured and Path(configured).is_absolute() else Path.home() / ".cache"
    folder = base / "repo-manager"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def record_directory() -> Path:
    """Return the folder of the running servers' records, created when missing."""
    folder = cache_directory() / "servers"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def log_directory() -> Path:
    """Return the folder of the servers' logs, created when missing."""
    folder = cache_directory() / "logs"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder
