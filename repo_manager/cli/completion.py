"""What the shell completes from a repository: the names of models, their versions and tags.

Only a local repository is looked at, because a person waits for the answer, and every error means no suggestion.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repo_manager.errors import RepoManagerError
from repo_manager.repository import model_state, scan
from repo_manager.repository.location import parse_location
from repo_manager.settings import load_settings

__all__ = ["model_names", "model_versions"]


def model_names(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return the names of the repository's models that begin with the word."""
    try:
        return [name for name in _names(_folder(ctx)) if name.startswith(incomplete)]
    except (RepoManagerError, OSError, ValueError):
        return []


def model_versions(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return names of models, and after `NAME:` the versions and tags of one."""
    name, separator, begun = incomplete.partition(":")
    if not separator:
        return model_names(ctx, args, incomplete)
    try:
        return [f"{name}:{word}" for word in _versions(_folder(ctx), name) if word.startswith(begun)]
    except (RepoManagerError, OSError, ValueError):
        return []


def _folder(ctx: Any) -> Path:
    """Return the command's repository.

    Raises:
        ValueError: it is not on this machine.
    """
    text = ctx.params.get("repository") or load_settings().repository
    place = parse_location(text)
    if not isinstance(place, Path):
        raise ValueError(f"{text} is not local")
    return place


def _names(folder: Path) -> Iterable[str]:
    return (model.name for model in scan(folder, deep=False))


def _versions(folder: Path, name: str) -> Iterable[str]:
    for model in scan(folder, deep=False):
        if model.name == name:
            yield from (str(entry.version) for entry in model.versions)
            yield from sorted(model_state(folder, name).tags)
