"""Snapshots of a repository: exactly what pods serve, at an address of its own, never changed once it is there.

    <repository>.snapshots/<id>/
      snapshot.json                    what it holds; written last
      <model>/config.pbtxt             with the version policy that is served
      <model>/<version>/...            the files as published

A pod that starts, restarts or is scaled up in ten months serves what its Deployment's template names, whatever was
deployed since. The id is a digest of the content, so the same content is written once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_tree
from repo_manager.repository import Location, ObjectRepository, find_model
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import version_number
from repo_manager.repository.stores.base import ChangedMeanwhileError
from repo_manager.repository.stores.objects.client import open_client
from repo_manager.repository.stores.objects.retry import TransientError
from repo_manager.repository.stores.objects.transport import read_parts
from repo_manager.triton_config import CONFIG_FILENAME, replace_version_policy

__all__ = ["SNAPSHOT_FILENAME", "Snapshot", "SnapshotModel", "snapshots_of", "write_snapshot"]

SNAPSHOT_FILENAME = "snapshot.json"
_ID_DIGITS = 16
_SMALL_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class SnapshotModel:
    """A model in a snapshot.

    Attributes:
        name: the model.
        versions: those that are served, ascending.
        source: the repository, or the earlier snapshot, that it is taken from.
    """

    name: str
    versions: tuple[int, ...]
    source: Location


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot that is there.

    Attributes:
        id: of its content.
        location: where it was written, as this machine sees it.
        models: model -> the versions that are served.
        created: whether it was written now, or was there already.
    """

    id: str
    location: Location
    models: Mapping[str, tuple[int, ...]]
    created: bool


def snapshots_of(repository: Location) -> Location:
    """Return where a repository's snapshots are: beside it, since Triton takes every folder in it for a model.

    Raises:
        RepositoryError: the repository is a whole bucket: beside it is nothing.
    """
    place = repository.resolve()
    if isinstance(place, ObjectRepository) and not place.prefix:
        raise RepositoryError(
            f"{place} is a whole bucket, and snapshots have to lie outside the repository",
            hint="Keep the repository below a path of the bucket, for instance .../models.",
        )
    return place.parent / f"{place.name}.snapshots"


def write_snapshot(root: Location, models: Sequence[SnapshotModel], *, dry_run: bool = False) -> Snapshot:
    """Write a snapshot, unless it is there.

    On disk the versions' files are hard links where the file system has them (they never change), else copies.
    In object storage they stream through this machine, in bounded memory.

    Args:
        root: where the snapshots are.
        models: what it holds.
        dry_run: only say which it would be.

    Raises:
        RepositoryError: a model or version is missing, a version has no manifest, or the place cannot be written.
    """
    contents = {model.name: _content(model) for model in models}
    identity = json.dumps({name: content.identity for name, content in sorted(contents.items())}, sort_keys=True)
    chosen = hashlib.sha256(identity.encode()).hexdigest()[:_ID_DIGITS]
    target = root / chosen
    held = {model.name: model.versions for model in sorted(models, key=lambda model: model.name)}
    record = json.dumps({"schema_version": 1, "id": chosen, "models": held}, indent=1).encode() + b"\n"
    if dry_run or _is_complete(target):
        return Snapshot(chosen, target, held, created=False)
    if isinstance(target, ObjectRepository):
        _write_objects(target, contents, record)
    else:
        with disk_errors(f"write the snapshot {target}"):
            _write_folder(target, contents, record)
    return Snapshot(chosen, target, held, created=True)


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a model's folder in a snapshot holds: small files by content, versions by where they are."""

    folder: Location
    small: Mapping[str, bytes]
    versions: tuple[int, ...]
    identity: Mapping[str, str]


