"""Kill a child at its n-th file-system call, for every n, and look at what is left. Run by test_crash.py.

The child is forked, so a point costs milliseconds. Calls are counted by an audit hook (open, mkdir, rename, remove,
rmdir, scandir, flock, ...) and, as Python does not audit them, by wrappers around os.write and os.fsync. Dying before
call n+1 is dying after call n, so the points cover every state on disk; a write also dies half-way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests_conftest import make_config  # type: ignore[import-not-found]  # conftest.py under a name of its own

from repo_manager.errors import RepoManagerError
from repo_manager.repository import (
    adopt,
    change_config,
    copy_version,
    edit_config,
    find_model,
    gc,
    parse_manifest,
    publish,
    record_deployment,
    remove,
    remove_tag,
    repair,
    scan,
    set_served_versions,
    set_tag,
    verify,
)
from repo_manager.triton_config import ModelConfig

EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "fcntl.flock",
    "os.utime",
}


class Countdown:
    """Kills this process at the n-th counted call."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.real_write, self.real_fsync = os.write, os.fsync

    def arm(self) -> None:
        os.write, os.fsync = self.write, self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self.tick()

    def tick(self) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def write(self, descriptor: int, data: Any) -> int:
        self.tick()
        if self.left == 1 and len(data) > 1:
            self.real_write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real_write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self.tick()
        self.real_fsync(descriptor)


def configuration(name: str) -> ModelConfig:
    """Another backend's: what is published here is no ONNX, and changes of it ask the model."""
    message = make_config(name).message()
    message.backend, message.default_model_filename = "other", "model.onnx"
    return ModelConfig.from_message(message)


def add(root: Path, name: str) -> None:
    source = root.parent / "source"
    publish(root, name, {"model.onnx": source, "sub/more.bin": source}, configuration(name), {"precision": "fp16"})


def build(root: Path) -> None:
    """A repository with a history: m:1..4, 1 served, 3 tagged, 2 deployed before 1; n:1."""
    for name in ("m", "m", "m", "m", "n"):
        add(root, name)
    set_tag(root, "m", "best", 3)
    record_deployment(root, "m", 2)
    record_deployment(root, "m", 1)
    for name in ("m", "n"):
        for entry in find_model(root, name).versions:
            shutil.copy(entry.path / "manifest.json", root.parent / f"{name}-{entry.version}.json")


def add_wide(root: Path) -> None:
    files = {f"{folder}/{number}.bin": root.parent / "source" for folder in "ab" for number in range(4)}
    config = make_config("wide", labels={"y": ("cat", "dog")})
    publish(root, "wide", {"model.onnx": root.parent / "source", **files}, config, {})


def edited(root: Path) -> str:
    return (root / "m/config.pbtxt").read_text().replace("count: 1", "count: 2  # by hand")


def spoil(root: Path) -> None:
    (root / "m/2/model.onnx").write_bytes(b"spoilt")
    (root / "n/config.pbtxt").unlink()


def forget(root: Path) -> None:
    (root / "m/2/manifest.json").unlink()


OPERATIONS: dict[str, tuple[Callable[[Path], object] | None, Callable[[Path], object]]] = {
    "add to a new model": (None, lambda root: add(root, "new")),
    "add to a model": (None, lambda root: add(root, "m")),
    "serve others": (None, lambda root: set_served_versions(root, "m", (1, 2))),
    "record": (None, lambda root: record_deployment(root, "m", 4)),
    "tag": (None, lambda root: set_tag(root, "m", "prod", 4)),
    "remove a version": (None, lambda root: remove(root, "m", 4)),
    "remove a served version": (
        None,
        lambda root: (set_served_versions(root, "m", (1, 4)), remove(root, "m", 4, force=True)),
    ),
    "remove a model": (None, lambda root: remove(root, "m", force=True)),
    "gc": (None, lambda root: gc(root, keep=1)),
    "config set": (
        None,
        lambda root: change_config(
            root, "m", {"instance_group.count": "2", "dynamic_batching.max_queue_delay_microseconds": "9"}
        ),
    ),
    "config edit": (None, lambda root: edit_config(root, "m", edited(root))),
    "untag": (None, lambda root: remove_tag(root, "m", "best")),
    "add with many files and labels": (None, lambda root: add_wide(root)),
    "repair, add, gc": (spoil, lambda root: (repair(root), add(root, "m"), gc(root, keep=2))),
    "copy": (None, lambda root: copy_version(root, "m", 2, root.parent / "production")),
    "copy again": (
        lambda root: copy_version(root, "m", 1, root.parent / "production"),
        lambda root: (add(root, "m"), copy_version(root, "m", 5, root.parent / "production")),
    ),
    "adopt": (forget, adopt),
    "repair": (spoil, repair),
}


