"""Repairs possible without guessing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from repo_manager.errors import ConcurrentChangeError, ConfigError, RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import LocationLike
from repo_manager.repository.look import existing_model, with_versions
from repo_manager.repository.manifest import FileRecord
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, RepairKind, RepairStep, Store, model_names
from repo_manager.repository.view import Entry, ModelView, VersionView
from repo_manager.triton_config.config import CONFIG_FILENAME, format_config, parse_config
from repo_manager.triton_config.version_policy import replace_version_policy, version_policy, with_version_policy

__all__ = ["Repair", "repair"]


@dataclasses.dataclass(frozen=True)
class Repair:
    """One thing put right, or would be.

    Attributes:
        where: path below the root, or the name of a leftover.
        action: the repair in words, such as `restored from PATH`.
        applied: whether it was done. False for a dry run.
    """

    where: str
    action: str
    applied: bool


def repair(
    repository: LocationLike, name: str | None = None, *, copies: tuple[LocationLike, ...] = (), dry_run: bool = False
) -> tuple[Repair, ...]:
    """Repair a repository. `verify` afterwards lists the remaining faults.

    It removes the leftovers of dead commands. It sets a damaged record aside, and continues with the number after the
    highest version. It writes a missing config.pbtxt from the newest manifest. It takes missing versions out of a
    policy with existing ones in it. It replaces files missing or different from their manifest, if another version or
    a repository of `copies` holds the content. Files no manifest lists stay.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the one model to repair, beside leftovers outside the models. `None`: all.
        copies: other repositories to take content from.
        dry_run: only list the repairs. Behind a damaged record in object storage more may follow.

    Raises:
        RepositoryError: no such repository or model, or the store refuses.
    """
    with disk_errors(f"repair {repository}"):
        store = open_store(repository)
        places = [store, *(open_store(copy, may_be_new=True) for copy in copies)]
        if name is not None:
            _check_there(store, name)
        done: list[Repair] = []
        for step in _steps(store, name, places):
            if not dry_run:
                step.apply()
            done.append(Repair(step.where, step.action, applied=not dry_run))
    return tuple(done)


def _check_there(store: Store, name: str) -> None:
    """Check whether there is anything of a model to repair.

    Raises:
        RepositoryError: neither a folder nor a record of the model exists.
    """
    try:
        view = store.look(name)
    except RepositoryError:
        return  # a damaged record: the repair handles it
    if not view.work:
        existing_model(store, name)


def _steps(store: Store, name: str | None, places: list[Store]) -> Iterator[RepairStep]:
    """List the repairs in their order: each step sees the effect of the earlier ones."""
    names = model_names(store) if name is None else (name,)
    yield from store.mend(names)
    for model in names:
        try:
            view = store.look(model)
        except RepositoryError:
            continue  # a damaged record: a dry run does not repair it
        if view.exists:
            view = with_versions(store, view)
            yield from _config_steps(store, view)
            yield from _file_steps(store, view, places)


def _config_steps(store: Store, view: ModelView) -> Iterator[RepairStep]:
    found = _config_repair(view)
    if found is None:
        return
    action, text = found

    def write() -> bool:
        try:
            store.replace_if(view, {CONFIG_FILENAME: text.encode()})
        except ChangedMeanwhileError as exc:
            raise ConcurrentChangeError(
                f"{view.config_place} was changed at the same time", hint="Run the command again."
            ) from exc
        return True

    yield RepairStep(f"{view.name}/{CONFIG_FILENAME}", action, RepairKind.CONTENT, write)


def _config_repair(view: ModelView) -> tuple[str, str] | None:
    """Describe the repair of a model's config.pbtxt and give its new text. `None` when nothing can be."""
    if not view.has_config:
        for version in reversed(list(view.contents.values())):
            with contextlib.suppress(RepositoryError):
                manifest = version.manifest()
                if manifest.config:
                    text = format_config(with_version_policy(parse_config(manifest.config), (manifest.version,)))
                    return f"written from the manifest of version {manifest.version}", text
        return None
    try:
        policy = version_policy(view.parsed_config())
    except ConfigError:
        return None
    if isinstance(policy, tuple):
        left = [version for version in policy if version in view.versions]
        if left and len(left) < len(policy):
            text = replace_version_policy(view.config_text(), left, where=f"{view.name}/{CONFIG_FILENAME}")
            return f"policy {list(policy)} -> {left}, the existing versions", text
    return None


def _file_steps(store: Store, view: ModelView, places: list[Store]) -> Iterator[RepairStep]:
    for version in view.contents.values():
        for name, record in _records(version).items():
            key = f"{view.name}/{version.number}/{name}"
            if _holds(store, key, _entry_of(version, name), record):
                continue
            found = _find(places, view.name, record)
            if found is not None:
                place, number, file = found
                where = place.location / f"{view.name}/{number}/{file}"
                yield RepairStep(
                    key, f"restored from {where}", RepairKind.CONTENT, _restorer(store, key, record, found)
                )


def _records(version: VersionView) -> Mapping[str, FileRecord]:
    with contextlib.suppress(RepositoryError):
        return version.manifest().files
    return {}


def _entry_of(version: VersionView, name: str) -> Entry | None:
    return next((entry for entry in version.files if entry.name == name), None)


def _holds(store: Store, key: str, entry: Entry | None, record: FileRecord) -> bool:
    """Return whether a file has the expected content, read to its end."""
    if entry is None or not entry.regular or entry.size_bytes != record.size_bytes:
        return False
    try:
        return store.digest(key, entry) == record
    except OSError:
        return False


def _find(places: list[Store], name: str, record: FileRecord) -> tuple[Store, int, str] | None:
    """Find a file of this model, in any version in any place, whose content is right."""
    for place in places:
        with contextlib.suppress(RepositoryError):
            for version in with_versions(place, existing_model(place, name)).contents.values():
                for file, other in _records(version).items():
                    entry = _entry_of(version, file)
                    key = f"{name}/{version.number}/{file}"
                    if other == record and entry is not None and _holds(place, key, entry, record):
                        return place, version.number, file
    return None


def _restorer(store: Store, key: str, record: FileRecord, found: tuple[Store, int, str]) -> Callable[[], bool]:
    place, version, file = found

    def restore() -> bool:
        with place.fetch(key.partition("/")[0], version, (file,)) as folder:
            store.put(key, folder / file, record=record)
        return True

    return restore
