"""Every writing operation, on a repository with a history, and the conditions after an interrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from support.object_stores import tiny_config
from support.repository_suites.places import Place

from repo_manager.errors import RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import change_config, edit_config, set_served_versions
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import parse_manifest
from repo_manager.repository.publish import publish
from repo_manager.repository.relabel import set_labels
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.repair import repair
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.tags import record_deployment, remove_tag, set_tag
from repo_manager.repository.transfer import copy_version
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import ModelConfig

CONTENT = b"content " * 50
SPOILT = b"spoilt"
WHOLE = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        act: performs it.
        left: the versions of `model` allowed after it was interrupted and then repeated.
        prepare: runs before it.
        model: the model whose versions are counted.
        production: whether they are counted in the other repository.
        damaged: whether `prepare` caused a damage: an error of `verify` until it is repaired.
        removes: whether versions, or the model, may be missing afterwards.
    """

    act: Callable[[Place], object]
    left: set[tuple[int, ...]]
    prepare: Callable[[Place], object] | None = None
    model: str = "m"
    production: bool = False
    damaged: bool = False
    removes: bool = False


def configuration(name: str) -> ModelConfig:
    """Another backend's, as the published file is no ONNX, and configuration changes ask the model."""
    message = tiny_config(name).message()
    message.backend, message.default_model_filename = "other", "model.onnx"
    return ModelConfig.from_message(message)


def source_of(work: Path) -> Path:
    source = work / "source"
    if not source.exists():
        source.write_bytes(CONTENT)
    return source


def add(root: Location, work: Path, name: str) -> int:
    source = source_of(work)
    files = {"model.onnx": source, "sub/more.bin": source}
    return publish(root, name, files, configuration(name), {"precision": "fp16"}).version


def build(place: Place) -> None:
    """A repository with a history: m:1..4, 1 served, 3 tagged, 2 deployed before 1; n:1."""
    for name in ("m", "m", "m", "m", "n"):
        add(place.root, place.work, name)
    set_tag(place.root, "m", "best", 3)
    record_deployment(place.root, "m", 2)
    record_deployment(place.root, "m", 1)
    for name in ("m", "n"):
        for entry in find_model(place.root, name).versions:
            manifest = place.read(f"{name}/{entry.version}/manifest.json")
            assert manifest is not None
            (place.work / f"{name}-{entry.version}.json").write_bytes(manifest)


def _add_wide(place: Place) -> None:
    files = {f"{folder}/{number}.bin": source_of(place.work) for folder in "ab" for number in range(4)}
    config = tiny_config("wide", labels={"y": ("cat", "dog")})
    publish(place.root, "wide", {"model.onnx": source_of(place.work), **files}, config, {})


def _edit(place: Place) -> None:
    text = (place.read("m/config.pbtxt") or b"").decode()
    edit_config(place.root, "m", text.replace("count: 1", "count: 2  # by hand"))


def _spoil(place: Place) -> None:
    place.write("m/2/model.onnx", SPOILT)
    place.delete("n/config.pbtxt")


def _foreign(place: Place) -> None:
    place.write("theirs/1/model.onnx", CONTENT)
    place.write("theirs/config.pbtxt", configuration("theirs").text.encode())


def _deploy(place: Place, *versions: int) -> None:
    set_served_versions(place.root, "m", versions)
    record_deployment(place.root, "m", versions[-1])


def _remove_served(place: Place) -> None:
    set_served_versions(place.root, "m", (1, 4))
    remove(place.root, "m", 4, force=True)


