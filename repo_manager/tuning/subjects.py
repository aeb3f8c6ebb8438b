"""The subjects of a tuning: models under load, and the models they are made of, as they are in the repository."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.scan import ModelEntry, find_model
from repo_manager.repository.transfer import version_files
from repo_manager.rollout.reference import DEFAULT_TOLERANCE
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.ensembles import is_ensemble, steps_of, uses_of
from repo_manager.triton_config.fields import set_fields
from repo_manager.tuning.space import Setting, setting_of

__all__ = ["Subject", "Subjects", "read_subjects"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model in the version measured.

    Attributes:
        name: its name in the repository. Copies have others, by `Copies.named`.
        version: number of the version measured.
        written: the configuration as the repository has it.
        config: the same with the fields fixed in advance: today's, for the tuning.
        files: path in a copy's folder -> file.
        profile: batch sizes the engine was built for: the one its kernels were chosen for, and the largest. `None`
            where it is no engine, or nothing is recorded.
        tolerance: of its answers, as recorded with the version.
    """

    name: str
    version: int
    written: ModelConfig
    config: ModelConfig
    files: Mapping[str, Path]
    profile: tuple[int, int] | None = None
    tolerance: float = DEFAULT_TOLERANCE

    @property
    def size_bytes(self) -> int:
        """Size of the version's files."""
        return sum(path.stat().st_size for place, path in self.files.items() if place.startswith("1/"))


@dataclasses.dataclass(frozen=True)
class Subjects:
    """All models of a tuning.

    Attributes:
        tops: names of the models put under load. Others are parts of ensembles.
        models: name -> model, needed models first.
        tunable: the models whose configuration is searched: all but ensembles.
    """

    tops: tuple[str, ...]
    models: Mapping[str, Subject]
    tunable: tuple[str, ...]

    @property
    def title(self) -> str:
        """Return the models asked, with their versions."""
        return ", ".join(f"{name}:{self.models[name].version}" for name in self.tops)

    def today(self) -> dict[str, Setting]:
        """Return today's setting of each tunable model."""
        return {name: setting_of(self.models[name].config) for name in self.tunable}


def read_subjects(
    repository: Location,
    versions: Mapping[str, int],
    fixed: Mapping[str, str | None],
    stack: contextlib.ExitStack,
) -> Subjects:
    """Read models and their parts. Their files are there until the stack ends.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        versions: model -> the version measured.
        fixed: field of config.pbtxt, or MODEL:FIELD -> its value. `None` clears it. Without a model it is set in each
            tunable one.
        stack: keeps files from object storage.

    Raises:
        UsageError: a model is of an untunable kind.
        RepositoryError: there is no such model or version, or it has no config.pbtxt.
        ConfigError: a fixed field does not fit.
    """
    found: dict[str, Subject] = {}
    for name, version in versions.items():
        _read(repository, name, version, found, stack)
    tunable = tuple(name for name, subject in found.items() if not is_ensemble(subject.config))
    models = {name: _fixed(subject, fixed, is_tunable=name in tunable) for name, subject in found.items()}
    unknown = {key.partition(":")[0] for key in fixed if ":" in key} - set(models)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UsageError(f"--set {names}:...: no such model is tuned", hint=f"Models: {', '.join(models)}.")
    for name in tunable:
        setting_of(models[name].config, name)
    return Subjects(tuple(versions), models, tunable)


def _read(
    repository: Location, name: str, version: int | None, found: dict[str, Subject], stack: contextlib.ExitStack
) -> None:
    """Add a model after those it needs."""
    entry = find_model(repository, name)
    config = entry.config()
    if config is None:
        raise RepositoryError(
            f"{name} has no config.pbtxt", hint=f"Write one: repo-manager adopt {name} --write-config"
        )
    if uses_of(config):
        raise UsageError(
            f"the code of {name} asks other models by name ({', '.join(uses_of(config))}); a copy would ask those that "
            "are served",
            hint="Tune the models it asks.",
        )
    for step in steps_of(config):
        if step.model not in found:
            _read(repository, step.model, step.version, found, stack)
        elif step.version not in (None, found[step.model].version):
            raise UsageError(f"{name} asks for two versions of {step.model}, of which a copy has one")
    number = version if version is not None else max(entry.selected, default=0)
    files = {} if is_ensemble(config) else _files(repository, entry, number, stack)
    profile, tolerance = _recorded(files)
    found[name] = Subject(name, number, config, config, files, profile, tolerance)


def _files(repository: Location, entry: ModelEntry, version: int, stack: contextlib.ExitStack) -> dict[str, Path]:
    number = next((each for each in entry.versions if each.version == version), None)
    if number is None:
        raise RepositoryError(f"{entry.name} has no version {version}", hint=f"See: repo-manager show {entry.name}")
    files = _below(stack.enter_context(version_files(number.path)), "1")
    local = local_folder(repository)
    if local is not None:
        for path in (local / entry.name).iterdir():
            if not path.name.isdigit() and path.name != CONFIG_FILENAME and not path.name.startswith("."):
                files |= _below(path, path.name) if path.is_dir() else {path.name: path}
    return files


def _below(folder: Path, place: str) -> dict[str, Path]:
    return {f"{place}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*")) if path.is_file()}


def _recorded(files: Mapping[str, Path]) -> tuple[tuple[int, int] | None, float]:
    """Return the batch sizes of the engine's profile and the tolerance of answers, from the version's manifest."""
    path = files.get(f"1/{MANIFEST_FILENAME}")
    if path is None:
        return None, DEFAULT_TOLERANCE
    try:
        manifest = read_manifest(path)
    except RepositoryError:  # a file of this name by another tool
        return None, DEFAULT_TOLERANCE
    golden = manifest.golden if isinstance(manifest.golden, Mapping) else {}
    tolerance = golden.get("tolerance")
    profile = _profile(manifest.extra.get("engine"))
    return profile, float(tolerance) if isinstance(tolerance, int | float) else DEFAULT_TOLERANCE


def _profile(engine: Any) -> tuple[int, int] | None:
    """Return the batch size an engine's kernels were chosen for, and the largest it takes."""
    try:
        ranges: Sequence[Any] = list(engine["build"]["profile"].values())
        return min(each["opt"][0] for each in ranges), min(each["max"][0] for each in ranges)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):  # no engine, or no batch axis
        return None


def _fixed(subject: Subject, fixed: Mapping[str, str | None], *, is_tunable: bool) -> Subject:
    own: dict[str, str | None] = {}
    for key, value in fixed.items():
        model, mark, field = key.rpartition(":")
        if (mark and model == subject.name) or (not mark and is_tunable):
            own[field] = value
    text = set_fields(format_config(subject.written), own, where=CONFIG_FILENAME)
    return dataclasses.replace(subject, config=parse_config(text))
