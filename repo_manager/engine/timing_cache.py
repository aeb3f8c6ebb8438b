"""Measured kernel times, kept between builds: one file per library version and GPU, merged by parallel builds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from repo_manager.engine.capabilities import Capabilities
from repo_manager.errors import InputError
from repo_manager.files import file_lock, write_atomic

__all__ = ["default_cache_path", "load_timing_cache", "merge_timing_cache"]


def default_cache_path(able: Capabilities, gpu: str) -> Path:
    """Return the timing cache's place in the user's cache folder.

    TensorRT combines caches of one version only, and times belong to one kind of GPU.

    Args:
        able: the library.
        gpu: the GPU's name and compute capability.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") or "unknown-gpu"
    return root / "repo-manager" / "timing" / f"{able.backend}-{able.version}" / f"{kind}.cache"


def load_timing_cache(config: Any, path: Path, *, required: bool = False) -> Any:
    """Make the configuration use the times in a file; an empty cache when there is none.

    Args:
        config: an `IBuilderConfig`.
        path: the file.
        required: fail when the file is missing or empty (`--deterministic`).

    Returns:
        The library's cache object, which the build fills.

    Raises:
        InputError: the file is not a timing cache of this TensorRT version and GPU, or is missing though
            required.
    """
    data = path.read_bytes() if path.is_file() else b""
    if required and not data:
        raise InputError(
            f"--deterministic: there is no timing cache at {path}",
            hint="Build once without --deterministic on this GPU; its times are then kept there.",
        )
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(
            f"{path}: not a timing cache of this TensorRT version and GPU",
            hint="Delete the file, or give another one by --timing-cache.",
        )
    return cache


def merge_timing_cache(config: Any, path: Path) -> int:
    """Add a build's times to the file, so that of two builds at once both leave theirs.

    Under a lock: what the file holds by now is read again, combined with ours, and replaces the file in one step.

    Args:
        config: the configuration of a finished build.
        path: the file; its folder is created.

    Returns:
        The file's new size in bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = config.get_timing_cache()
    with file_lock(path.with_name(path.name + ".lock")):
        if path.is_file():
            theirs = config.create_timing_cache(path.read_bytes())
            if theirs is not None:
                ours.combine(theirs, ignore_mismatch=False)
        data = bytes(ours.serialize())
        write_atomic(path, data)
    return len(data)