def _content(model: SnapshotModel) -> _Content:
    entry = find_model(model.source, model.name)
    if entry.config_text is None:
        raise RepositoryError(f"{entry.path} has no {CONFIG_FILENAME}", hint="repo-manager config writes one.")
    small = _beside(entry.path)
    where = str(entry.path / CONFIG_FILENAME)
    small[CONFIG_FILENAME] = replace_version_policy(entry.config_text, model.versions, where=where).encode()
    identity = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    for number in model.versions:
        manifest = entry.version(number).manifest
        if manifest is None:
            raise RepositoryError(
                f"{model.name}:{number} has no manifest, so what it holds cannot be told from what it held before",
                hint=f"repo-manager adopt {model.name}",
            )
        identity[str(number)] = manifest.digest
    return _Content(entry.path, small, model.versions, identity)


def _beside(folder: Location) -> dict[str, bytes]:
    """Read what lies beside the versions: labels, configurations per kind of GPU; not the versions themselves."""
    if isinstance(folder, ObjectRepository):
        store = open_client(folder)
        level = store.list()
        keys = [fact.key for fact in level.files]
        for name in level.folders:
            if version_number(name) is None:
                keys += [f"{name}/{fact.key}" for fact in store.walk(name)]
        read = {key: store.get(key) for key in keys}
        return {key: found[0] for key, found in read.items() if found is not None}
    files = [path for path in folder.rglob("*") if path.is_file()]
    places = [(path, path.relative_to(folder).as_posix()) for path in files]
    return {place: path.read_bytes() for path, place in places if version_number(place.partition("/")[0]) is None}


def _is_complete(target: Location) -> bool:
    if isinstance(target, ObjectRepository):
        return open_client(target).head(SNAPSHOT_FILENAME) is not None
    return (target / SNAPSHOT_FILENAME).is_file()


def _write_folder(target: Path, contents: Mapping[str, _Content], record: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
    try:
        for name, content in contents.items():
            for place, data in content.small.items():
                file = staging / name / place
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            for number in content.versions:
                _take_version(content.folder / str(number), staging / name / str(number))
        (staging / SNAPSHOT_FILENAME).write_bytes(record)
        staging.chmod(0o755)
        fsync_tree(staging)
        with contextlib.suppress(OSError):
            staging.rename(target)
        if not (target / SNAPSHOT_FILENAME).is_file():
            raise RepositoryError(
                f"{target} is there and is no complete snapshot", hint="Nobody else writes there: remove it."
            )
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _take_version(source: Location, target: Path) -> None:
    """Link or copy a version's folder."""
    if not isinstance(source, Path):
        raise RepositoryError(f"a snapshot on disk cannot be taken of {source}")

    def take(file: str, place: str) -> str:
        try:
            os.link(file, place, follow_symlinks=False)
        except OSError:  # Another file system, or one without links.
            shutil.copy2(file, place)
        return place

    shutil.copytree(source, target, copy_function=take)


def _write_objects(target: ObjectRepository, contents: Mapping[str, _Content], record: bytes) -> None:
    store = open_client(target)
    for name, content in contents.items():
        for place, data in content.small.items():
            store.put(f"{name}/{place}", data)
        for number in content.versions:
            source = content.folder / str(number)
            for key, size, chunks in _files_of(source):
                goal = f"{name}/{number}/{key}"
                try:
                    if size <= _SMALL_BYTES:
                        store.put(goal, b"".join(chunks))
                    else:
                        store.put_streamed(goal, chunks, store.options.part_bytes, store.options.workers)
                except TransientError as exc:
                    raise RepositoryError(
                        f"{target / goal} could not be written: {exc}",
                        hint="Run it again: what is there already is written over by the same content.",
                    ) from exc
    # Two that write the same snapshot write the same bytes.
    with contextlib.suppress(ChangedMeanwhileError):
        store.create(SNAPSHOT_FILENAME, record)


def _files_of(folder: Location) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """Yield the files of a version: relative name, size, content in parts."""
    if isinstance(folder, ObjectRepository):
        store = open_client(folder)
        for fact in store.walk(""):
            yield fact.key, fact.size_bytes, read_parts(store, fact.key, fact)
        return
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size, _parts_of(path)


def _parts_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_SMALL_BYTES):
            yield part
