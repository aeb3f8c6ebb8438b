"""Where a version is put together before one rename makes it visible.

The staging area is on the repository's file system, because only there a rename is atomic, and outside its root,
because Triton takes every folder in the root for a model: `../.ROOTNAME.staging`. Where that is impossible (the root
is a mount point, or its parent is not writable) it is `ROOT/.repo-manager.staging`, present only while a command runs.
Triton in explicit mode, the only mode this project uses, does not look at it.

Each command works in a folder of its own beside a lock file it holds. The kernel drops the lock when the command dies,
and the next command removes the remains.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory, sha256_file, take_lock
from repo_manager.repository.file_system import copy_durably, write_durably
from repo_manager.repository.layout import MANIFEST_FILENAME, STAGING_IN_ROOT, check_file_name
from repo_manager.repository.manifest import FileRecord
from repo_manager.repository.stores.base import Incoming, Progress
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = [
    "check_copies",
    "delete",
    "delete_in_place",
    "is_same_file",
    "leftovers",
    "place_first",
    "put_back",
    "stage_files",
    "staged",
    "sweep",
    "sweep_entry",
    "take_out",
]

_ENTRY = re.compile(r"stage-[0-9a-f]{16}")
_ELSEWHERE = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT)


@contextlib.contextmanager
def staged(root: Path) -> Iterator[Path]:
    """Give an empty folder for an atomic rename into the repository. Remove it and its rest afterwards.

    Args:
        root: the repository's real path. Its parent must be writable, or the root itself.

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
            area.rmdir()  # fails while another command works in it


