"""Changing config.pbtxt: each write is compared with the earlier read."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from repo_manager.errors import ConcurrentChangeError, ConfigError, ModelError, RepositoryError
from repo_manager.files import sha256_file
from repo_manager.optional import installed_version
from repo_manager.repository.ensembles import problems_around
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location, LocationLike
from repo_manager.repository.look import changeable_model, with_beside, with_versions
from repo_manager.repository.plan.configuration import (
    ConfigChange,
    against_manifest,
    missing_for_gpus,
    plan_change,
    served_model_file,
)
from repo_manager.repository.plan.removal import check_versions_exist
from repo_manager.repository.scan import find_model
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, Store
from repo_manager.repository.tags import end_trial, model_state
from repo_manager.repository.view import ModelView, VersionView
from repo_manager.triton_config.compare import changed_fields, check_config
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.fields import set_fields
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.served_signature import runtime_signature
from repo_manager.triton_config.text_fields import replace_field, top_level_fields
from repo_manager.triton_config.version_policy import replace_version_policy, served_versions
from repo_manager.types import Backend

__all__ = [
    "change_config",
    "edit_config",
    "is_as_derived",
    "read_config_bytes",
    "replace_config",
    "set_served_versions",
    "settle_trial",
    "touch_config",
    "write_config_bytes",
]

R = TypeVar("R")
_ATTEMPTS = 20
_POLICY = "version_policy"
_TICK_S = 0.05
# Fields that the backend does not compare with the model.
_BESIDE_TENSORS = frozenset({"name", "instance_group", "version_policy", "dynamic_batching", "model_warmup"})


def change_config(
    repository: LocationLike, name: str, changes: Mapping[str, str | None], *, dry_run: bool = False
) -> ConfigChange:
    """Set or clear single fields of a model's config.pbtxt.

    Only the changed fields are rewritten. Comments and unknown fields stay, within the same field as well. The result
    is checked against the ONNX files it would serve. In object storage, where they would have to be fetched, against
    the signatures recorded in the manifests.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model to change. It must have a config.pbtxt, and be no symbolic link.
        changes: `field.field` -> the value as it is in a config.pbtxt, `None` to clear it. `instance_group.count` is
            the first group's, `instance_group[1].count` the second's, `parameters.KEY` a parameter's string.
        dry_run: only check and list the changes.

    Raises:
        ConfigError: a field does not exist, a value does not fit, or the result would not load.
        RepositoryError: no such model, another process changed it at this moment, or the store refuses.
    """
    with disk_errors(f"change the configuration of {name}"):
        store = open_store(repository)
        view = with_beside(store, changeable_model(store, name))
        before = view.config_text()
        return _change(store, view, before, set_fields(before, changes, where=view.config_place), dry_run)


def edit_config(
    repository: LocationLike, name: str, text: str, *, based_on: str | None = None, dry_run: bool = False
) -> ConfigChange:
    """Replace a model's config.pbtxt by a new text, as it is. Checked as by `change_config`.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model to change. It may have a broken config.pbtxt, or none.
        text: the whole file as it will be. Nothing of the present one is kept.
        based_on: the text changed to it. `None` replaces unconditionally.
        dry_run: only check and list the changes.

    Raises:
        ConfigError: it is no model configuration, or would not load.
        RepositoryError: no such model, another process changed it since it was `based_on` or at this moment, or the
            store refuses.
    """
    with disk_errors(f"change the configuration of {name}"):
        store = open_store(repository)
        view = with_beside(store, changeable_model(store, name))
        before = view.config_text() if view.has_config else ""
        if based_on is not None and before != based_on:
            raise ConcurrentChangeError(
                f"{view.config_place} was changed by somebody else at the same time{_fields_between(based_on, before)}"
            )
        return _change(store, view, before, text, dry_run)


def _fields_between(old: str, new: str) -> str:
    """Return the differing fields, as the end of a sentence. Empty if a text is no configuration."""
    with contextlib.suppress(ConfigError):
        fields = changed_fields(parse_config(old), parse_config(new))
        return f": {', '.join(fields)}" if fields else ""
    return ""


def replace_config(
    target: LocationLike, name: str, text: str, beside: Mapping[str, bytes], *, dry_run: bool = False
) -> ConfigChange:
    """Give a model another config.pbtxt with the files it names, except for its version policy.

    Args:
        target: the repository to write to: a folder, or a URL of object storage.
        name: model in `target`. It must have a config.pbtxt already.
        text: new text of config.pbtxt. The present version policy stays in its place.
        beside: label files and variants: path in the model's folder -> content.
        dry_run: only check and list the changes.

    Raises:
        ConfigError: the existing versions would not load with it.
        RepositoryError: no such model, another process changed it at this moment, or the store refuses.
    """
    with disk_errors(f"change the configuration of {name}"):
        store = open_store(target)
        view = with_beside(store, changeable_model(store, name))
        before = view.config_text()
        policy = [
            field.value(before) for field in top_level_fields(before, where=view.config_place) if field.name == _POLICY
        ]
        after = replace_field(text, _POLICY, f"{_POLICY} {policy[0]}" if policy else "", where=view.config_place)
        overlaid = dataclasses.replace(view, beside={**view.beside, **beside})
        return _change(store, overlaid, before, after, dry_run, beside)


def _change(
    store: Store, view: ModelView, before: str, after: str, dry_run: bool, beside: Mapping[str, bytes] | None = None
) -> ConfigChange:
    change = plan_change(view, before, after)
    new = parse_config(after, where=view.config_place)
    problems = (*change.problems, *_against_versions(store, view, new), *problems_around(store, view, new))
    change = dataclasses.replace(change, problems=problems)
    errors = [problem for problem in problems if problem.severity == Severity.ERROR]
    if errors and not dry_run:
        raise ConfigError(
            f"{view.config_place} would not load any more:\n  " + "\n  ".join(problem.what for problem in errors),
            hint="Nothing was written.",
        )
    if dry_run or (before == after and not beside):
        return change
    try:
        store.replace_if(view, {**(beside or {}), CONFIG_FILENAME: after.encode()})
    except ChangedMeanwhileError as exc:
        raise ConcurrentChangeError(
            f"{view.config_place} was changed at the same time", hint="Run the command again."
        ) from exc
    return dataclasses.replace(change, applied=True)


def _against_versions(store: Store, view: ModelView, config: ModelConfig) -> list[Problem]:
    """Check a configuration against every version it would serve."""
    filename = served_model_file(config)
    by_gpu = bool(config.message().cc_model_filenames)
    if not filename and not by_gpu:
        return []
    served = served_versions(config, view.versions)
    problems: list[Problem] = []
    for number, version in with_versions(store, view, served).contents.items():
        if by_gpu:
            problems += [
                Problem(str(number), f"version {number}: {file} {said}", Severity.WARNING, rule="model-file-missing")
                for file, said in missing_for_gpus(version, config).items()
            ]
        elif not version.holds(filename):
            problems.append(
                Problem(str(number), f"version {number} has no file {filename!r}", rule="model-file-missing")
            )
        elif store.traits.remote:
            problems += against_manifest(version, config)
        elif config.backend == Backend.ONNXRUNTIME and not config.message().model_operations.op_library_filename:
            with store.fetch(view.name, number) as folder:
                if is_as_derived(version, config, folder / filename):
                    continue
                try:
                    problems += check_config(config, runtime_signature(folder / filename, config), where=str(number))
                except ModelError as exc:
                    problems.append(Problem(str(number), exc.message, rule="model-unreadable"))
    return problems


def settle_trial(repository: Location, name: str, report: Callable[[str], None]) -> bool:
    """Take a version out of config.pbtxt a killed roll-out has left there. The caller holds the model's lease.

    The record stays until the next roll-out is proven, or undone: servers may serve the version still.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model whose record may hold a version on trial.
        report: called with one line per step.

    Returns:
        Whether there was one.

    Raises:
        RepositoryError: no such model, or the store refuses.
    """
    state = model_state(repository, name)
    left = state.unproven
    if left is None:
        return False
    current = find_model(repository, name)
    existing = {each.version for each in current.versions}
    if left.version not in existing:
        end_trial(repository, name)
        return False
    before = tuple(version for version in left.before if version in existing)
    report(f"{name}:{left.version} was on trial since {left.at}: its roll-out was killed before the proof")
    if before and before != current.selected:
        set_served_versions(repository, name, before)
        report(f"config.pbtxt serves version {', '.join(map(str, before))} again")
    return True


def set_served_versions(repository: Location, name: str, versions: Iterable[int]) -> tuple[int, ...]:
    """Change the versions of the next load: one atomic replacement of config.pbtxt.

    Only the `version_policy` field's text changes. Comments, layout and fields of a newer Triton stay. When the file
    already says so it is not touched.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model whose `version_policy` is written. It must have a config.pbtxt.
        versions: the versions to serve. Each must exist.

    Returns:
        The versions served before, ascending.

    Raises:
        RepositoryError: no such model or version, or the store refuses. The file is then as it was.
        ConfigError: config.pbtxt is broken, or `versions` is empty.
    """
    wanted = tuple(sorted(set(versions)))

    def write(store: Store) -> tuple[int, ...]:
        view = changeable_model(store, name)
        check_versions_exist(view, *wanted)
        previous = served_versions(view.parsed_config(), view.versions)
        text = view.config_text()
        changed = replace_version_policy(text, wanted, where=view.config_place)
        if changed != text:
            store.replace_if(view, {CONFIG_FILENAME: changed.encode()}, serves=wanted)
        return previous

    return _insisting(repository, name, write)


def read_config_bytes(repository: Location, name: str) -> bytes | None:
    """Return config.pbtxt as it is. `None` when the model has none, or does not exist.

    Raises:
        RepositoryError: it cannot be read.
    """
    return open_store(repository, may_be_new=True).read(f"{name}/{CONFIG_FILENAME}")


def write_config_bytes(repository: Location, name: str, content: bytes | None) -> None:
    """Restore config.pbtxt. A file already the same is not touched. The last writer wins.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model whose config.pbtxt is restored. It may have none at present.
        content: its bytes. `None`: there was none.

    Raises:
        RepositoryError: the store refuses.
    """

    def write(store: Store) -> None:
        view = store.look(name)
        if view.config != content or view.config_error:
            store.replace_if(view, {CONFIG_FILENAME: content})

    _insisting(repository, name, write)


def touch_config(repository: Location, name: str) -> None:
    """Make config.pbtxt newer than anything a server has seen, so a load looks at the model again.

    Raises:
        RepositoryError: the store refuses.
    """

    def write(store: Store) -> None:
        view = changeable_model(store, name)
        if view.config is not None:
            store.replace_if(view, {CONFIG_FILENAME: view.config})

    _insisting(repository, name, write)


def _insisting(repository: Location, name: str, write: Callable[[Store], R]) -> R:
    """Do it again when another writer came between reading and writing. A lock does not always prevent it."""
    with disk_errors(f"change {CONFIG_FILENAME} of {name}"):
        store = open_store(repository)
        for attempt in range(_ATTEMPTS):
            try:
                with store.exclusive(name):
                    return write(store)
            except ChangedMeanwhileError:
                time.sleep(_TICK_S * (attempt + 1))
        raise ConcurrentChangeError(
            f"{store.location / name / CONFIG_FILENAME} was changed by others {_ATTEMPTS} times in a row",
            hint="Run the command again when no one else changes this model.",
        )


def is_as_derived(version: VersionView, config: ModelConfig, file: Path) -> bool:
    """Return whether a version's model needs no check against the onnxruntime backend's reading of it.

    This holds if the file is the published one, the configuration has the tensors derived from it then, and ONNX
    Runtime has the same release. A load would then find the same tensors.

    Args:
        version: the version, with its manifest.
        config: configuration of the model (config.pbtxt).
        file: the version's model on this machine.
    """
    with contextlib.suppress(RepositoryError, ConfigError, OSError):
        manifest = version.manifest()
        record, release = manifest.files.get(file.name), manifest.tools.get("onnxruntime")
        if record is None or not manifest.config or release is None or release != installed_version("onnxruntime"):
            return False
        published = parse_config(manifest.config, where=MANIFEST_FILENAME)
        if (
            published.unknown_fields
            or config.unknown_fields
            or set(changed_fields(config, published)) - _BESIDE_TENSORS
        ):
            return False
        return sha256_file(file) == record.sha256
    return False
