"""Taking versions out: never what is served or can be gone back to, unless told; by one rename each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import write_atomic
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import open_repository
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import existing_versions
from repo_manager.repository.signing_files import drop_signatures
from repo_manager.repository.state import (
    ModelState,
    change_state,
    current_version,
    previous_version,
    read_state,
    repository_lock,
)
from repo_manager.repository.stores.staging import discard, staged
from repo_manager.triton_config import CONFIG_FILENAME, parse_config, replace_version_policy, version_policy
from repo_manager.triton_config.config import read_config_text
from repo_manager.triton_config.version_policy import served_by

__all__ = [
    "Removal",
    "folder_size_bytes",
    "forget",
    "plan_removal",
    "reasons_to_keep",
    "remove",
    "remove_selected",
    "select_version",
]


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a removal does, or did.

    Attributes:
        name: the model.
        versions: the versions to remove, ascending.
        whole_model: whether the model's folder goes as well.
        size_bytes: what is freed.
        in_use: removed all the same because it was told so: one sentence each.
        applied: whether it was done; false for a dry run.
    """

    name: str
    versions: tuple[int, ...]
    whole_model: bool
    size_bytes: int
    in_use: tuple[str, ...]
    applied: bool


def remove(
    repository: Path, name: str, version: int | None = None, *, force: bool = False, dry_run: bool = False
) -> Removal:
    """Remove one version, or a whole model.

    A version disappears by one rename; its number is not given out again. A running server keeps serving what it has
    loaded until it is told to load or unload.

    Args:
        repository: the root.
        name: the model.
        version: its number; `None`: the model with all its versions.
        force: also when it is served, tagged or a roll-back target. A served version is taken out of the policy first.
        dry_run: only say what would be done.

    Raises:
        RepositoryError: no such model or version, or it is in use, or nothing else would be left to serve.
    """

    def select(folder: Path, _: ModelState) -> tuple[int, ...]:
        return select_version(name, version, existing_versions(folder))

    return remove_selected(repository, name, select, whole=version is None, force=force, dry_run=dry_run)


def select_version(name: str, version: int | None, existing: tuple[int, ...]) -> tuple[int, ...]:
    """Return the versions that a removal means: one, or all of them.

    Raises:
        RepositoryError: there is no such version.
    """
    if version is None:
        return existing
    if version not in existing:
        raise RepositoryError(
            f"model {name!r} has no version {version}; it has {', '.join(map(str, existing)) or 'none'}",
            hint=f"`repo-manager show {name}` lists them.",
        )
    return (version,)


def remove_selected(
    repository: Path,
    name: str,
    select: Callable[[Path, ModelState], tuple[int, ...]],
    *,
    whole: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Removal:
    """Remove the versions that `select` names; it is asked under the repository's lock.

    Args:
        repository: the root.
        name: the model.
        select: the model's folder and state to the versions to remove; each must exist.
        whole: remove the model's folder as well.
        force: also what is in use.
        dry_run: only say what would be done.

    Raises:
        RepositoryError: as `remove`.
    """
    with disk_errors(f"remove versions of {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        if dry_run:
            return plan_removal(root, folder, select(folder, read_state(root, name)), whole, force)
        with staged(root) as staging, repository_lock(root):
            plan = plan_removal(root, folder, select(folder, read_state(root, name)), whole, force)
            _apply(root, folder, staging, plan)
    return dataclasses.replace(plan, applied=True)


def reasons_to_keep(folder: Path, state: ModelState) -> dict[int, list[str]]:
    """Return for each version why it is in use; versions that nothing needs are left out.

    Raises:
        ConfigError: config.pbtxt is broken, so nobody can say what is served.
    """
    existing = existing_versions(folder)
    reasons: dict[int, list[str]] = {}
    config = folder / CONFIG_FILENAME
    policy = (
        version_policy(parse_config(read_config_text(config), where=str(config))) if config.exists() else "latest:1"
    )
    for version in served_by(policy, existing):
        reasons.setdefault(version, []).append("is served")
    for tag, version in state.tags.items():
        reasons.setdefault(version, []).append(f"has the tag {tag!r}")
    current, previous = current_version(state), previous_version(state, existing)
    if current is not None:
        reasons.setdefault(current, []).append("was deployed last")
    if previous is not None:
        reasons.setdefault(previous, []).append("is what a roll-back goes back to")
    return {version: reasons[version] for version in existing if version in reasons}


def folder_size_bytes(path: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(os.lstat(Path(folder, file)).st_size for folder, _, files in os.walk(path) for file in files)


def plan_removal(root: Path, folder: Path, versions: tuple[int, ...], whole: bool, force: bool) -> Removal:
    """Say what removing these versions means.

    Raises:
        RepositoryError: one is in use, or nothing else would be left to serve.
    """
    name = folder.name
    reasons = reasons_to_keep(folder, read_state(root, name)) if versions else {}
    in_use = tuple(f"{name}:{v} {' and '.join(reasons[v])}" for v in versions if v in reasons)
    if in_use and not force:
        raise RepositoryError(
            "in use: " + "; ".join(in_use), hint="Deploy another version or remove the tag first, or use --force."
        )
    left = [version for version in existing_versions(folder) if version not in versions]
    whole = whole or not left
    if not whole and versions and not _served_after(folder, versions):
        raise RepositoryError(
            f"without version {', '.join(map(str, versions))} model {name!r} would serve nothing",
            hint=f"Deploy one of its versions {', '.join(map(str, left))} first, or remove the whole model.",
        )
    size_bytes = folder_size_bytes(folder) if whole else sum(folder_size_bytes(folder / str(v)) for v in versions)
    return Removal(name, tuple(sorted(versions)), whole, size_bytes, in_use, applied=False)


def _served_after(folder: Path, removed: tuple[int, ...]) -> tuple[int, ...]:
    path = folder / CONFIG_FILENAME
    policy = version_policy(parse_config(read_config_text(path), where=str(path))) if path.exists() else "latest:1"
    return served_by(policy, [version for version in existing_versions(folder) if version not in removed])


def _apply(root: Path, folder: Path, staging: Path, plan: Removal) -> None:
    """Policy first, then the record, then the files: after a crash at any point the rest is still right."""
    highest = max((*plan.versions, *existing_versions(folder)), default=0)
    if plan.whole_model:
        change_state(root, plan.name, lambda s: forget(s, (), highest, whole=True), staging=staging)
        discard(folder, staging)
        drop_signatures(root, ((plan.name, version) for version in plan.versions))
        return
    if not plan.versions:
        return
    path = folder / CONFIG_FILENAME
    if path.exists():
        text = read_config_text(path)
        policy = version_policy(parse_config(text, where=str(path)))
        if isinstance(policy, tuple) and set(policy) & set(plan.versions):
            left = [version for version in policy if version not in plan.versions]
            write_atomic(path, replace_version_policy(text, left, where=str(path)).encode(), staging=staging)
    change_state(root, plan.name, lambda s: forget(s, plan.versions, highest, whole=False), staging=staging)
    for version in plan.versions:
        discard(folder / str(version), staging)
        drop_signatures(root, ((plan.name, version),))


def forget(state: ModelState, versions: tuple[int, ...], highest: int, *, whole: bool) -> ModelState:
    """Keep the numbers given out; drop tags, and for a whole model its history, which points at nothing now."""
    state = state.numbered(highest)
    if whole:
        return dataclasses.replace(state, tags={}, deployments=())
    return dataclasses.replace(state, tags={tag: v for tag, v in state.tags.items() if v not in versions})
