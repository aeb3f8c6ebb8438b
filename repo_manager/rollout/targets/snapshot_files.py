"""Snapshots of a repository: the exact files of pods, at an address of their own, never changed once written.

    <repository>.snapshots/<id>/
      snapshot.json                    what it holds. Written last
      <model>/config.pbtxt             with the version policy that is served
      <model>/<version>/...            the files as published
      .repo-manager.<model>.<version>.sig.json, and the like: signatures, where there are any

A pod started in ten months still serves its Deployment's snapshot, whatever was deployed since. The id is a digest of
the content, so the same content is written once. Signatures are not part of it: a version signed later is the same
version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import copy_folder, fsync_tree, sweep_work_folders, work_folder, write_atomic
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, version_number
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.look import existing_model, walk, with_versions
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.plan.removal import check_versions_exist
from repo_manager.repository.signing import check_served
from repo_manager.repository.signing_files import beside_signatures, signature_name
from repo_manager.repository.signing_format import MAX_SIGNATURE_BYTES
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, Store
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME
from repo_manager.triton_config.version_policy import replace_version_policy

__all__ = [
    "SNAPSHOT_FILENAME",
    "Snapshot",
    "SnapshotModel",
    "models_in",
    "read_snapshot",
    "snapshot_id",
    "snapshots_of",
    "sweep_snapshots",
    "write_snapshot",
]

SNAPSHOT_FILENAME = "snapshot.json"
_ID_DIGITS = 16
_STAGING = ".staging-"


@dataclasses.dataclass(frozen=True)
class SnapshotModel:
    """A model in a snapshot.

    Attributes:
        name: name of the model, in the snapshot as in `source`.
        versions: versions to serve, ascending. The snapshot's config.pbtxt selects exactly these.
        source: the repository, or the earlier snapshot, with its files.
    """

    name: str
    versions: tuple[int, ...]
    source: Location


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """An existing snapshot.

    Attributes:
        id: digest of its content: 16 hexadecimal digits, the name of its folder.
        location: where it was written, as this machine sees it.
        models: model -> the versions served.
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
    if place == place.parent:
        raise RepositoryError(
            f"{place} is a whole bucket, and snapshots have to lie outside the repository",
            hint="Keep the repository below a path of the bucket, for instance .../models.",
        )
    return place.parent / f"{place.name}.snapshots"


