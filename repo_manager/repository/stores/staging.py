"""Where a version is put together before one rename makes it visible.

The staging area lies on the repository's file system, because only there a rename is atomic, and outside its root,
because Triton takes every folder in the root for a model: `../.ROOTNAME.staging`. Where that is impossible (the root
is a mount point, or its parent is not writable) it is `ROOT/.repo-manager.staging`, which exists only while a command
runs; Triton in explicit mode, the only mode that this project uses, does not look at it.

Each command works in a folder of its own beside a lock file that it holds. The kernel drops the lock when the command
dies, and the next command removes what is then left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory

__all__ = ["STAGING_IN_ROOT", "discard", "staged", "sweep"]

STAGING_IN_ROOT = ".repo-manager.staging"
_ENTRY = re.compile(r"stage-[0-9a-f]{16}")
_ELSEWHERE = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT)


@contextlib.contextmanager
def staged(root: Path) -> Iterator[Path]:
    """Give an empty folder from which a rename into the repository is atomic; remove it and its rest afterwards.

    Args:
        root: the repository's real path.

    Raises:
        RepositoryError: neither the folder beside the root nor the one in it can be used.
    """
    area, entry, lock = _new_entry(root)
    try:
        yield entry
    finally:
        _remove_entry(area, entry.name, root)
        os.close(lock)
        with contextlib.suppress(OSError):
            area.rmdir()  # Stays while another command works in it.


def discard(path: Path, entry: Path) -> None:
    """Take a folder out of the repository by one rename, then delete it.

    Args:
        path: a model's or a version's folder.
        entry: the folder that `staged` gave; what a crash leaves there is swept by the next command.

    Raises:
        OSError: the rename failed; `path` is then as it was.
    """
    target = entry / secrets.token_hex(8)
    path.rename(target)
    fsync_directory(path.parent)
    shutil.rmtree(target, ignore_errors=True)  # It is out of the repository; a rest is swept later.


def sweep(root: Path) -> tuple[str, ...]:
    """Remove what dead commands left in the staging areas of a repository, and nothing else.

    Returns:
        The names of the removed entries.
    """
    removed: list[str] = []
    for area in _areas(root):
        if area.is_symlink():
            continue  # Not ours, wherever it leads.
        with contextlib.suppress(OSError):
            removed += _sweep_area(area, root)
            area.rmdir()
    return tuple(removed)


def _areas(root: Path) -> tuple[Path, Path]:
    return root.parent / f".{root.name}.staging", root / STAGING_IN_ROOT


def _new_entry(root: Path) -> tuple[Path, Path, int]:
    reasons = []
    for area in _areas(root):
        try:
            entry, lock = _claim_entry(area)
        except OSError as exc:
            reasons.append(f"{area}: {exc.strerror}")
            continue
        try:
            _probe(entry, root)
            sweep(root)
            return area, entry, lock
        except OSError as exc:
            reasons.append(f"{area}: {exc.strerror}")
            _remove_entry(area, entry.name, root)
            os.close(lock)
            with contextlib.suppress(OSError):
                area.rmdir()
            if exc.errno not in _ELSEWHERE:
                break
    raise RepositoryError(
        f"{root} cannot be written: no staging folder on its file system ({'; '.join(reasons)})",
        hint="Check that the disk is mounted for writing and not full, and that this user may write there.",
    )


def _claim_entry(area: Path) -> tuple[Path, int]:
    """Make a folder and hold its lock. The lock file comes first, so that a sweep never sees an unlocked folder."""
    while True:
        area.mkdir(exist_ok=True)
        if area.is_symlink():
            raise OSError(errno.EPERM, "is a symbolic link")
        entry = area / f"stage-{secrets.token_hex(8)}"
        lock_path = _lock_of(area, entry.name)
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # Another command ended and took the empty area away.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_same_file(lock, lock_path):
                entry.mkdir()
                return entry, lock
        except FileNotFoundError:
            pass
        except OSError:
            os.close(lock)
            with contextlib.suppress(OSError):
                lock_path.unlink()
            raise
        os.close(lock)  # A sweep removed the file between its creation and its lock.


def _probe(entry: Path, root: Path) -> None:
    """Check that a rename into the root works: two mounts of one file system have the same device and refuse it.

    Mounts are compared where the kernel names them. Otherwise a file is renamed into the root and away: a server that
    lists the root at that moment may fail to look at it.
    """
    probe = entry / "probe"
    probe.touch()
    mounts = [_mount_of(folder) for folder in (entry, root)]
    if None not in mounts:
        if mounts[0] != mounts[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if not os.access(root, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        probe.unlink()
        return
    inside = _probe_of(root, entry.name)
    probe.rename(inside)
    inside.unlink()


def _mount_of(folder: Path) -> str | None:
    """Return the kernel's id of the mount that a folder is in; `None` where /proc does not tell."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:")), None)


def _sweep_area(area: Path, root: Path) -> list[str]:
    removed = []
    names = {entry.name.removesuffix(".lock") for entry in os.scandir(area)}
    for name in sorted(names):
        if _ENTRY.fullmatch(name) is None:
            continue
        lock_path = _lock_of(area, name)
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            lock = -1  # The lock file goes last: without it the folder is nobody's.
        try:
            if lock >= 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_entry(area, name, root)
            removed.append(name)
        except BlockingIOError:
            continue  # Its owner lives.
        finally:
            if lock >= 0:
                os.close(lock)
    return removed


def _remove_entry(area: Path, name: str, root: Path) -> None:
    shutil.rmtree(area / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        _probe_of(root, name).unlink(missing_ok=True)
        if not (area / name).exists():
            _lock_of(area, name).unlink(missing_ok=True)


def _lock_of(area: Path, name: str) -> Path:
    return area / f"{name}.lock"


def _probe_of(root: Path, name: str) -> Path:
    return root / f".repo-manager.{name}.probe"


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