def check(root: Path, operation: str) -> None:
    """What must hold after a crash at any point."""
    damaged = {"m/2/model.onnx"} if operation.startswith("repair") else set()
    for place in (root, root.parent / "production"):
        if not place.is_dir():
            continue
        errors = [p for p in verify(place, models=False) if p.severity == "error" and p.where not in damaged]
        assert not errors, errors
    for name in ("m", "n"):
        if not (root / name).is_dir():
            assert operation == "remove a model"
            continue
        model = find_model(root, name)
        assert model.served_versions or not (root / name / "config.pbtxt").exists(), model
        for entry in model.versions:
            original = root.parent / f"{name}-{entry.version}.json"
            if original.exists() and entry.manifest is not None and "adopted" not in entry.manifest.extra:
                assert entry.manifest == parse_manifest(original.read_text(), where=str(original))
    scan(root)
    highest = max((e.version for e in find_model(root, "m").versions), default=0) if (root / "m").is_dir() else 0
    add(root, "m")
    assert find_model(root, "m").versions[-1].version >= max(5, highest + 1)
    rest = [
        p.name for p in (*root.parent.iterdir(), *root.iterdir()) if "staging" in p.name or p.name.endswith("probe")
    ]
    assert [name for name in rest if "production" not in name] == [], rest


def collect(root: Path, collection: Path) -> None:
    """Keep each model as the crash left it, once for each content, for a server to load (test_repository_crash.py)."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.is_dir():
            continue
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
        content = "".join(f"{path.relative_to(folder)} {hash(path.read_bytes())}\n" for path in files)
        target = collection / f"{folder.name}_{hash(content) & 0xFFFFFFFFFFFFFFFF:x}"
        if not target.exists():
            shutil.copytree(folder, target)


def run(work: Path, operation: str, stride: int, offset: int, collection: Path | None = None) -> int:
    """Crash one operation at every stride-th point; return how many points there were."""
    prepare, act = OPERATIONS[operation]
    template = work / "template"
    place = work / "place"
    points, count = 0, 1 + offset
    while True:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place)
        root = place / "models"
        if prepare is not None:
            prepare(root)
        child = os.fork()
        if child == 0:
            Countdown(count).arm()
            try:
                act(root)
            except BaseException as exc:  # noqa: BLE001 - whatever it is, the parent has to see that it was no kill
                os.write(2, f"{operation} failed by itself: {exc!r}\n".encode())
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, operation
            return points
        if collection is not None:
            for place_of in (root, root.parent / "production"):
                collect(place_of, collection)
        try:
            check(root, operation)
        except (AssertionError, RepoManagerError, OSError) as exc:
            raise AssertionError(f"{operation}, killed at call {count}: {exc!r}") from exc
        points += 1
        count += stride


def main() -> None:
    work, stride = Path(sys.argv[1]), int(sys.argv[2])
    place = work / "template"
    place.mkdir(parents=True, exist_ok=True)
    (place / "source").write_bytes(b"content " * 50)
    build(place / "models")
    collection = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    print(json.dumps({name: run(work, name, stride, i % stride, collection) for i, name in enumerate(OPERATIONS)}))


if __name__ == "__main__":
    main()
