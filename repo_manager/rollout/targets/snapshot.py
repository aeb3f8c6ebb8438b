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
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_tree
from repo_manager.repository import Location, check_served, find_model, local_folder, scan
from repo_manager.repository.ensembles import ensembles_in
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, version_number
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.plan.removal import check_version
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, Store
from repo_manager.repository.view import ModelView, existing_model, walk, with_versions
from repo_manager.rollout.checks import Check, Outcome, check_needed
from repo_manager.rollout.context import Context
from repo_manager.rollout.targets.template import is_snapshot
from repo_manager.triton_config import CONFIG_FILENAME, replace_version_policy
from repo_manager.triton_config.ensembles import dependents_of, is_ensemble, models_needed_by, pinned_versions

__all__ = [
    "SNAPSHOT_FILENAME",
    "Snapshot",
    "SnapshotModel",
    "check_leaving",
    "check_relatives",
    "models_after",
    "models_served",
    "read_snapshot",
    "snapshot_behind",
    "snapshots_of",
    "versions_brought",
    "versions_needed",
    "write_snapshot",
]

SNAPSHOT_FILENAME = "snapshot.json"
_ID_DIGITS = 16


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
    if place == place.parent:
        raise RepositoryError(
            f"{place} is a whole bucket, and snapshots have to lie outside the repository",
            hint="Keep the repository below a path of the bucket, for instance .../models.",
        )
    return place.parent / f"{place.name}.snapshots"


def read_snapshot(root: Location, chosen: str) -> Snapshot | None:
    """Read what a snapshot holds; `None` when there is none of that id, or it is incomplete.

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
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise RepositoryError(
            f"{place / SNAPSHOT_FILENAME} is damaged: {type(exc).__name__}: {exc}",
            hint="Deploy a version from the repository; that writes a new snapshot.",
        ) from exc
    return Snapshot(chosen, place, models, created=False)


def snapshot_behind(repository: Location, url: str, served_by: str) -> Snapshot:
    """Read the snapshot that a cluster serves, from beside the repository.

    Args:
        repository: the repository, as this machine sees it.
        url: the snapshot's, as the cluster sees it.
        served_by: the target, for the message.

    Raises:
        RepositoryError: it is not there or damaged: what the other models serve is not known, and must not change.
    """
    root = snapshots_of(repository)
    found = read_snapshot(root, url.rstrip("/").rpartition("/")[2])
    if found is None:
        raise RepositoryError(
            f"{served_by} serves the snapshot {url}, and {root} does not have it, so the versions of its other models "
            "are not known",
            hint="Give --repository the repository that it was made from; its snapshots are beside it.",
        )
    return found


def models_served(
    repository: Location, url: str, snapshots: str, served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Mapping[str, tuple[int, ...]], Location]:
    """Return what a cluster serves, model -> versions, and where the files of it are.

    What a snapshot holds is read from the snapshot: annotations are copied, restored and edited by others. A cluster
    that serves the repository itself has the versions that its policies select.

    Args:
        repository: the repository, as this machine sees it.
        url: what is served, as the cluster sees it.
        snapshots: where snapshots are, as the cluster sees them.
        served_by: the target, for messages.
        load: the models that are loaded of the repository itself, or `*`.

    Raises:
        RepositoryError: a snapshot is served that cannot be read.
    """
    if is_snapshot(url, snapshots):
        held = snapshot_behind(repository, url, served_by)
        return held.models, held.location
    entries = scan(repository, deep=False)
    named = set(load)
    if "*" not in load:
        ensembles = ensembles_in(open_store(repository))
        named.update(part for each in load for part in models_needed_by(ensembles, each))
    wanted = [entry for entry in entries if "*" in load or entry.name in named]
    return {entry.name: entry.selected for entry in wanted if entry.selected}, repository


def check_leaving(
    context: Context, held: Mapping[str, tuple[int, ...]], served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Check, ...]:
    """Check whether a cluster can do without a model or a version.

    Args:
        context: of the roll-out.
        held: what the cluster serves, model -> versions.
        served_by: the target, for messages.
        load: the models that its pods name to load, or `*`.
    """
    name, before = context.name, held.get(context.name, ())
    after = context.remaining(before)
    if after or not before:
        return context.check_pinned(before, after)
    needed = check_needed(context.what, [each for each in dependents_of(context.ensembles, name) if each in held])
    if len(held) == 1:
        what = f"{name} is all that {served_by} serves, and Triton has nothing to serve without it"
        needed += (Check("models", Outcome.REFUSED, what, "Scale it to nothing, or remove it from the cluster."),)
    if name in load:
        what = f"the pods of {served_by} load {name} by name (--load-model={name})"
        needed += (Check("models", Outcome.REFUSED, what, "Take it out of the chart's models.load first."),)
    return needed


def models_after(context: Context, held: Mapping[str, tuple[int, ...]], source: Location) -> tuple[SnapshotModel, ...]:
    """Return what the snapshot of a roll-out holds: what is served, with the new version in the place of the old.

    Of an undeployment, it is what is served without what leaves.

    Models that the new version needs and that are not served come along, with the versions that their policies serve,
    else the newest, and so do versions that ensembles ask for by number: a server does not become ready with an
    ensemble that lacks a part.

    Args:
        context: of the roll-out.
        held: models and versions that are served.
        source: where their files are.
    """
    repository, name, version = context.repository, context.name, context.version
    found = {other: SnapshotModel(other, versions, source) for other, versions in held.items() if other != name}
    if context.leaves:
        left = context.remaining(held.get(name, ()))
        return (*found.values(), *([SnapshotModel(name, left, source)] if left else ()))
    keep = context.options.keep_previous
    others_of_it = [v for v in held.get(name, ()) if keep and v != version]
    kept = {*others_of_it[-1:], *(v for v in others_of_it if v in context.pinned)}
    found[name] = SnapshotModel(name, tuple(sorted({version, *kept})), repository)
    for needed, versions in versions_brought(context, held).items():
        found[needed] = SnapshotModel(needed, versions, repository)
    return tuple(found.values())


def versions_brought(context: Context, held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return what `models_after` adds of the models that the new version needs; arguments as there."""
    wanted = {} if context.leaves else versions_needed(context, held)
    return {needed: versions for needed, versions in wanted.items() if versions != held.get(needed)}


