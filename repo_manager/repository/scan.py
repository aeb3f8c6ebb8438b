"""Looking at a repository: its models and their versions, ours or anybody's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from repo_manager.errors import ConfigError, RepositoryError, StoreUnreachableError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import Location, LocationLike
from repo_manager.repository.look import each, existing_model, with_versions
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store
from repo_manager.repository.view import ModelView
from repo_manager.summary import Summarized
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.text_fields import canonical_values
from repo_manager.triton_config.version_policy import policy_of_text, served_by, version_policy

__all__ = ["ModelEntry", "VersionEntry", "find_model", "scan"]

_PLAIN_STRING = re.compile(r'"[^"\\]+"')


@dataclasses.dataclass(frozen=True)
class VersionEntry:
    """A version's folder.

    Attributes:
        version: number of the version, from 1.
        model_path: the folder of its model.
        manifest: its record. `None` when there is none, it cannot be read, or the scan was not deep.
        size_bytes: of all its files. `None` when the scan was not deep.
        problems: faults visible at first sight. `verify` looks closer.
    """

    version: int
    model_path: Location = dataclasses.field(repr=False, metadata={"json": False})
    manifest: Manifest | None = None
    size_bytes: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def path(self) -> Location:
        """The version's folder. `version_files` gives its files on any store."""
        return self.model_path / str(self.version)


@dataclasses.dataclass(frozen=True, repr=False)
class ModelEntry(Summarized):
    """A model's folder.

    Attributes:
        name: name of the model, which is its folder's.
        path: place of the model's folder.
        backend: as config.pbtxt states it. Empty when it does not.
        max_batch_size: as config.pbtxt states it. 0 where it states none, is missing or broken.
        policy: the specific versions, `"latest:n"` or `"all"`.
        selected: the versions the version policy selects for a load, ascending.
        versions: the versions in it, served or not, ascending.
        problems: faults visible at first sight.
        config_text: config.pbtxt as it was read. `None` when there is none, or it cannot be read.
    """

    name: str
    path: Location
    backend: str
    max_batch_size: int
    policy: tuple[int, ...] | str
    selected: tuple[int, ...]
    versions: tuple[VersionEntry, ...]
    problems: tuple[str, ...] = ()
    config_text: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})

    def _summary(self) -> Mapping[str, Any]:
        return {
            "model": self.name,
            "versions": ", ".join(str(entry.version) for entry in self.versions) or "none",
            "selected": ", ".join(map(str, self.selected)) or "none",
            "backend": self.backend or None,
            "problems": "; ".join(self.problems) or None,
        }

    def config(self) -> ModelConfig | None:
        """Return the configuration in config.pbtxt. `None` when there is none.

        Raises:
            ConfigError: it is broken.
        """
        if self.config_text is None:
            return None
        return parse_config(self.config_text, where=str(self.path / CONFIG_FILENAME))

    def version(self, number: int) -> VersionEntry:
        """Return a version.

        Raises:
            RepositoryError: no version has this number.
        """
        for entry in self.versions:
            if entry.version == number:
                return entry
        raise RepositoryError(
            f"model {self.name!r} has no version {number}; "
            f"it has {', '.join(str(entry.version) for entry in self.versions) or 'none'}",
            hint=f"`repo-manager show {self.name}` lists them.",
        )


def scan(repository: LocationLike, *, deep: bool = True) -> tuple[ModelEntry, ...]:
    """List a repository's models, by name. Hidden folders are left out. `verify` reports them.

    In object storage it takes one listing of the root and three small requests a model, many at a time.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        deep: read each version's manifest and sizes as well. Without it 10,000 models of 10 versions on a disk take
            about a second.

    Raises:
        RepositoryError: the root cannot be read, or the store stops answering. A broken model is listed with its
            problems.
    """
    with disk_errors(f"list {repository}"):
        store = open_store(repository)
        names = [name for name in store.list_level().folders if not name.startswith(".")]
        found = each(store, lambda name: _entry_or_none(store, name, deep=deep), names)
        return tuple(entry for entry in found if entry is not None)


def find_model(repository: LocationLike, name: str) -> ModelEntry:
    """Return one model with all its versions.

    Raises:
        RepositoryError: no model has this name.
    """
    with disk_errors(f"look at {name}"):
        store = open_store(repository)
        return _entry(with_versions(store, existing_model(store, name)))


def _entry_or_none(store: Store, name: str, *, deep: bool) -> ModelEntry | None:
    """Look at a model, perhaps a broken one. `None` when it is none: removed since, or nothing but work under way."""
    try:
        view = store.look(name)
    except OSError as exc:
        return _broken(store, name, f"cannot be read: {exc.strerror or exc}")
    except StoreUnreachableError:
        raise
    except RepositoryError as exc:
        return _broken(store, name, exc.message)
    if not view.exists or (view.work and not view.versions):
        return None
    return _entry(with_versions(store, view)) if deep else _entry(view)


def _broken(store: Store, name: str, problem: str) -> ModelEntry:
    return ModelEntry(name, store.location / name, "", 0, "latest:1", (), (), (problem,))


def _entry(view: ModelView) -> ModelEntry:
    """Return the facts of a model. Its versions with their contents where the view looked into them."""
    problems = [work.sentence for work in view.work if work.abandoned]
    text = None
    backend, max_batch_size, policy = "", 0, "latest:1"  # type: str, int, tuple[int, ...] | str
    try:
        if not view.has_config:
            raise ConfigError(f"has no {CONFIG_FILENAME}; Triton derives one where the backend can")
        if view.config_error:
            raise ConfigError(f"{CONFIG_FILENAME} {view.config_error}")
        text = view.config_text()
        backend, max_batch_size, policy = _facts(text)
    except ConfigError as exc:
        problems.append(exc.message)
    if not view.versions:
        problems.append("has no version")
    served = served_by(policy, view.versions)
    if view.versions and not served:
        problems.append(f"serves no version: the policy asks for {policy}, and there are {view.versions}")
    versions = tuple(_version_entry(view, number) for number in view.versions)
    return ModelEntry(view.name, view.place, backend, max_batch_size, policy, served, versions, tuple(problems), text)


def _version_entry(view: ModelView, number: int) -> VersionEntry:
    version = view.contents.get(number)
    if version is None:
        return VersionEntry(number, view.place)
    manifest, problems = None, []
    try:
        manifest = version.manifest() if version.has_manifest else None
    except RepositoryError as exc:
        problems.append(exc.message)
    return VersionEntry(number, view.place, manifest, version.size_bytes, tuple(problems))


def _facts(text: str) -> tuple[str, int, tuple[int, ...] | str]:
    """Backend, max_batch_size and policy of a config.pbtxt.

    Where the file is laid out as protobuf prints it, they are taken from the text: parsing all of 10,000 files takes
    ten seconds.

    Raises:
        ConfigError: broken.
    """
    values = canonical_values(text)
    backend = "" if values is None else values.get("backend", "")
    max_batch_size = "" if values is None else values.get("max_batch_size", "")
    if values is None or not max_batch_size.isdecimal() or not _PLAIN_STRING.fullmatch(backend):
        config = parse_config(text, where=CONFIG_FILENAME)
        return config.backend, config.max_batch_size, version_policy(config)
    policy = policy_of_text(values["version_policy"]) if "version_policy" in values else "latest:1"
    return backend[1:-1], int(max_batch_size), policy
