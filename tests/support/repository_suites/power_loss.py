"""Power cuts: an operation's file-system calls are recorded, then replayed without their unsynced effects.

The model is weaker than any journaling file system, and so harder on the repository:

- A file's content is durable once the file was synced. Before that, a crash leaves the earlier durable content
  (nothing, for a new file), half of the new one, or all of it.
- Making, renaming and removing an entry is atomic. It is durable once a touched directory was synced, or a later
  durable step on the same file or folder needs it. Of the other steps a crash keeps none, all, any first few, all but
  one, or just one.

In object storage an answered write is durable, and one under way has been done or not. Of several under way any
selection has been done (`support.tiny_s3.Watch`): the store decides which unanswered writes survive. There are two
differences. An object is never torn, as every store shows it whole or not at all. A write arriving after its sender's
death, while another command runs already, is not tried.

Usage: python -m support.repository_suites.power_loss disk|objects WORK [--forget WHAT] [OPERATION ...]. WHAT never
becomes durable: `files` or `folders` on a disk, `writes` in object storage.

On a disk an audit hook and a wrapper around os.fsync record the calls. They look at the tree (a few small files) before
each call, so no way of writing escapes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.repository_suites import operations
from support.repository_suites.operations import OPERATIONS, WHOLE, Operation, add, build, exists
from support.repository_suites.places import DiskPlace, ObjectPlace, Place, place_in
from support.tiny_s3 import Watch

from repo_manager.errors import RepoManagerError
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import parse_manifest
from repo_manager.repository.scan import find_model
from repo_manager.repository.signing import check_signature, sign_version
from repo_manager.repository.tags import model_state
from repo_manager.repository.verify import verify

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

Counts = tuple[int, int]
Entries = dict[int, dict[str, int]]
"""Folder's inode -> name -> inode."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One atomic step on entries: (folder, name) -> (inode before, inode after); 0 is none."""

    entries: dict[tuple[int, str], tuple[int, int]]

    @property
    def folders(self) -> set[int]:
        return {folder for folder, _ in self.entries}

    @property
    def inodes(self) -> set[int]:
        return {inode for pair in self.entries.values() for inode in pair if inode}


