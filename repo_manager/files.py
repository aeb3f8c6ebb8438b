"""Atomic and durable file operations, digests, and locks freed by the kernel when their holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from repo_manager.errors import LockHeldError
from repo_manager.types import Digest

__all__ = [
    "copy_folder",
    "document",
    "file_lock",
    "fsync_directory",
    "fsync_tree",
    "kept_folder",
    "link_files",
    "read_regular",
    "reason_of",
    "sha256_bytes",
    "sha256_file",
    "sweep_work_folders",
    "take_lock",
    "url_parts",
    "work_folder",
    "write_atomic",
]

_CHUNK_BYTES = 1 << 20
_WORK_NAME = re.compile(r"[a-z0-9_]{8}\.work")  # random part and suffix of our `tempfile` names
_OURS = "repo-manager-"
_KEPT_S = 7 * 86_400.0
"""How long a part of a download is kept without being gone on with."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_BYTES = 1 << 20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)


def url_parts(text: str) -> re.Match[str] | None:
    """Return scheme, slashes and the rest of a URL; `None` for a path, also one with `file:`."""
    match = _URL.fullmatch(text)
    return None if match is None or match[1].lower() == "file" else match


def sha256_bytes(data: bytes) -> Digest:
    """Return the digest of bytes in memory."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def reason_of(exc: BaseException) -> str:
    """Return why something failed, for a message with the file's name: `No such file or directory`."""
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    return str(getattr(exc, "strerror", None) or exc)


def read_regular(path: Path) -> bytes:
    """Return a file's content. A pipe or a device is no file: it could block for ever or never end.

    Raises:
        OSError: it cannot be read, or is not a regular file or a link to one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return file.read()


def sha256_file(path: Path) -> Digest:
    """Return the digest of a file's content, read in chunks.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return Digest("sha256:" + digest.hexdigest())


def fsync_directory(path: Path) -> None:
    """Make a directory's entries durable (a rename is not, until its parent is synced)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Make every file and directory below and including `root` durable, leaves first."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(Path(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(directory))


def link_files(files: Mapping[str, Path], folder: Path) -> None:
    """Put files into a folder as hard links. Those of another file system are copied.

    Args:
        files: path in the folder -> file.
        folder: made where it is missing, like those below it.
    """
    for place, source in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], object] = shutil.copy2) -> None:
    """Copy a folder and its contents, links followed. The first failure ends it.

    `shutil.copytree` goes on, and then raises a list of failures with no errno.

    Args:
        source: the folder to copy.
        target: made, with those above it.
        copy: takes a file, and where to put it.

    Raises:
        OSError: something cannot be read or written.
    """
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            copy_folder(entry, target / entry.name, copy)
        else:
            copy(entry, target / entry.name)


def document(name: str) -> str:
    """Return where a document of ours is on this machine: in a wheel beside the code, in a clone beside the package.

    Args:
        name: its file name in `docs/`.
    """
    package = Path(__file__).resolve().parent
    found = [folder / "docs" / name for folder in (package, package.parent) if (folder / "docs" / name).is_file()]
    return str(found[0]) if found else f"docs/{name}"


def write_atomic(path: Path, data: bytes, *, staging: Path | None = None, mode: int | None = None) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, never a part.

    Args:
        path: the file to create or replace.
        data: new content of the file.
        staging: a directory on the same file system for the temporary file. `None` puts it beside `path`. Triton reads
            a model's folder, so nothing temporary may be there.

        mode: its permissions. `None` keeps those of the old content, and takes 0644 for a new file.

    Raises:
        OSError: the disk is full, read-only, .... `path` is then as it was and nothing is left over.
    """
    folder = path.parent if staging is None else staging
    temporary = folder / f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    if mode is None:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    if staging is None:
        _sweep_rests(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        if exc.filename is None and exc.errno in _FULL:
            exc.filename = str(path)  # a write does not name the file
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _sweep_rests(path: Path) -> None:
    """Remove the remains of this user's killed writers of `path`: files nobody has locked."""
    rest = re.compile(rf"\.{re.escape(path.name)}\.([0-9]+)\.[0-9]+\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = rest.fullmatch(entry.name)
            if found is None or Path("/proc", found[1]).exists():
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        Path(entry.path).unlink()
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created when missing, never removed).

    The kernel drops the lock when its holder dies, however it dies.

    Args:
        path: the lock's file. Its folder must exist.
        timeout_s: how long to wait for another holder.

    Raises:
        LockHeldError: another process still holds it after `timeout_s`.
        OSError: the file cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, path, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, timeout_s: float) -> None:
    """Poll for the lock: flock has no timeout of its own."""
    deadline = time.monotonic() + timeout_s
    while not take_lock(descriptor):
        if time.monotonic() >= deadline:
            raise LockHeldError(
                f"{path} is locked by another process for more than {timeout_s:g} s",
                hint="Wait for the other repo-manager command to end, then run this one again.",
            )
        time.sleep(0.01)


