"""Names for versions, and the way from what a person types to a version."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import open_repository, version_number
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import existing_versions
from repo_manager.repository.state import ModelState, change_state, read_state, repository_lock
from repo_manager.repository.stores.staging import staged

__all__ = [
    "check_tag_target",
    "remove_tag",
    "resolve_in",
    "resolve_version",
    "set_tag",
    "tag_holder",
    "validate_tag",
]

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_RESERVED = ("latest", "all", "newest")  # `serve: newest` of repository.yaml is no tag.


def validate_tag(tag: str) -> str:
    """Return `tag` when it cannot be mistaken for a number or a version policy.

    Raises:
        RepositoryError: it is not valid.
    """
    if not _TAG.fullmatch(tag) or tag in _RESERVED:
        raise RepositoryError(
            f"{tag[:100]!r} cannot be a tag: expected up to 64 letters, digits, '_', '-' and '.', starting with a "
            f"letter or '_', and none of {', '.join(_RESERVED)}"
        )
    return tag


def set_tag(repository: Path, name: str, tag: str, version: int, *, dry_run: bool = False) -> int | None:
    """Give a version a name; a tag stands at one version of a model at a time.

    Returns:
        The version that had the tag before; `None` when none had.

    Raises:
        RepositoryError: the tag is not valid, or there is no such model or version.
    """
    validate_tag(tag)
    with disk_errors(f"tag {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        check_tag_target(name, version, existing_versions(folder))
        before = read_state(root, name).tags.get(tag)
        if not dry_run:
            _change(root, name, lambda s: dataclasses.replace(s, tags={**s.tags, tag: version}), folder, version)
    return before


def remove_tag(repository: Path, name: str, tag: str, *, dry_run: bool = False) -> int:
    """Take a tag away.

    Returns:
        The version that had it.

    Raises:
        RepositoryError: there is no such model or tag.
    """
    with disk_errors(f"untag {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        version = tag_holder(name, tag, read_state(root, name))
        if not dry_run:
            _change(
                root,
                name,
                lambda s: dataclasses.replace(s, tags={t: v for t, v in s.tags.items() if t != tag}),
                folder,
                None,
            )
    return version


def check_tag_target(name: str, version: int, existing: tuple[int, ...]) -> None:
    """Check that a version to tag exists.

    Raises:
        RepositoryError: it does not.
    """
    if version not in existing:
        raise RepositoryError(f"model {name!r} has no version {version} to tag")


def tag_holder(name: str, tag: str, state: ModelState) -> int:
    """Return the version that has a tag.

    Raises:
        RepositoryError: none has.
    """
    if tag not in state.tags:
        raise RepositoryError(f"model {name!r} has no tag {tag!r}; it has {', '.join(state.tags) or 'none'}")
    return state.tags[tag]


def resolve_version(repository: Path, target: str) -> tuple[str, int]:
    """Turn `NAME`, `NAME:VERSION`, `NAME:TAG` or `NAME:latest` into a model and an existing version.

    `NAME` alone is the newest version.

    Raises:
        RepositoryError: there is no such model, version or tag.
    """
    name, _, wanted = target.partition(":")
    with disk_errors(f"look up {target}"):
        root = open_repository(repository)
        existing = existing_versions(existing_model(root, name))
        return name, resolve_in(name, wanted, existing, read_state(root, name))


def resolve_in(name: str, wanted: str, existing: tuple[int, ...], state: ModelState) -> int:
    """Turn a number, a tag, `latest` or nothing into an existing version.

    Raises:
        RepositoryError: there is no such version or tag.
    """
    if not existing:
        raise RepositoryError(f"model {name!r} has no version")
    if wanted in ("", "latest"):
        return existing[-1]
    number = state.tags.get(wanted, version_number(wanted))
    if number is None or number not in existing:
        known = [*map(str, existing), *state.tags]
        raise RepositoryError(
            f"model {name!r} has no version {wanted!r}; it has {', '.join(known)}",
            hint=f"`repo-manager show {name}` lists them.",
        )
    return number


def _change(
    root: Path, name: str, change: Callable[[ModelState], ModelState], folder: Path, version: int | None
) -> None:
    with staged(root) as staging, repository_lock(root):
        if version is not None and version not in existing_versions(folder):
            raise RepositoryError(f"model {name!r} has no version {version} any more")
        change_state(root, name, change, staging=staging)