def versions_needed(context: Context, held: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the versions of each model that the new version needs; a model without versions is left out.

    Args:
        context: of the roll-out.
        held: models and versions that are served already, and stay.
    """
    within = {each: context.ensembles[each] for each in (*context.needs, context.name) if each in context.ensembles}
    found: dict[str, tuple[int, ...]] = {}
    for needed in context.needs:
        entry = find_model(context.repository, needed)
        existing = tuple(each.version for each in entry.versions)
        served = (held or {}).get(needed) or entry.selected or existing[-1:]
        if wanted := {*served, *(pinned_versions(within, needed).keys() & set(existing))}:
            found[needed] = tuple(sorted(wanted))
    return found


def check_relatives(
    context: Context, models: Sequence[SnapshotModel], served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Check, ...]:
    """Check whether pods will serve the model and whatever it needs.

    Args:
        context: of the roll-out.
        models: what the snapshot holds.
        served_by: the target, for messages.
        load: the models that its pods name to load, or `*`. With an ensemble Triton loads its parts, never what a
            model's code asks.
    """
    name = context.name
    needs = models_needed_by(context.ensembles, name)
    lacking = [each for each in needs if each not in {model.name for model in models}]
    if lacking:
        what = f"{name} needs {', '.join(lacking)}, which neither the repository nor {served_by} has"
        return (Check("models", Outcome.REFUSED, what, "Add it to the repository first: repo-manager add, or copy."),)
    if "*" in load:
        return ()
    steps = {each: config for each, config in context.ensembles.items() if is_ensemble(config)}
    loaded = {*load, *(part for each in load for part in models_needed_by(steps, each))}
    silent = [each for each in (*needs, name) if each not in loaded]
    if not silent:
        return ()
    what = f"the pods of {served_by} load {', '.join(load)} by name and would not load {', '.join(silent)}"
    hint = f"Add {', '.join(silent)} to what they load: the chart's models.load, or --load-model."
    return (Check("models", Outcome.REFUSED, what, hint),)


def write_snapshot(
    root: Location, models: Sequence[SnapshotModel], *, signed_by: Sequence[Path] = (), dry_run: bool = False
) -> Snapshot:
    """Write a snapshot, unless it is there.

    On disk the versions' files are hard links where the file system has them (they never change), else copies.
    From and to object storage they pass through this machine, one version at a time, each file compared with its
    manifest.

    Args:
        root: where the snapshots are.
        models: what it holds.
        signed_by: keys one of which has to vouch for each version; empty asks for no signature. Versions of an earlier
            snapshot were checked when they came into it.
        dry_run: only say which it would be.

    Raises:
        RepositoryError: a model or version is missing, a version has no manifest, or the place cannot be written.
    """
    _check_signatures(root, models, signed_by)
    contents = {model.name: _content(model) for model in models}
    identity = json.dumps({name: content.identity for name, content in sorted(contents.items())}, sort_keys=True)
    chosen = hashlib.sha256(identity.encode()).hexdigest()[:_ID_DIGITS]
    target = root / chosen
    held = {model.name: model.versions for model in sorted(models, key=lambda model: model.name)}
    record = json.dumps({"schema_version": 1, "id": chosen, "models": held}, indent=1).encode() + b"\n"
    store = open_store(target, may_be_new=True)
    if dry_run or store.read(SNAPSHOT_FILENAME) is not None:
        return Snapshot(chosen, target, held, created=False)
    with disk_errors(f"write the snapshot {target}"):
        folder = local_folder(target)
        if folder is not None:
            _write_folder(folder, contents, record)
        else:
            _write_objects(store, contents, record)
    _check_signatures(root, models, signed_by)  # what was copied meanwhile is what was vouched for
    return Snapshot(chosen, target, held, created=True)


def _check_signatures(root: Location, models: Sequence[SnapshotModel], keys: Sequence[Path]) -> None:
    for model in models if keys else ():
        if not str(model.source).startswith(f"{root}/"):
            check_served(model.source, model.name, model.versions, keys)


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a model's folder in a snapshot holds: small files by content, versions by their manifests."""

    source: Store
    small: Mapping[str, bytes]
    versions: Mapping[int, Manifest]
    identity: Mapping[str, str]


def _content(model: SnapshotModel) -> _Content:
    with disk_errors(f"read {model.name} for a snapshot"):
        source = open_store(model.source)
        view = existing_model(source, model.name)
        if not view.has_config:
            raise RepositoryError(f"{view.place} has no {CONFIG_FILENAME}", hint="repo-manager config writes one.")
        check_version(view, *model.versions)
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
    return _Content(source, small, versions, identity)


def _beside(source: Store, view: ModelView) -> dict[str, bytes]:
    """Read what lies beside the versions: labels, configurations per kind of GPU; not the versions themselves."""
    keys = [entry.name for entry in view.level.files]
    for folder in view.folders:
        if version_number(folder) is None and folder not in view.level.links:
            keys += [f"{folder}/{entry.name}" for entry in walk(source, f"{view.name}/{folder}")[0]]
    read = {key: source.read(f"{view.name}/{key}") for key in keys}
    return {key: data for key, data in read.items() if data is not None}


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
                with content.source.fetch(name, number) as folder:
                    _take_version(folder, staging / name / str(number))
        (staging / SNAPSHOT_FILENAME).write_bytes(record)
        staging.chmod(0o755)
        fsync_tree(staging)
        with contextlib.suppress(OSError):
            staging.rename(target)
        if not (target / SNAPSHOT_FILENAME).is_file():
            raise RepositoryError(f"{target} exists but is incomplete", hint="Delete it and run the command again.")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _take_version(source: Path, target: Path) -> None:
    """Link or copy a version's folder."""

    def take(file: str, place: str) -> str:
        try:
            os.link(file, place, follow_symlinks=False)
        except OSError:  # Another file system, or one without links.
            shutil.copy2(file, place)
        return place

    shutil.copytree(source, target, copy_function=take)


def _write_objects(target: Store, contents: Mapping[str, _Content], record: bytes) -> None:
    for name, content in contents.items():
        for place, data in content.small.items():
            target.put(f"{name}/{place}", data)
        for number, manifest in content.versions.items():
            with content.source.fetch(name, number) as folder:
                for file, expected in manifest.files.items():
                    target.put(f"{name}/{number}/{file}", folder / file, record=expected)
                target.put(f"{name}/{number}/{MANIFEST_FILENAME}", (folder / MANIFEST_FILENAME).read_bytes())
    # Two that write the same snapshot write the same bytes.
    with contextlib.suppress(ChangedMeanwhileError):
        target.put(SNAPSHOT_FILENAME, record, new=True)