def take_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file without waiting. `False`: another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def kept_folder(content: str, *, timeout_s: float = 600.0) -> Iterator[Path]:
    """Give a folder to fetch something into. It stays when the block fails, so the next attempt goes on.

    It is in the user's cache under a name made of the content, and is used by one process at a time.

    Args:
        content: mark of the content, such as a digest.
        timeout_s: longest wait for another process with the same fetch, in seconds.

    Raises:
        LockHeldError: another process still fetches it.
        OSError: it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repo-manager" / "downloads"
    base.mkdir(parents=True, exist_ok=True)
    _forget_old(base)
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    with file_lock(base / f"{name}.lock", timeout_s=timeout_s):
        (base / name).mkdir(exist_ok=True)
        os.utime(base / name)
        try:
            yield base / name
        except BaseException:
            with contextlib.suppress(OSError):
                (base / name).rmdir()  # an empty folder: nothing to resume
            raise
        shutil.rmtree(base / name, ignore_errors=True)


def _forget_old(base: Path) -> None:
    """Remove folders untouched for days and held by nobody."""
    for folder in base.iterdir():
        with contextlib.suppress(OSError, LockHeldError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _KEPT_S:
                with file_lock(base / f"{folder.name}.lock", timeout_s=0.0):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def work_folder(prefix: str, folder: Path | None = None) -> Iterator[Path]:
    """Give an empty folder for as long as the block lasts. First remove such folders of killed processes.

    Its owner holds a lock on it, dropped by the kernel when the owner dies: a folder free to lock is nobody's.

    Args:
        prefix: start of the folder's name.
        folder: where it is made. `None`: where the system keeps temporary files. `prefix` then begins with
            "repo-manager-", and folders left there by any command of ours are removed.

    Raises:
        OSError: it cannot be made: the disk is full, read-only, ...
    """
    root = Path(tempfile.gettempdir()) if folder is None else folder
    sweep_work_folders(root, _OURS if folder is None else prefix)
    path, lock = _locked_folder(root, prefix)
    try:
        yield path
    except OSError as exc:
        if exc.filename is None and exc.errno in _FULL and _is_full(path):
            exc.filename = str(root)  # a write does not name the file
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize < _NO_ROOM_BYTES or found.f_ffree == 0 < found.f_files
    return False


def _locked_folder(root: Path, prefix: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=".work", dir=root))
        try:
            lock = _lock_folder(path)
        except FileNotFoundError:
            continue  # a sweep removed it before it was locked
        except BlockingIOError:
            continue  # a sweep holds the lock and removes it
        if path.exists():
            return path, lock
        os.close(lock)


def _lock_folder(path: Path) -> int:
    """Open and lock a folder. Where the file system has no such locks it is only opened.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is gone, is a link, or belongs to somebody who does not let us in.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


@functools.cache
def sweep_work_folders(root: Path, prefix: str) -> None:
    """Remove the work folders of this user whose owners are dead, once in the life of a process."""
    with contextlib.suppress(OSError):
        for path in list(root.iterdir()):
            if not path.name.startswith(prefix) or _WORK_NAME.fullmatch(path.name[-13:]) is None:
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)