def read_snapshot(root: Location, chosen: str) -> Snapshot | None:
    """Read a snapshot's models. `None` when there is none of that id, or it is incomplete.

    Raises:
        RepositoryError: the place cannot be read, or the record is damaged.
    """
    place = root / chosen
    with disk_errors(f"read the snapshot {place}"):
        data = open_store(place, may_be_new=True).read(SNAPSHOT_FILENAME)
    if data is None:
        return None
    try:
        models = {str(name): tuple(int(v) for v in held) for name, held in json.loads(data)["models"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise RepositoryError(
            f"{place / SNAPSHOT_FILENAME} is damaged: {type(exc).__name__}: {exc}",
            hint="Deploy a version from the repository; this writes a new snapshot.",
        ) from exc
    return Snapshot(chosen, place, models, created=False)


def write_snapshot(
    root: Location,
    models: Sequence[SnapshotModel],
    *,
    signed_by: Sequence[Path] = (),
    dry_run: bool = False,
    links: bool = True,
) -> Snapshot:
    """Write a snapshot, unless it is there.

    On disk the versions' files are hard links where the file system has them (they never change), else copies.
    From and to object storage they pass through this machine, one version at a time, each file compared with its
    manifest.

    Args:
        root: folder or prefix of all snapshots.
        models: models and versions of the snapshot.
        signed_by: keys of which one must vouch for each version. Empty asks for no signature. Versions of an earlier
            snapshot were checked when they came into it.
        dry_run: only name the snapshot, and write nothing.
        links: on disk, hard links instead of copies. Without them, an edit of the snapshot never reaches its source.

    Raises:
        RepositoryError: a model or version is missing, a version has no manifest, or the place cannot be written.
    """
    _check_signatures(root, models, signed_by)
    contents = {model.name: _content(model) for model in models}
    chosen = _id_of(contents)
    target = root / chosen
    held = {model.name: model.versions for model in sorted(models, key=lambda model: model.name)}
    record = json.dumps({"schema_version": 1, "id": chosen, "models": held}, indent=1).encode() + b"\n"
    store = open_store(target, may_be_new=True)
    if dry_run:
        return Snapshot(chosen, target, held, created=False)
    sweep_snapshots(root)
    if store.read(SNAPSHOT_FILENAME) is not None:
        with disk_errors(f"sign the snapshot {target}"):
            _put_signatures(target, contents)  # adds signatures made since
        return Snapshot(chosen, target, held, created=False)
    with disk_errors(f"write the snapshot {target}"):
        folder = local_folder(target)
        if folder is not None:
            _write_folder(folder, contents, record, links=links)
        else:
            _write_objects(store, contents, record)
    _check_signatures(root, models, signed_by)  # check the copied files too
    return Snapshot(chosen, target, held, created=True)


def sweep_snapshots(root: Location) -> None:
    """Remove unfinished snapshots of killed commands from disk. In object storage they are overwritten."""
    folder = local_folder(root)
    if folder is not None:
        sweep_work_folders(folder, _STAGING)


def models_in(snapshot: Snapshot) -> tuple[SnapshotModel, ...]:
    """Return the models of a snapshot, to be taken from it."""
    return tuple(SnapshotModel(name, versions, snapshot.location) for name, versions in snapshot.models.items())


def snapshot_id(models: Sequence[SnapshotModel]) -> tuple[str, int]:
    """Return the id of models' contents, and their size in bytes, by their small files and manifests.

    Raises:
        RepositoryError: a model or version is missing, or a version has no manifest.
    """
    contents = {model.name: _content(model) for model in models}
    manifests = [manifest for content in contents.values() for manifest in content.versions.values()]
    size = sum(record.size_bytes for manifest in manifests for record in manifest.files.values())
    return _id_of(contents), size


def _id_of(contents: Mapping[str, _Content]) -> str:
    identity = json.dumps({name: content.identity for name, content in sorted(contents.items())}, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:_ID_DIGITS]


def _put_signatures(target: Location, contents: Mapping[str, _Content]) -> None:
    store, folder = open_store(target, may_be_new=True), local_folder(target)
    for content in contents.values():
        for file, data in content.signatures.items():
            if store.read(file) == data:
                continue
            if folder is None:
                store.put(file, data)
            else:  # write_atomic takes no repository lock
                write_atomic(folder / file, data)


def _check_signatures(root: Location, models: Sequence[SnapshotModel], keys: Sequence[Path]) -> None:
    for model in models if keys else ():
        if not str(model.source).startswith(f"{root}/"):
            check_served(model.source, model.name, model.versions, keys)


@dataclasses.dataclass(frozen=True)
class _Content:
    """The contents of a model's folder in a snapshot: small files by content, versions by their manifests.

    Attributes:
        source: repository or snapshot with the files.
        small: files of the model's folder -> their content.
        versions: the manifests of its versions.
        identity: the part of it in the digest behind the snapshot's id.
        signatures: signature files of the root -> their content.
    """

    source: Store
    small: Mapping[str, bytes]
    versions: Mapping[int, Manifest]
    identity: Mapping[str, str]
    signatures: Mapping[str, bytes]


def _content(model: SnapshotModel) -> _Content:
    with disk_errors(f"read {model.name} for a snapshot"):
        source = open_store(model.source)
        view = existing_model(source, model.name)
        if not view.has_config:
            raise RepositoryError(f"{view.place} has no {CONFIG_FILENAME}", hint="repo-manager config writes one.")
        check_versions_exist(view, *model.versions)
        small = _beside(source, view)
        text = replace_version_policy(view.config_text(), model.versions, where=view.config_place)
        small[CONFIG_FILENAME] = text.encode()
        contents = with_versions(source, view, model.versions).contents
    identity = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    versions: dict[int, Manifest] = {}
    for number in model.versions:
        if number not in contents or not contents[number].has_manifest:
            raise RepositoryError(
                f"{model.name}:{number} has no manifest, so what it holds cannot be told from what it held before",
                hint=f"repo-manager adopt {model.name}",
            )
        versions[number] = contents[number].manifest()
        identity[str(number)] = versions[number].digest
    return _Content(source, small, versions, identity, _signatures(source, model))


def _signatures(source: Store, model: SnapshotModel) -> dict[str, bytes]:
    """Read the signatures of a model's versions, and of the files beside them."""
    files = [signature_name(model.name, version) for version in model.versions]
    files += beside_signatures((entry.name for entry in source.list_level().files), model.name)
    read = {file: source.read(file, limit_bytes=MAX_SIGNATURE_BYTES) for file in files}
    return {file: data for file, data in read.items() if data is not None}


def _beside(source: Store, view: ModelView) -> dict[str, bytes]:
    """Read the files beside the versions: labels, configurations per kind of GPU, not the versions themselves."""
    keys = [entry.name for entry in view.level.files]
    for folder in view.folders:
        if version_number(folder) is None and folder not in view.level.links:
            keys += [f"{folder}/{entry.name}" for entry in walk(source, f"{view.name}/{folder}")[0]]
    read = {key: source.read(f"{view.name}/{key}") for key in keys}
    return {key: data for key, data in read.items() if data is not None}


def _write_folder(target: Path, contents: Mapping[str, _Content], record: bytes, *, links: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(_STAGING, target.parent) as staging:
        for name, content in contents.items():
            for place, data in content.small.items():
                file = staging / name / place
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            for number in content.versions:
                with content.source.fetch(name, number) as folder:
                    copy_folder(folder, staging / name / str(number), _link_or_copy if links else shutil.copy2)
            for signature, data in content.signatures.items():
                (staging / signature).write_bytes(data)
        (staging / SNAPSHOT_FILENAME).write_bytes(record)
        staging.chmod(0o755)
        fsync_tree(staging)
        with contextlib.suppress(OSError):
            staging.rename(target)
        if not (target / SNAPSHOT_FILENAME).is_file():
            raise RepositoryError(f"{target} exists but is incomplete", hint="Delete it and run the command again.")


def _link_or_copy(file: Path, place: Path) -> None:
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(file, place)


def _write_objects(target: Store, contents: Mapping[str, _Content], record: bytes) -> None:
    for name, content in contents.items():
        for place, data in content.small.items():
            target.put(f"{name}/{place}", data)
        for number, manifest in content.versions.items():
            with content.source.fetch(name, number) as folder:
                for file, expected in manifest.files.items():
                    target.put(f"{name}/{number}/{file}", folder / file, record=expected)
                target.put(f"{name}/{number}/{MANIFEST_FILENAME}", (folder / MANIFEST_FILENAME).read_bytes())
    _put_signatures(target.location, contents)
    # Writers of the same snapshot write the same bytes.
    with contextlib.suppress(ChangedMeanwhileError):
        target.put(SNAPSHOT_FILENAME, record, new=True)
