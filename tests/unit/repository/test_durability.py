"""Nothing becomes visible before it is durable: the order of writes, syncs and renames of each operation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.relabel import set_labels
from repo_manager.repository.remove import remove
from repo_manager.repository.repair import repair
from repo_manager.repository.tags import record_deployment, set_tag
from repo_manager.repository.transfer import CopyOptions, copy_version

Put = Callable[..., Any]


class Disk:
    """The losses of a power cut now: written files, and folders with changed entries, not yet synced."""

    def __init__(self) -> None:
        self.active = False
        self.root = Path()
        self.unsynced: set[Path] = set()
        self.faults: list[str] = []
        self.visible = 0
        sys.addaudithook(self._hook)  # An audit hook cannot be removed; `active` turns it off.

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        writes = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event == "os.mkdir":
            path = Path(args[0])  # Hooks run before the call: only a new name changes its folder.
            exists = path.exists()
            self.unsynced |= set() if event == "os.mkdir" and exists else {path}
            self.unsynced |= set() if exists else {path.parent}
        elif event == "os.rename":
            self._rename(Path(args[0]), Path(args[1]))

    def _rename(self, source: Path, target: Path) -> None:
        if "probe" in (source.name, target.suffix.removeprefix(".")):
            return  # It comes and goes, and may be lost.
        inside = {path for path in self.unsynced if path == source or source in path.parents}
        self.visible += self.root in target.parents or self.root in source.parents
        if self.root in target.parents:
            self.faults += [f"{path} was not durable when {target} became visible" for path in inside]
        self.unsynced -= inside
        self.unsynced |= {target / path.relative_to(source) for path in inside}
        self.unsynced |= {source.parent, target.parent}

    def synced(self, descriptor: int) -> None:
        self.unsynced.discard(Path(f"/proc/self/fd/{descriptor}").readlink())

    def left(self) -> list[Path]:
        """The non-durable parts of the repository itself. The lock's content and removed places do not matter."""
        return [
            path
            for path in self.unsynced
            if (path == self.root or self.root in path.parents) and path.exists() and path.name != ".repo-manager.lock"
        ]


DISK = Disk()


@pytest.fixture
def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        DISK.synced(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    DISK.root, DISK.unsynced, DISK.faults, DISK.visible = root, set(), [], 0
    yield DISK
    DISK.active = False


def spoil(root: Path) -> None:
    (root / "m/2/model.onnx").write_bytes(b"spoilt")


def forget(root: Path) -> None:
    (root / "m/2/manifest.json").unlink()


@pytest.mark.parametrize(
    ("prepare", "act"),
    [
        (None, lambda root, put: put("new")),
        (None, lambda root, put: put("new", labels={"y": ("a", "b")})),
        (None, lambda root, put: put()),
        (None, lambda root, put: set_served_versions(root, "m", (1, 2))),
        (None, lambda root, put: record_deployment(root, "m", 2)),
        (None, lambda root, put: set_tag(root, "m", "t", 2)),
        (None, lambda root, put: set_labels(root, "m", "y", ("a", "b"))),
        (None, lambda root, put: remove(root, "m", 3)),
        (None, lambda root, put: remove(root, "m", force=True)),
        (None, lambda root, put: copy_version(root, "m", 2, root, CopyOptions(target_name="copy"))),
        (forget, lambda root, put: adopt(root)),
        (spoil, lambda root, put: repair(root)),
    ],
)
def test_what_is_visible_is_durable(
    disk: Disk, root: Path, put: Put, prepare: Callable[[Path], None] | None, act: Callable[[Path, Put], object]
) -> None:
    for _ in range(3):
        put()
    if prepare is not None:
        prepare(root)
    disk.active = True
    act(root, put)
    disk.active = False
    assert disk.faults == []
    assert disk.left() == []
    assert disk.visible > 0


def test_the_model_of_the_disk_sees_a_missing_sync(disk: Disk, root: Path) -> None:
    root.mkdir(parents=True)
    work = root.parent / "work"
    work.mkdir()
    disk.active = True
    (work / "file").write_text("x")
    (work / "file").rename(root / "file")
    disk.active = False
    assert len(disk.faults) == 1
    assert set(disk.left()) == {root, root / "file"}
