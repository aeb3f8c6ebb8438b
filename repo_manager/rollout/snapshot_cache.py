"""Snapshots kept on a node, so a restarted pod reads from its disk instead of object storage.

    <cache>/
      <id>/             a snapshot, whole: it appears by one rename, and every file has the digest of its manifest
      <id>.use          locked (shared) by each pod that serves it, so that nobody removes it
      <id>.fetch        locked by the one that fetches or checks it. The others wait
      <id>.work/        what is being fetched

Several pods, and several processes, share a cache. The kernel drops the locks of a process at its death, of whatever
kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from repo_manager.errors import RepoManagerError, RepositoryError, UsageError
from repo_manager.files import file_lock, sha256_file, take_lock
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.signing import check_served
from repo_manager.rollout.rollout_context import Report
from repo_manager.rollout.targets.snapshot_files import Snapshot, models_in, read_snapshot, snapshot_id, write_snapshot

__all__ = ["CachedSnapshot", "fetch_snapshot", "hold_snapshot"]

_ID = re.compile(r"[0-9a-f]{16}")
_USE, _FETCH, _WORK = ".use", ".fetch", ".work"
_WAIT_S = 3600.0
_ENDS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class CachedSnapshot:
    """A snapshot on this machine. Nobody removes it until it is closed.

    Attributes:
        id: digest of its content: 16 hexadecimal digits, the name of its folder.
        folder: where it is, whole and checked.
        models: model -> the versions served.
        fetched: whether it was brought now, or was there already.
        size_bytes: total size of its versions' files.
        removed: ids of the snapshots removed to make room for it, or beyond the number kept.
        seconds: wall time of the fetch and the checks, waiting for other processes included.
        lock: the open file whose lock says the snapshot is in use.
    """

    id: str
    folder: Path
    models: dict[str, tuple[int, ...]]
    fetched: bool
    size_bytes: int
    removed: tuple[str, ...]
    seconds: float
    lock: int = dataclasses.field(repr=False, compare=False, metadata={"json": False})

    def close(self) -> None:
        """Let it be removed."""
        os.close(self.lock)

    def __enter__(self) -> CachedSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch_snapshot(
    url: Location,
    cache: Path,
    *,
    signed_by: Sequence[Path] = (),
    keep: int = 2,
    link: Path | None = None,
    report: Report = lambda _: None,
) -> CachedSnapshot:
    """Bring a snapshot into a cache on this machine, unless it is there, and check it: every file, and its signatures.

    A damaged one is fetched again. For an intact one, object storage is not asked.

    Args:
        url: place of the snapshot, `<repository>.snapshots/<id>`.
        cache: folder of this node for snapshots. Created when missing.
        signed_by: public keys of which one must vouch for each version. Empty asks for no signature.
        keep: how many unused snapshots stay beside this one. The longest unused go first, and more of them where
            there is no room.
        link: is made a symbolic link to the snapshot's folder, in one step. `None`: none is made.
        report: called with a line of text for each step.

    Raises:
        UsageError: the URL names no snapshot, the only kind of place whose content never changes.
        RepositoryError: there is no such snapshot, its content does not fit its id, a signature does not hold, or
            there is no room for it.
    """
    began, chosen = time.monotonic(), str(url).rstrip("/").rpartition("/")[2]
    if _ID.fullmatch(chosen) is None:
        raise UsageError(
            f"{url} is no snapshot, and only a snapshot never changes and can be kept",
            hint="Write one: repo-manager snapshot; its URL ends in 16 hexadecimal digits.",
        )
    with disk_errors(f"keep a snapshot in {cache}"), contextlib.ExitStack() as stack:
        cache.mkdir(parents=True, exist_ok=True)
        lock = _in_use(cache, chosen)
        stack.callback(os.close, lock)
        with file_lock(cache / f"{chosen}{_FETCH}", timeout_s=_WAIT_S):
            reason = _fault_of(cache, chosen)
            removed = () if reason is None else _fetch(url, cache, chosen, reason, report)
            found = read_snapshot(cache, chosen)
            assert found is not None, "it was checked"
            if signed_by:
                _check_signatures(url, found, signed_by, fetched=reason is not None)
        size = snapshot_id(models_in(found))[1]
        removed += _remove_unused(cache, chosen, keep)
        if link is not None:
            _point(link, cache / chosen)
        stack.pop_all()
    seconds = time.monotonic() - began
    return CachedSnapshot(chosen, cache / chosen, dict(found.models), reason is not None, size, removed, seconds, lock)


def hold_snapshot(snapshot: CachedSnapshot) -> None:
    """Become a process whose only work is to keep a snapshot from being removed, until SIGTERM or Ctrl-C. No return.

    This process is replaced by a bare, waiting Python: it keeps the lock and frees the memory of repo-manager.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.set_inheritable(snapshot.lock, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # signals that arrive in between wait for the new process
    numbers = ", ".join(str(int(each)) for each in _ENDS)
    wait = f"import signal; signal.sigwait(({numbers},))"
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", wait])


def _point(link: Path, folder: Path) -> None:
    """Make a link lead to a folder, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.resolve())
    temporary.replace(link)


def _in_use(cache: Path, chosen: str) -> int:
    """Mark a snapshot as in use, with the present time. Return the lock."""
    path = cache / f"{chosen}{_USE}"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.utime(path)
    return lock


def _check_signatures(url: Location, found: Snapshot, keys: Sequence[Path], *, fetched: bool) -> None:
    """Check each version's signature, by the signatures here, else by those the source has by now."""
    try:
        for name, versions in found.models.items():
            check_served(found.location, name, versions, keys)
    except RepositoryError:
        source = None if fetched else read_snapshot(url.parent, found.id)
        if source is None:
            raise
        write_snapshot(found.location.parent, models_in(source))
        _check_signatures(url, found, keys, fetched=True)


def _fetch(url: Location, cache: Path, chosen: str, reason: str, report: Report) -> tuple[str, ...]:
    """Fetch a snapshot into its place. Return the snapshots removed for it."""
    place, work = cache / chosen, cache / f"{chosen}{_WORK}"
    source = read_snapshot(url.parent, chosen)
    if source is None:
        raise RepositoryError(
            f"{url} is no complete snapshot",
            hint="Roll one out that is: repo-manager status shows what pods name, snapshot writes one.",
        )
    models = models_in(source)
    made_of, size = snapshot_id(models)
    if made_of != chosen:
        raise RepositoryError(
            f"{url} holds the content of snapshot {made_of}, so it was changed after it was written",
            hint="Do not serve it. repo-manager deploy writes a new snapshot from the repository.",
        )
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    removed = _make_room(cache, chosen, size)
    report(f"snapshot {chosen}: {reason}; fetching {size / 1e6:.1f} MB")
    try:
        written = write_snapshot(work, models, links=False)
        fault = _fault_of(work, written.id)
        if fault is not None:
            raise RepositoryError(
                f"{url} is damaged, there or on the way: {fault}",
                hint="Run the command again; if it stays, deploy the version from the repository again.",
            )
        shutil.rmtree(place, ignore_errors=True)
        (work / written.id).rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return removed


def _fault_of(root: Path, chosen: str) -> str | None:
    """Return why a folder is not the snapshot of that id, file by file, or `None` when it is."""
    if not (root / chosen).is_dir():
        return "not here yet"
    try:
        found = read_snapshot(root, chosen)
        if found is None:
            return "it is not complete"
        if snapshot_id(models_in(found))[0] != chosen:
            return "its small files or manifests were changed"
        for name, versions in found.models.items():
            for version in versions:
                odd = _odd_files(root / chosen / name / str(version))
                if odd:
                    return f"{name}/{version}/{odd[0]} is not as it was published"
    except (RepoManagerError, OSError) as exc:
        return " ".join(str(exc).split())
    return None


def _odd_files(folder: Path) -> list[str]:
    """Return the files of a version its manifest does not have, or has otherwise."""
    expected = {file: record.sha256 for file, record in read_manifest(folder).files.items()}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    odd = there - {MANIFEST_FILENAME} ^ expected.keys()
    odd |= {file for file in expected.keys() - odd if sha256_file(folder / file) != expected[file]}
    return sorted(odd)


def _make_room(cache: Path, chosen: str, size: int) -> tuple[str, ...]:
    """Remove unused snapshots until there is room. Return their ids.

    Raises:
        RepositoryError: there is not enough even without them.
    """
    removed: list[str] = []
    for other in _others(cache, chosen):
        if shutil.disk_usage(cache).free > size:
            break
        if _removed(cache, other):
            removed.append(other)
    free = shutil.disk_usage(cache).free
    if free <= size:
        raise RepositoryError(
            f"{cache} has {free / 1e9:.1f} GB free, and snapshot {chosen} needs {size / 1e9:.1f} GB",
            hint="Every other snapshot there is in use. Give the cache a larger disk.",
        )
    return tuple(removed)


def _remove_unused(cache: Path, chosen: str, keep: int) -> tuple[str, ...]:
    """Remove the unused snapshots beyond those kept. Return their ids."""
    others = _others(cache, chosen)
    return tuple(other for other in others[: max(0, len(others) - keep)] if _removed(cache, other))


def _others(cache: Path, chosen: str) -> list[str]:
    """Return the other snapshots, the longest unused first."""
    there = [path.name for path in cache.iterdir() if _ID.fullmatch(path.name) and path.name != chosen]

    def last_use(name: str) -> float:
        with contextlib.suppress(OSError):
            return (cache / f"{name}{_USE}").stat().st_mtime
        return 0.0

    return sorted(there, key=lambda name: (last_use(name), name))


def _removed(cache: Path, name: str) -> bool:
    """Remove a snapshot unless a process uses it. Return whether it is gone."""
    with _claimed(cache, name) as free:
        if free:
            gone = cache / f"{name}{_WORK}"
            shutil.rmtree(gone, ignore_errors=True)
            (cache / name).rename(gone)  # renamed first: its name never points to half a snapshot
            shutil.rmtree(gone)
    return free


@contextlib.contextmanager
def _claimed(cache: Path, name: str) -> Iterator[bool]:
    """Hold a snapshot nobody uses. Yield whether nobody uses it."""
    lock = os.open(cache / f"{name}{_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield take_lock(lock)
    finally:
        os.close(lock)
