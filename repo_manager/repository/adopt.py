"""Manifests for versions another process wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from repo_manager.errors import ConcurrentChangeError, ConfigError, RepositoryError
from repo_manager.lfs import LFS_HINT, LFS_MOST_BYTES, LFS_POINTER, is_lfs_pointer
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import LocationLike
from repo_manager.repository.look import changeable_model, existing_model, top_names, with_versions
from repo_manager.repository.manifest import MANIFEST_SCHEMA_VERSION, FileRecord, Manifest, manifest_text
from repo_manager.repository.state import now_text
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, Store, model_names
from repo_manager.repository.view import Entry, ModelView, VersionView
from repo_manager.triton_config.completion import backend_of_files, completed_config
from repo_manager.triton_config.config import CONFIG_FILENAME, DEFAULT_FILENAMES, ModelConfig, parse_config
from repo_manager.triton_config.served_signature import runtime_signature
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.types import Backend

__all__ = ["Adoption", "adopt", "derived_config", "without_config"]

_LISTED_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Adoption:
    """A version about to get a manifest.

    Attributes:
        name: name of the version's model.
        version: number of the version, from its folder's name. The manifest states it.
        manifest: its new record, made from the files as they are now.
        served: whether the policy serves it. A running server loads it again at its next load, because its folder
            changed.
        applied: whether the manifest was written.
    """

    name: str
    version: int
    manifest: Manifest
    served: bool
    applied: bool


def adopt(repository: LocationLike, name: str | None = None, *, dry_run: bool = False) -> tuple[Adoption, ...]:
    """Write a manifest into each version without one, from its files as they are now.

    Nothing else changes. The record says `"adopted": true`: the origin of the content is unknown.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: one model. `None`: all. A failed one does not stop the others.
        dry_run: only list the manifests to write.

    Raises:
        RepositoryError: no such model, or a version holds links or special files, whose content can change unseen, or
            Git LFS pointers. Of all models, after the others were adopted.
        ConfigError: the named model's config.pbtxt is broken.
    """
    with disk_errors(f"adopt versions in {repository}"):
        store = open_store(repository)
        if name is not None:
            return tuple(_adopt_model(store, name, dry_run))
        names = [folder for folder in store.list_level().folders if not folder.startswith(".")]
        found: list[Adoption] = []
        problems: list[str] = []
        for each in names:
            try:
                found += _adopt_model(store, each, dry_run)
            except (RepositoryError, ConfigError) as exc:
                problems.append(f"{each}: {exc.message}")
    if problems:
        raise RepositoryError(
            f"{len(problems)} of {len(names)} models cannot be adopted; " + "; ".join(problems[:_LISTED_PROBLEMS]),
            hint=f"The others are done ({len(found)} versions). Correct these and adopt again.",
        )
    return tuple(found)


def without_config(repository: LocationLike, name: str | None = None) -> tuple[str, ...]:
    """Return the models with versions and without config.pbtxt.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: name of one model. `None`: all models.
    """
    store = open_store(repository)
    names = model_names(store) if name is None else (name,)
    views = [store.look(each) for each in names]
    return tuple(view.name for view in views if view.exists and view.versions and not view.has_config)


def derived_config(repository: LocationLike, name: str) -> ModelConfig:
    """Return the configuration a server derives for a model without config.pbtxt, from its newest version.

    Raises:
        RepositoryError: no such model.
        ConfigError: only the server's backend can derive it.
        ModelError: ONNX Runtime does not take the model.
    """
    store = open_store(repository)
    view = with_versions(store, existing_model(store, name))
    newest = max(view.contents, default=None)
    if newest is None:
        raise ConfigError(f"{name} has no version to derive a configuration from")
    backend = backend_of_files(top_names(view.contents[newest]), view.name)
    if backend != Backend.ONNXRUNTIME:
        raise ConfigError(
            f"{name} has no {CONFIG_FILENAME}, and only a server's {backend or 'backend'} can derive one",
            hint=f"Load it on a server, then: repo-manager adopt {name} --write-config --to URL",
        )
    with store.fetch(name, newest, compare=False) as folder:
        return completed_config(parse_config(""), runtime_signature(folder / DEFAULT_FILENAMES[backend]))


def _adopt_model(store: Store, name: str, dry_run: bool) -> list[Adoption]:
    view = with_versions(store, changeable_model(store, name))

    def record(version: VersionView, entry: Entry) -> FileRecord:
        key = f"{name}/{version.number}/{entry.name}"
        if entry.size_bytes <= LFS_MOST_BYTES and is_lfs_pointer(store.read(key) or b""):
            raise RepositoryError(f"{key} is {LFS_POINTER}", hint=LFS_HINT)
        return store.digest(key, entry)

    plans = _plan(view, record)
    if dry_run or not plans:
        return plans
    with store.exclusive(name):
        _check_unchanged(view, with_versions(store, changeable_model(store, name)), plans)
        highest = max(plan.version for plan in plans)
        store.change_state(name, lambda state: state.numbered(highest))
        for plan in plans:
            try:
                key = f"{name}/{plan.version}/{MANIFEST_FILENAME}"
                store.put(key, manifest_text(plan.manifest).encode(), new=True)
            except ChangedMeanwhileError as exc:
                raise ConcurrentChangeError(
                    f"{name}:{plan.version} was adopted by somebody else at this moment", hint="Run the command again."
                ) from exc
    return [dataclasses.replace(plan, applied=True) for plan in plans]


def _check_unchanged(read: ModelView, now: ModelView, plans: list[Adoption]) -> None:
    """Check that versions still hold the files read for their manifests: another process may still be writing them.

    Raises:
        RepositoryError: the files of a version have changed.
    """
    for plan in plans:
        before, after = read.contents[plan.version], now.contents.get(plan.version)
        if after is None or (after.files, after.has_manifest) != (before.files, before.has_manifest):
            found = "it is gone"
            if after is not None:
                sizes = {entry.name: entry.size_bytes for entry in before.files}
                changed = [entry.name for entry in after.files if sizes.pop(entry.name, None) != entry.size_bytes]
                found = ", ".join([*changed, *sizes]) or MANIFEST_FILENAME
            raise ConcurrentChangeError(
                f"{plan.name}:{plan.version} was changed by somebody else at the same time: {found}",
                hint="Nothing was written. Adopt again when its files are complete.",
            )


def _plan(view: ModelView, record: Callable[[VersionView, Entry], FileRecord]) -> list[Adoption]:
    """Make a manifest for each version of a model without one. Nothing is written.

    Raises:
        RepositoryError: a version holds links or special files.
        ConfigError: config.pbtxt is broken.
    """
    config = view.parsed_config() if view.has_config else parse_config("")
    served = served_versions(config, view.versions)
    return [
        Adoption(view.name, version.number, _manifest(version, config, record), version.number in served, False)
        for version in view.contents.values()
        if not version.has_manifest
    ]


def _manifest(
    version: VersionView, config: ModelConfig, record: Callable[[VersionView, Entry], FileRecord]
) -> Manifest:
    for entry in version.files:
        _check_encodable(version, entry)
        if not entry.regular:
            raise RepositoryError(
                f"{version.path / entry.name} is a link or a special file, and a manifest of it would prove nothing",
                hint="Put the content itself there.",
            )
    return Manifest(
        schema_version=MANIFEST_SCHEMA_VERSION,
        model=version.path.parent.name,
        version=version.number,
        created=now_text(),
        backend=config.backend,
        precision=None,
        files={entry.name: record(version, entry) for entry in version.files},
        config=config.text,
        extra={"adopted": True},
    )


def _check_encodable(version: VersionView, entry: Entry) -> None:
    """Refuse a name other than text: a manifest is."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as exc:
        raise RepositoryError(
            f"{version.path} holds a file whose name is not UTF-8: {entry.name!r}",
            hint="Rename it; a manifest cannot name it.",
        ) from exc
