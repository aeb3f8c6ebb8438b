"""Looking at a repository: its models and their versions, ours or anybody's."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.files import read_regular
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, find_folder, is_folder, open_repository, version_number
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import Manifest, read_manifest
from repo_manager.triton_config import CONFIG_FILENAME, ModelConfig, parse_config, version_policy
from repo_manager.triton_config.text_fields import canonical_values
from repo_manager.triton_config.version_policy import policy_of_text, served_by

__all__ = ["ModelEntry", "VersionEntry", "existing_versions", "find_model", "model_entry", "scan"]


_PLAIN_STRING = re.compile(r'"[^"\\]+"')


@dataclasses.dataclass(frozen=True)
class VersionEntry:
    """A version's folder.

    Attributes:
        version: its number.
        model_path: the folder of its model.
        manifest: its record; `None` when there is none, it cannot be read, or the scan was not deep.
        size_bytes: of all its files; `None` when the scan was not deep.
        problems: what is wrong at first sight; `verify` looks closer.
    """

    version: int
    model_path: Location = dataclasses.field(repr=False, metadata={"json": False})
    manifest: Manifest | None = None
    size_bytes: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def path(self) -> Location:
        """The version's folder. `version_files` gives what is in it, wherever it is."""
        return self.model_path / str(self.version)


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model's folder.

    Attributes:
        name: the model.
        path: the folder.
        backend: as config.pbtxt states it; empty when it does not.
        max_batch_size: as config.pbtxt states it.
        policy: the specific versions, `"latest:n"` or `"all"`.
        served_versions: what a load serves now, ascending.
        versions: ascending.
        problems: what is wrong at first sight.
        config_text: config.pbtxt as it was read; `None` when there is none, or it cannot be read.
    """

    name: str
    path: Location
    backend: str
    max_batch_size: int
    policy: tuple[int, ...] | str
    served_versions: tuple[int, ...]
    versions: tuple[VersionEntry, ...]
    problems: tuple[str, ...] = ()
    config_text: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})

    def config(self) -> ModelConfig | None:
        """Return what config.pbtxt says; `None` when there is none.

        Raises:
            ConfigError: it is broken.
        """
        if self.config_text is None:
            return None
        return parse_config(self.config_text, where=str(self.path / CONFIG_FILENAME))

    def version(self, number: int) -> VersionEntry:
        """Return a version.

        Raises:
            RepositoryError: there is none of that number.
        """
        for entry in self.versions:
            if entry.version == number:
                return entry
        raise RepositoryError(
            f"model {self.name!r} has no version {number}; "
            f"it has {', '.join(str(entry.version) for entry in self.versions) or 'none'}",
            hint=f"`repo-manager show {self.name}` lists them.",
        )


def scan(repository: Path, *, deep: bool = True) -> tuple[ModelEntry, ...]:
    """List a repository's models, by name. Hidden folders are left out; `verify` reports them.

    Args:
        repository: the root.
        deep: read each version's manifest and sizes as well. Without it 10,000 models of 10 versions take about a
            second.

    Raises:
        RepositoryError: the root is no readable folder. A broken model is listed with its problems.
    """
    with disk_errors(f"list {repository}"):
        root = open_repository(repository)
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry))
        found = (_model(root, name, deep=deep) for name in names)
        return tuple(entry for entry in found if entry is not None)


def find_model(repository: Path, name: str) -> ModelEntry:
    """Return one model with all its versions.

    Raises:
        RepositoryError: there is none of that name.
    """
    with disk_errors(f"look at {name}"):
        root = open_repository(repository)
        entry = _model(root, name, deep=True) if find_folder(root, name) is not None else None
        if entry is None:
            raise RepositoryError(f"{root} has no model {name!r}", hint="`repo-manager list` shows the models.")
        return entry


def existing_versions(folder: Path) -> tuple[int, ...]:
    """Return the numbers of a model's versions, ascending.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        numbers = [version_number(entry.name) for entry in entries if is_folder(entry)]
    return tuple(sorted(number for number in numbers if number is not None))


def _model(root: Path, name: str, *, deep: bool) -> ModelEntry | None:
    """Look at a model; `None` when it was removed since its name was read."""
    path = root / name
    problems: list[str] = []
    try:
        numbers = existing_versions(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        return ModelEntry(name, path, "", 0, "latest:1", (), (), (f"cannot be read: {exc.strerror}",))
    text = None
    try:
        text = _config_text(path / CONFIG_FILENAME)
    except ConfigError as exc:
        problems.append(exc.message)
    versions = tuple(_version(path, number, deep=deep) for number in numbers)
    return model_entry(path, text, versions, problems)


def model_entry(
    path: Location, text: str | None, versions: tuple[VersionEntry, ...], problems: Sequence[str]
) -> ModelEntry:
    """Put together what is known of a model.

    Args:
        path: its folder.
        text: its config.pbtxt; `None` when there is none that can be read.
        versions: ascending.
        problems: what was found so far.
    """
    found = list(problems)
    backend, max_batch_size, policy = "", 0, "latest:1"  # type: str, int, tuple[int, ...] | str
    try:
        if text is not None:
            backend, max_batch_size, policy = _facts(text)
    except ConfigError as exc:
        found.append(exc.message)
    numbers = tuple(entry.version for entry in versions)
    if not numbers:
        found.append("has no version")
    served = served_by(policy, numbers)
    if numbers and not served:
        found.append(f"serves no version: the policy asks for {policy}, and there are {numbers}")
    return ModelEntry(path.name, path, backend, max_batch_size, policy, served, versions, tuple(found), text)


def _version(model: Path, number: int, *, deep: bool) -> VersionEntry:
    if not deep:
        return VersionEntry(number, model)
    path = model / str(number)
    manifest, size_bytes, problems = None, 0, []
    try:
        if (path / MANIFEST_FILENAME).exists():
            manifest = read_manifest(path)
        size_bytes = sum(os.lstat(Path(folder, file)).st_size for folder, _, files in os.walk(path) for file in files)
    except RepositoryError as exc:
        problems.append(exc.message)
    except FileNotFoundError:
        problems.append("was removed meanwhile")
    return VersionEntry(number, model, manifest, size_bytes, tuple(problems))


def _config_text(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except FileNotFoundError:
        raise ConfigError(f"has no {CONFIG_FILENAME}; Triton derives one where the backend can") from None
    except OSError as exc:
        raise ConfigError(f"{CONFIG_FILENAME} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{CONFIG_FILENAME} cannot be read: {exc}") from exc


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