@dataclasses.dataclass
class Disk:
    """The content, and the part of it sure to survive."""

    root: int
    entries: Entries
    durable: Entries
    content: dict[int, bytes]
    durable_content: dict[int, bytes]
    pending: list[Change]

    def apply(self, change: Change, entries: Entries) -> bool:
        """Do a step, if everything it needs is there."""
        for (folder, name), (before, _) in change.entries.items():
            if entries.setdefault(folder, {}).get(name, 0) != before:
                return False
        for (folder, name), (_, after) in change.entries.items():
            if after:
                entries[folder][name] = after
            else:
                entries[folder].pop(name, None)
        return True

    def sync_folder(self, inode: int) -> None:
        wanted = [change for change in self.pending if inode in change.folders]
        for change in list(self.pending):
            needed = change in wanted or any(
                change.inodes & later.inodes and self.pending.index(change) < self.pending.index(later)
                for later in wanted
            )
            if needed:
                self.apply(change, self.durable)
                self.pending.remove(change)

    def survivors(self) -> Iterator[Entries]:
        """Every tree of entries a crash may leave now."""
        count = len(self.pending)
        keeps = [set(range(n)) for n in range(count + 1)]
        keeps += [set(range(count)) - {n} for n in range(count)] + [{n} for n in range(count)]
        for kept in {frozenset(keep) for keep in keeps}:
            entries = {folder: dict(names) for folder, names in self.durable.items()}
            for index in sorted(kept):
                self.apply(self.pending[index], entries)
            yield entries

    def trees(self) -> Iterator[dict[str, bytes | None]]:
        """Every tree a crash may leave now: path -> content, `None` for a folder."""
        for entries in self.survivors():
            for how in ("lost", "half", "all"):
                yield dict(self._walk(entries, self.root, "", how))

    def _walk(self, entries: Entries, folder: int, prefix: str, how: str) -> Iterator[tuple[str, bytes | None]]:
        for name, inode in sorted(entries.get(folder, {}).items()):
            path = f"{prefix}{name}"
            if inode not in self.content:
                yield path, None
                yield from self._walk(entries, inode, f"{path}/", how)
                continue
            now, kept = self.content[inode], self.durable_content.get(inode, b"")
            if now == kept or how == "lost":
                yield path, kept
            else:
                yield path, now if how == "all" else now[: len(now) // 2]


class Recorder:
    """Watches an operation, and hands out every tree a power cut at any moment could leave."""

    def __init__(self, place: Path, forget: str) -> None:
        self.place, self.forget = place, forget
        self.watching = False
        self.calls = 0
        self.seen: set[int] = set()
        self.found: list[dict[str, bytes | None]] = []
        self.real_fsync = os.fsync
        entries, content = self.look()
        copy = {folder: dict(names) for folder, names in entries.items()}
        self.disk = Disk(place.stat().st_ino, entries, copy, content, dict(content), [])

    def hook(self, event: str, _: tuple[Any, ...]) -> None:
        if self.watching and event in EVENTS:
            self.moment()

    def fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if self.watching:
            self.moment()
        self.real_fsync(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        if not self.watching or self.forget == ("folders" if is_folder else "files"):
            return
        if is_folder:
            self.disk.sync_folder(status.st_ino)
        elif status.st_ino in self.disk.content:
            self.disk.durable_content[status.st_ino] = self.disk.content[status.st_ino]

    def moment(self) -> None:
        """Take in the changes since the last call, and note the trees a crash would leave now."""
        self.watching = False
        self.calls += 1
        entries, content = self.look()
        changed = {
            (folder, name): (self.disk.entries.get(folder, {}).get(name, 0), entries.get(folder, {}).get(name, 0))
            for folder in {*entries, *self.disk.entries}
            for name in {*entries.get(folder, {}), *self.disk.entries.get(folder, {})}
        }
        differing = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
        gone = {pair[0] for pair in differing.values()} - {pair[1] for pair in differing.values()}
        # A moved or removed folder takes its own entries along: only the step itself is one.
        differing = {key: pair for key, pair in differing.items() if key[0] in entries or key[0] not in gone}
        if differing:
            self.disk.pending.append(Change(differing))
        for inode in set(content) - set(self.disk.content):
            self.disk.durable_content.pop(inode, None)  # A reused inode number.
        self.disk.entries, self.disk.content = entries, {**self.disk.content, **content}
        for tree in self.disk.trees():
            mark = hash(tuple((path, data) for path, data in tree.items() if not path.endswith(".lock")))
            if mark not in self.seen:
                self.seen.add(mark)
                self.found.append(tree)
        self.watching = True

    def look(self) -> tuple[Entries, dict[int, bytes]]:
        entries: Entries = {}
        content: dict[int, bytes] = {}

        def visit(folder: str, inode: int) -> None:
            entries[inode] = {}
            for entry in os.scandir(folder):
                status = entry.stat(follow_symlinks=False)
                entries[inode][entry.name] = status.st_ino
                if stat.S_ISDIR(status.st_mode):
                    visit(entry.path, status.st_ino)
                else:
                    content[status.st_ino] = Path(entry.path).read_bytes()

        visit(str(self.place), self.place.stat().st_ino)
        return entries, content

    def last_trees(self) -> list[dict[str, bytes | None]]:
        """The trees a power cut can leave after the operation has reported its end."""
        self.moment()
        self.watching = False
        return list(self.disk.trees())


def write_tree(place: Path, tree: dict[str, bytes | None]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path, data in tree.items():
        if data is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(data)


def check(place: DiskPlace, operation: Operation) -> None:
    """Check the conditions for any power cut: the repository verifies, old content is there, and a command works."""
    damaged = {"m/2/model.onnx"} if operation.damaged else set()
    for root in (place.root, place.production):
        if root.is_dir():
            errors = [p for p in verify(root, models=False) if p.severity == "error" and p.where not in damaged]
            assert not errors, errors
    for name, count in (("m", 4), ("n", 1)):
        if not (place.root / name).is_dir():
            assert operation.removes
            continue
        model = find_model(place.root, name)
        assert operation.removes or [entry.version for entry in model.versions][:count] == list(range(1, count + 1))
        for entry in model.versions[:count]:
            original = place.work / f"{name}-{entry.version}.json"
            if original.exists() and entry.manifest is not None and "adopted" not in entry.manifest.extra:
                assert entry.manifest == parse_manifest(original.read_text(), where=str(original))
    highest = max(versions(place.root, "m"), default=0)
    add(place.root, place.work, "m")
    assert versions(place.root, "m")[-1] >= max(5, highest + 1)


def versions(root: Location, name: str) -> list[int]:
    return [entry.version for entry in find_model(root, name).versions] if exists(root, name) else []


KEY = "key.pem"
DONE: dict[str, Callable[[Place], bool]] = {
    "add to a new model": lambda p: versions(p.root, "new") == [1],
    "add to a model": lambda p: versions(p.root, "m") == [1, 2, 3, 4, 5],
    "add with many files and labels": lambda p: versions(p.root, "wide") == [1],
    "serve others": lambda p: find_model(p.root, "m").selected == (1, 2),
    "deploy": lambda p: find_model(p.root, "m").selected == (2,),
    "labels": lambda p: b"dog" in (p.read("m/labels_0_y.txt") or b""),
    "remove a version": lambda p: versions(p.root, "m") == [1, 2, 3],
    "remove a tagged version": lambda p: versions(p.root, "m") == [1, 2, 4],
    "remove a model": lambda p: not exists(p.root, "m"),
    "gc": lambda p: 4 in versions(p.root, "m"),
    "gc of what nothing needs": lambda p: versions(p.root, "m") == [1, 2, 4],
    "config set": lambda p: b"count: 2" in (p.read("m/config.pbtxt") or b""),
    "config edit": lambda p: b"by hand" in (p.read("m/config.pbtxt") or b""),
    "tag": lambda p: model_state(p.root, "m").tags.get("prod") == 4,
    "untag": lambda p: "best" not in model_state(p.root, "m").tags,
    "record": lambda p: find_model(p.root, "m").selected == (1,),
    "copy": lambda p: versions(p.production, "m") == [2],
    "adopt": lambda p: p.read("m/2/manifest.json") is not None,
    "sign": lambda p: bool(check_signature(p.root, "m", 4, [p.work / "key.pub"])),
}
SIGN = {"sign": Operation(lambda p: sign_version(p.root, "m", 4, p.work / KEY), {WHOLE})}


def run_on_disk(place: DiskPlace, name: str, operation: Operation, recorders: list[Recorder], forget: str) -> Counts:
    """Record an operation and check every tree it can leave. Return the numbers of calls and trees."""
    replay = DiskPlace(place.work, "replay")
    recorder = Recorder(place.place, forget)
    recorders[:] = [recorder]
    os.fsync = recorder.fsync  # type: ignore[assignment]
    recorder.watching = True
    operation.act(place)
    last = recorder.last_trees()
    os.fsync = lambda _: None  # type: ignore[assignment]  # The replays need no durability of their own.
    for tree in recorder.found:
        write_tree(replay.place, tree)
        check(replay, operation)
    for tree in last:
        write_tree(replay.place, tree)
        assert DONE.get(name, lambda _: True)(replay), f"{name}: done, and lost by the power cut"
    os.fsync = recorder.real_fsync
    return recorder.calls, len(recorder.found)


def run_on_objects(place: ObjectPlace, name: str, operation: Operation, forget: str) -> Counts:
    """Record an operation's writes and check every state they can leave. Return the numbers of writes and states."""
    watch = place.server.watch = Watch(place.server, forget=bool(forget))
    place.isolated(lambda: operation.act(place))
    place.server.watch = None

    def done() -> None:
        assert DONE.get(name, lambda _: True)(place), f"{name}: done, and lost by the power cut"

    for number, state in enumerate(watch.found):
        place.server.objects = dict(state)
        try:
            place.isolated(lambda: operations.check(place, operation))
        except (AssertionError, RepoManagerError) as exc:
            raise AssertionError(f"{name}, state {number}: {exc!r}") from exc
    for state in watch.last():
        place.server.objects = dict(state)
        place.isolated(done)
    return watch.writes, len(watch.found)


def run(place: Place, name: str, recorders: list[Recorder], forget: str) -> Counts:
    operation = {**OPERATIONS, **SIGN}[name]
    place.restore("built")
    prepare = operation.prepare
    if prepare is not None:
        place.isolated(lambda: prepare(place))
    if isinstance(place, ObjectPlace):
        return run_on_objects(place, name, operation, forget)
    assert isinstance(place, DiskPlace)
    return run_on_disk(place, name, operation, recorders, forget)


def write_keys(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = s.Encoding.PEM
    (folder / KEY).write_bytes(key.private_bytes(pem, s.PrivateFormat.PKCS8, s.NoEncryption()))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, s.PublicFormat.SubjectPublicKeyInfo))


def main() -> None:
    store, work = sys.argv[1], Path(sys.argv[2])
    # `--forget WHAT`: as if that were never made durable, to prove the checks notice.
    forget = sys.argv[4] if sys.argv[3:4] == ["--forget"] else ""
    names = sys.argv[5 if forget else 3 :] or [*OPERATIONS, *SIGN]
    with place_in(store, work) as place:
        write_keys(work)
        place.isolated(lambda: build(place))
        place.keep("built")
        recorders: list[Recorder] = []
        if store == "disk":
            sign_version(place.root, "m", 1, work / KEY, dry_run=True)  # Imports must not be recorded.
            sys.addaudithook(lambda event, args: recorders[0].hook(event, args) if recorders else None)
        print(json.dumps({name: run(place, name, recorders, forget) for name in names}))


if __name__ == "__main__":
    main()