def take_out(path: Path, entry: Path) -> Path | None:
    """Take a folder out of the repository by one rename. `put_back` undoes it, `delete` ends it.

    Args:
        path: a model's or a version's folder.
        entry: the folder given by `staged`. The next command sweeps the remains of a crash there.

    Returns:
        Where it is now. `None` where this file system cannot rename it (a folder of a lower layer of an overlay): it
        must be deleted where it is.

    Raises:
        OSError: the rename failed. `path` is then as it was.
    """
    target = entry / secrets.token_hex(8)
    try:
        _rename_folder(path, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        return None
    fsync_directory(path.parent)
    return target


def _rename_folder(path: Path, target: Path) -> None:
    """Rename a folder to another parent. It must be writable itself: its owner makes it so."""
    try:
        path.rename(target)
    except PermissionError:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IWUSR or path.is_symlink():
            raise
        path.chmod(mode | stat.S_IWUSR)
        try:
            path.rename(target)
        except OSError:
            path.chmod(mode)
            raise


def put_back(target: Path, path: Path) -> None:
    """Undo `take_out`.

    Raises:
        OSError: the rename failed.
    """
    target.rename(path)
    fsync_directory(path.parent)


def delete(folder: Path) -> None:
    """Delete a folder outside the repository. Files with an error stay for the next sweep."""
    for inside, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(inside).chmod(0o700)  # it may have been published read-only
    shutil.rmtree(folder, ignore_errors=True)


def delete_in_place(folder: Path) -> None:
    """Delete a folder in place, its manifest first: after a crash the rest is plainly no version.

    Raises:
        OSError: something in it cannot be deleted.
    """
    (folder / MANIFEST_FILENAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
    fsync_directory(folder.parent)


def stage_files(content: Path, files: Mapping[str, Path], progress: Progress) -> dict[str, FileRecord]:
    """Copy a version's files into a new folder and make them durable. Return their sizes and digests.

    Args:
        content: new folder for the copies.
        files: name in the version -> path of the file.
        progress: called with the number of new bytes.
    """
    content.mkdir()
    records: dict[str, FileRecord] = {}
    for name, source in sorted(files.items()):
        target = content / name
        target.parent.mkdir(parents=True, exist_ok=True)
        records[name] = FileRecord(*copy_durably(Path(source), target))
        progress(records[name].size_bytes)
    for directory, _, _ in os.walk(content, topdown=False):
        fsync_directory(Path(directory))
    return records


def check_copies(content: Path, records: Mapping[str, FileRecord], expected: Mapping[str, FileRecord]) -> None:
    """Read the copies again.

    Args:
        content: folder of the copies, from `stage_files`. Each is read to its end.
        records: name -> size and digest of the copy.
        expected: name -> size and digest of the source.

    Raises:
        RepositoryError: one differs from its expected size or digest.
    """
    for name in sorted({*records, *expected}):
        found = FileRecord(sha256_file(content / name), (content / name).stat().st_size) if name in records else None
        wanted = expected.get(name)
        if found != wanted:
            raise RepositoryError(
                f"{name}: the copy is {found or 'missing'}; the manifest says {wanted or 'that there is no such file'}",
                hint="The source or a disk is damaged; `repo-manager verify` the source.",
            )


def place_first(folder: Path, staging: Path, version: int, incoming: Incoming) -> None:
    """Put the whole model together and rename it into the root (over an empty folder, if there is one).

    Args:
        folder: the model's folder in the root.
        staging: folder of the staged model.
        version: number of the model's first version, a folder in it.
        incoming: the version to publish. Gives config.pbtxt and the files beside the versions.
    """
    model = staging / "model"
    model.mkdir()
    (staging / "version").rename(model / str(version))
    write_durably(model / CONFIG_FILENAME, incoming.first_config(version))
    for name, data in incoming.beside.items():
        target = model / check_file_name(name)
        target.parent.mkdir(exist_ok=True)
        write_durably(target, data)
    for inside in {(model / name).parent for name in incoming.beside} - {model}:
        fsync_directory(inside)
    fsync_directory(model)
    model.rename(folder)
    fsync_directory(folder.parent)


def sweep(root: Path) -> tuple[str, ...]:
    """Remove the leftovers of dead commands in the staging areas of a repository, and nothing else.

    Returns:
        The names of the removed entries.
    """
    return tuple(name for area, name in leftovers(root) if sweep_entry(area, name, root))


def leftovers(root: Path) -> Iterator[tuple[Path, str]]:
    """List the leftovers of dead commands: a staging area and a name in it, each."""
    for area in _areas(root):
        if area.is_symlink():
            continue  # a link: never follow it
        with contextlib.suppress(OSError):
            names = {entry.name.removesuffix(".lock") for entry in os.scandir(area)}
            for name in sorted(names):
                if _ENTRY.fullmatch(name) is not None and _is_abandoned(area, name):
                    yield area, name
            area.rmdir()


def _is_abandoned(area: Path, name: str) -> bool:
    with _locked(area, name) as ours:
        return ours


def sweep_entry(area: Path, name: str, root: Path) -> bool:
    """Remove a dead command's leftover. False when its owner lives after all.

    Args:
        area: staging area of the repository.
        name: name of the entry, from `leftovers`.
        root: root of the repository. The entry may have left a probe file in it.
    """
    with _locked(area, name) as ours:
        if ours:
            _remove_entry(area, name, root)
    with contextlib.suppress(OSError):
        area.rmdir()  # fails while another command works in it
    return ours


@contextlib.contextmanager
def _locked(area: Path, name: str) -> Iterator[bool]:
    """Hold an entry's lock. False when its owner lives."""
    try:
        lock = os.open(_lock_of(area, name), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # the lock file is removed last: without it, nobody owns the folder
        return
    try:
        yield take_lock(lock)
    finally:
        os.close(lock)


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
        hint="Check that the disk is mounted for writing and not full, and whether this user may write there.",
    )


def _claim_entry(area: Path) -> tuple[Path, int]:
    """Make a folder and hold its lock. The lock file comes first, so a sweep never sees an unlocked folder."""
    while True:
        area.mkdir(exist_ok=True)
        if area.is_symlink():
            raise OSError(errno.EPERM, "is a symbolic link")
        entry = area / f"stage-{secrets.token_hex(8)}"
        lock_path = _lock_of(area, entry.name)
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # another command removed the empty area
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_same_file(lock, lock_path):
                entry.mkdir()
                return entry, lock
        except FileNotFoundError:
            pass
        except OSError:
            os.close(lock)
            with contextlib.suppress(OSError):
                lock_path.unlink()
            raise
        os.close(lock)  # a sweep removed the file before it was locked


def _probe(entry: Path, root: Path) -> None:
    """Check whether a rename into the root works: two mounts of one file system have the same device and refuse it.

    Mounts are compared where the kernel names them. Otherwise a file is renamed into the root and away: a server busy
    listing the root then may fail to look at it.
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
    """Return the kernel's id of the mount a folder is in, or `None` where /proc does not tell."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:")), None)


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


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether a path is the file a descriptor has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
