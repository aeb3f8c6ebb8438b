"""Changing config.pbtxt by hand's choice: checked first, shown as a diff, written by one rename."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

from repo_manager.errors import ConfigError, ModelError, RepositoryError
from repo_manager.files import write_atomic
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, open_repository
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import existing_versions
from repo_manager.repository.state import repository_lock
from repo_manager.repository.stores.staging import staged
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    ModelConfig,
    Problem,
    ReloadEffect,
    Severity,
    changed_fields,
    check_config,
    check_rules,
    parse_config,
    reload_effect,
    runtime_signature,
    same_signature,
    served_versions,
    set_fields,
)
from repo_manager.triton_config.config import read_config_text
from repo_manager.types import Backend

__all__ = ["ConfigChange", "change_config", "change_with", "edit_config", "edit_with"]


@dataclasses.dataclass(frozen=True)
class ConfigChange:
    """A change of a config.pbtxt, done or planned.

    Attributes:
        name: the model.
        before: the file's text as it was.
        after: the file's text as it is to be.
        fields: the top-level fields that differ.
        effect: what a running server does at its next load, by Triton's reload rules.
        reloaded: the served versions that it would load again.
        problems: what is wrong with the new configuration; an error keeps it from being written.
        applied: whether it was written.
    """

    name: str
    before: str
    after: str
    fields: tuple[str, ...]
    effect: ReloadEffect
    reloaded: tuple[int, ...]
    problems: tuple[Problem, ...]
    applied: bool

    @property
    def diff(self) -> str:
        """The change as a unified diff; empty when there is none."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), CONFIG_FILENAME, f"{CONFIG_FILENAME} (new)", lineterm=""
        )
        return "\n".join(lines)


def change_config(
    repository: Path, name: str, changes: Mapping[str, str | None], *, dry_run: bool = False
) -> ConfigChange:
    """Set or clear single fields of a model's config.pbtxt.

    Only the text of the top-level fields that change is written anew; comments and unknown fields elsewhere stay.

    Args:
        repository: the root.
        name: the model.
        changes: `field.field` -> the value as it stands in a config.pbtxt, `None` to clear it. `instance_group.count`
            is the first group's, `instance_group[1].count` the second's, `parameters.KEY` a parameter's string.
        dry_run: only check and say what would change.

    Raises:
        ConfigError: a field does not exist, a value does not fit, or the result would not load.
        RepositoryError: no such model, or the disk refuses.
    """
    return change_with(repository, name, changes, dry_run=dry_run, models=True)


def edit_config(repository: Path, name: str, text: str, *, dry_run: bool = False) -> ConfigChange:
    """Replace a model's config.pbtxt by a new text, as it is.

    Raises:
        ConfigError: it is no model configuration, or would not load.
        RepositoryError: no such model, or the disk refuses.
    """
    return edit_with(repository, name, text, dry_run=dry_run, models=True)


def change_with(
    repository: Path, name: str, changes: Mapping[str, str | None], *, dry_run: bool, models: bool
) -> ConfigChange:
    """As `change_config`; with `models` the result is checked against the ONNX files, else against the manifests."""
    with disk_errors(f"change the configuration of {name}"):
        root = open_repository(repository)
        path = existing_model(root, name) / CONFIG_FILENAME
        before = read_config_text(path)
        return _write(root, path, before, set_fields(before, changes, where=str(path)), dry_run, models)


def edit_with(repository: Path, name: str, text: str, *, dry_run: bool, models: bool) -> ConfigChange:
    """As `edit_config`; with `models` the text is checked against the ONNX files, else against the manifests."""
    with disk_errors(f"change the configuration of {name}"):
        root = open_repository(repository)
        path = existing_model(root, name) / CONFIG_FILENAME
        before = read_config_text(path) if path.exists() else ""
        return _write(root, path, before, text, dry_run, models)


def _write(root: Path, path: Path, before: str, after: str, dry_run: bool, models: bool) -> ConfigChange:
    change = _plan(path, before, after, models)
    errors = [problem for problem in change.problems if problem.severity == Severity.ERROR]
    if errors and not dry_run:
        raise ConfigError(
            f"{path} would not load any more:\n  " + "\n  ".join(problem.what for problem in errors),
            hint="Nothing was written.",
        )
    if dry_run or before == after:
        return change
    with staged(root) as staging, repository_lock(root):
        if (read_config_text(path) if path.exists() else "") != before:
            raise RepositoryError(f"{path} was changed meanwhile", hint="Run the command again.")
        write_atomic(path, after.encode(), staging=staging)
    return dataclasses.replace(change, applied=True)


def _plan(path: Path, before: str, after: str, models: bool) -> ConfigChange:
    new = parse_config(after, where=str(path))
    try:
        old: ModelConfig | None = parse_config(before, where=str(path))
    except ConfigError:
        old = None  # Whatever it was, the new one replaces it.
    existing = existing_versions(path.parent)
    served = served_versions(new, existing)
    known = set(old.unknown_fields) if old is not None else set()
    problems = [
        Problem(path.name, f"field {field!r} is not in Triton's schema")
        for field in new.unknown_fields
        if field not in known
    ]
    problems += _checked(path.parent, new, existing, served, models)
    effect = ReloadEffect.RELOAD if old is None else reload_effect(old, new)
    fields = changed_fields(old, new) if old is not None else ()
    reloaded = served if effect == ReloadEffect.RELOAD else ()
    return ConfigChange(path.parent.name, before, after, fields, effect, reloaded, tuple(problems), applied=False)


def _checked(
    folder: Path, config: ModelConfig, existing: tuple[int, ...], served: tuple[int, ...], models: bool
) -> list[Problem]:
    """Check a configuration against its folder and every version that it would serve."""
    problems = check_rules(config, where=CONFIG_FILENAME)
    if config.name not in ("", folder.name):
        problems.append(Problem(CONFIG_FILENAME, f"name is {config.name!r}; the folder's is {folder.name!r}"))
    if existing and not served:
        problems.append(Problem(CONFIG_FILENAME, f"the version policy serves none of {existing}"))
    for label_file in config.label_filenames:
        if not (folder / label_file).is_file():
            problems.append(Problem(CONFIG_FILENAME, f"label file {label_file!r} does not exist"))
    for version in served:
        file = folder / str(version) / config.model_filename
        if not config.model_filename or config.message().cc_model_filenames:
            continue
        if not file.exists():
            problems.append(Problem(str(version), f"version {version} has no file {config.model_filename!r}"))
        elif not models:
            problems += _against_manifest(folder / str(version), config, version)
        elif config.backend == Backend.ONNXRUNTIME and not config.message().model_operations.op_library_filename:
            problems += _against_model(file, config, version)
    return problems


def _against_manifest(version_folder: Path, config: ModelConfig, version: int) -> list[Problem]:
    """Compare with the configuration that was derived from the model when it was published."""
    try:
        text = read_manifest(version_folder).config
    except RepositoryError:
        return []  # Nobody wrote down what this version is; `verify` says so.
    if not text:
        return []
    return [
        Problem(str(version), difference)
        for difference in same_signature(config, parse_config(text, where=f"{version}/{MANIFEST_FILENAME}"))
        if not difference.startswith("max_batch_size")  # A person may lower or raise it.
    ]


def _against_model(file: Path, config: ModelConfig, version: int) -> list[Problem]:
    try:
        return check_config(config, runtime_signature(file, config), where=str(version))
    except ModelError as exc:
        return [Problem(str(version), exc.message)]
