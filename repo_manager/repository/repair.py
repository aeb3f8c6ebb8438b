"""Putting right what can be put right without guessing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory, sha256_file, write_atomic
from repo_manager.repository.disk import copy_durably, disk_errors
from repo_manager.repository.layout import STATE_FILENAME, model_path, open_repository
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import FileRecord, read_manifest
from repo_manager.repository.scan import ModelEntry, find_model, scan
from repo_manager.repository.state import change_state, read_states, repository_lock
from repo_manager.repository.stores.staging import staged, sweep
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    format_config,
    parse_config,
    replace_version_policy,
    with_version_policy,
)
from repo_manager.triton_config.config import read_config_text

__all__ = ["Repair", "config_repair", "find_content", "repair"]


@dataclasses.dataclass(frozen=True)
class Repair:
    """One thing that was put right, or would be.

    Attributes:
        where: path below the root.
        action: what is done.
        applied: whether it was done.
    """

    where: str
    action: str
    applied: bool


@dataclasses.dataclass(frozen=True)
class _Step:
    where: str
    action: str
    apply: Callable[[Path], None]


def repair(
    repository: Path, name: str | None = None, *, copies: tuple[Location, ...] = (), dry_run: bool = False
) -> tuple[Repair, ...]:
    """Repair a repository; `verify` afterwards says what is left.

    Put right are: what dead commands left behind; a damaged state file (set aside, numbers go on from what is on
    disk); a missing config.pbtxt (from the newest manifest); a policy that names missing versions beside existing
    ones; files that are missing or differ from their manifest, where another version or a repository of `copies`
    holds the same content. Files that a manifest does not list stay: they may be somebody's.

    Args:
        repository: the root.
        name: one model; `None`: all.
        copies: other repositories to take content from.
        dry_run: only say what would be done.

    Raises:
        RepositoryError: no such repository or model, or the disk refuses.
    """
    folders = tuple(copy for copy in copies if isinstance(copy, Path))
    if len(folders) < len(copies):
        raise RepositoryError(
            "a repository on disk cannot take damaged files straight from object storage",
            hint="Bring the version here first: repo-manager copy NAME:VERSION -r URL --into DIR; then use --copy DIR.",
        )
    with disk_errors(f"repair {repository}"):
        root = open_repository(repository)
        steps = [*_state_steps(root)]
        names = [entry.name for entry in scan(root, deep=False)] if name is None else [name]
        for model in names:
            steps += _model_steps(root / model, find_model(root, model), folders)
        if not dry_run:
            with staged(root) as staging, repository_lock(root):
                for step in steps:
                    step.apply(staging)
            steps += [_Step(entry, "removed what a dead command had left", lambda _: None) for entry in sweep(root)]
    return tuple(Repair(step.where, step.action, applied=not dry_run) for step in steps)


def _state_steps(root: Path) -> Iterator[_Step]:
    try:
        read_states(root)
    except RepositoryError:

        def set_aside(staging: Path) -> None:
            (root / STATE_FILENAME).rename(root / f"{STATE_FILENAME}.damaged")
            for entry in scan(root, deep=False):
                highest = max((version.version for version in entry.versions), default=0)
                change_state(root, entry.name, lambda state, n=highest: state.numbered(n), staging=staging)  # type: ignore[misc]

        yield _Step(STATE_FILENAME, f"set aside as {STATE_FILENAME}.damaged and begun anew from the folders", set_aside)


def _model_steps(folder: Path, model: ModelEntry, copies: tuple[Path, ...]) -> Iterator[_Step]:
    yield from _config_steps(folder, model)
    for entry in model.versions:
        if entry.manifest is None:
            continue
        for name, record in entry.manifest.files.items():
            file = folder / str(entry.version) / name
            if _is(file, record):
                continue
            source = find_content(folder, record, copies)
            if source is not None:
                where = f"{model.name}/{entry.version}/{name}"
                yield _Step(where, f"restored from {source}", _restorer(source, file, record))


def _config_steps(folder: Path, model: ModelEntry) -> Iterator[_Step]:
    found = config_repair(folder, model)
    if found is not None:
        action, text = found
        yield _Step(f"{model.name}/{CONFIG_FILENAME}", action, _writer(folder / CONFIG_FILENAME, text))


def config_repair(folder: Path, model: ModelEntry) -> tuple[str, str] | None:
    """Say what has to be done with a model's config.pbtxt and give its new text; `None` when nothing can be.

    Args:
        folder: the model's.
        model: the same, as `find_model` gives it.
    """
    path = folder / CONFIG_FILENAME
    where = f"{model.name}/{CONFIG_FILENAME}"
    numbers = [entry.version for entry in model.versions]
    manifests = [entry.manifest for entry in model.versions if entry.manifest is not None and entry.manifest.config]
    if not path.exists():
        if not manifests:
            return None
        newest = manifests[-1]
        text = format_config(with_version_policy(parse_config(newest.config), (newest.version,)))
        return f"written from the manifest of version {newest.version}", text
    if isinstance(model.policy, tuple):
        left = [version for version in model.policy if version in numbers]
        if left and len(left) < len(model.policy):
            text = replace_version_policy(read_config_text(path), left, where=where)
            return f"policy {list(model.policy)} -> {left}, the versions that exist", text
    return None


def find_content(folder: Path, record: FileRecord, copies: tuple[Path, ...]) -> Path | None:
    """Find a file whose content is right, read to the end, in this model's versions or a copy's."""
    places = [folder]
    for copy in copies:
        with contextlib.suppress(RepositoryError):
            places.append(model_path(open_repository(copy), folder.name))
    for place in places:
        for manifest_file in sorted(place.glob("*/manifest.json")) if place.is_dir() else ():
            with contextlib.suppress(RepositoryError):
                for name, other in read_manifest(manifest_file.parent).files.items():
                    candidate = manifest_file.parent / name
                    if other == record and _is(candidate, record):
                        return candidate
    return None


def _is(file: Path, record: FileRecord) -> bool:
    try:
        return (
            file.is_file()
            and not file.is_symlink()
            and file.stat().st_size == record.size_bytes
            and sha256_file(file) == record.sha256
        )
    except OSError:
        return False


def _writer(path: Path, text: str) -> Callable[[Path], None]:
    return lambda staging: write_atomic(path, text.encode(), staging=staging)


def _restorer(source: Path, file: Path, record: FileRecord) -> Callable[[Path], None]:
    def restore(staging: Path) -> None:
        ready = staging / "restored"
        if FileRecord(*copy_durably(source, ready)) != record:
            raise RepositoryError(f"{source} was changed meanwhile")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.resolve() != file.parent:
            raise RepositoryError(f"{file.parent} leads through a symbolic link", hint="Put the content itself there.")
        ready.replace(file)
        fsync_directory(file.parent)

    return restore