CHANGES = {"instance_group.count": "2", "dynamic_batching.max_queue_delay_microseconds": "9"}
OPERATIONS: dict[str, Operation] = {
    "add to a new model": Operation(lambda p: add(p.root, p.work, "new"), {(1,), (1, 2), (2,)}, model="new"),
    "add to a model": Operation(lambda p: add(p.root, p.work, "m"), {(*WHOLE, 5), (*WHOLE, 5, 6), (*WHOLE, 6)}),
    "add with many files and labels": Operation(_add_wide, {(1,), (1, 2), (2,)}, model="wide"),
    "serve others": Operation(lambda p: set_served_versions(p.root, "m", (1, 2)), {WHOLE}),
    "record": Operation(lambda p: record_deployment(p.root, "m", 4), {WHOLE}),
    "deploy": Operation(lambda p: _deploy(p, 2), {WHOLE}),
    "tag": Operation(lambda p: set_tag(p.root, "m", "prod", 4), {WHOLE}),
    "untag": Operation(lambda p: remove_tag(p.root, "m", "best"), {WHOLE}),
    "labels": Operation(lambda p: set_labels(p.root, "m", "y", ("cat", "dog")), {WHOLE}),
    "remove a version": Operation(lambda p: remove(p.root, "m", 4), {(1, 2, 3)}, removes=True),
    "remove a served version": Operation(_remove_served, {(1, 2, 3)}, removes=True),
    "remove a tagged version": Operation(lambda p: remove(p.root, "m", 3, force=True), {(1, 2, 4)}, removes=True),
    "remove a model": Operation(lambda p: remove(p.root, "m", force=True), {()}, removes=True),
    "gc": Operation(lambda p: gc(p.root, keep=1), {WHOLE}, removes=True),
    "gc of what nothing needs": Operation(
        lambda p: gc(p.root, keep=1),
        {(1, 2, 4)},
        prepare=lambda p: remove_tag(p.root, "m", "best"),
        removes=True,
    ),
    "config set": Operation(lambda p: change_config(p.root, "m", CHANGES), {WHOLE}),
    "config edit": Operation(_edit, {WHOLE}),
    "copy": Operation(lambda p: copy_version(p.root, "m", 2, p.production), {(2,)}, production=True),
    "copy again": Operation(
        lambda p: (add(p.root, p.work, "m"), copy_version(p.root, "m", 5, p.production)),
        {(1,)},
        prepare=lambda p: copy_version(p.root, "m", 1, p.production),
        production=True,
    ),
    "adopt": Operation(lambda p: adopt(p.root), {WHOLE}, prepare=lambda p: p.delete("m/2/manifest.json")),
    "adopt what others wrote": Operation(lambda p: adopt(p.root), {(1,)}, prepare=_foreign, model="theirs"),
    "repair": Operation(lambda p: repair(p.root), {WHOLE}, prepare=_spoil, damaged=True),
    "repair, add, gc": Operation(
        lambda p: (repair(p.root), add(p.root, p.work, "m"), gc(p.root, keep=2)),
        {(*WHOLE, 5), (*WHOLE, 5, 6), (1, 2, 3, 5, 6), (*WHOLE, 6)},
        prepare=_spoil,
        damaged=True,
        removes=True,
    ),
}


def check(place: Place, operation: Operation) -> None:
    """Check the conditions for a crash at any point."""
    _check_whole(place, operation)
    again = versions_after_again(place, operation)
    assert again in operation.left, again
    for root in (place.root, place.production):
        if exists(root):
            assert verify(root, models=False) == (), verify(root, models=False)
    model = [entry.version for entry in find_model(place.root, "m").versions] if exists(place.root, "m") else []
    assert add(place.root, place.work, "m") >= max(5, max(model, default=0) + 1)
    assert place.rest() == []


def _check_whole(place: Place, operation: Operation) -> None:
    """Nothing is torn: old content is unchanged, and the served versions are whole."""
    for root in (place.root, place.production):
        if exists(root):
            errors = [problem for problem in verify(root, models=False) if problem.severity == "error"]
            known = {"m/2/model.onnx"} if operation.damaged else set()
            assert [problem for problem in errors if problem.where not in known] == [], errors
    for name in ("m", "n"):
        if not exists(place.root, name):
            assert operation.removes
            continue
        model = find_model(place.root, name)
        assert model.selected or place.read(f"{name}/config.pbtxt") is None, model
        assert operation.removes or {1, *(WHOLE if name == "m" else ())} <= {entry.version for entry in model.versions}
        for entry in model.versions:
            original = place.work / f"{name}-{entry.version}.json"
            if original.exists() and entry.manifest is not None and "adopted" not in entry.manifest.extra:
                assert entry.manifest == parse_manifest(original.read_text(), where=str(original))
    for entry in scan(place.root):
        assert entry.selected or place.read(f"{entry.name}/config.pbtxt") is None, entry


def versions_after_again(place: Place, operation: Operation) -> tuple[int, ...]:
    """Do it once more: it works, or says it was done. Then let `gc` clear the rest."""
    with contextlib.suppress(RepositoryError):
        operation.act(place)
    gc(place.root, keep=100)
    if operation.production:
        gc(place.production, keep=100)
    root = place.production if operation.production else place.root
    if not exists(root, operation.model):
        return ()
    return tuple(entry.version for entry in find_model(root, operation.model).versions)


def exists(root: Location, name: str | None = None) -> bool:
    """Whether there is such a repository with anything in it, or such a model."""
    try:
        names = {entry.name for entry in scan(root, deep=False)}
    except RepositoryError:
        return False
    return bool(names) if name is None else name in names
