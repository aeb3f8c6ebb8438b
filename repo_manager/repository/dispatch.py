"""One name for each operation, wherever the repository is: a folder, or a prefix in object storage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from repo_manager.repository.location import Location, ObjectRepository

__all__ = ["by_location"]

P = ParamSpec("P")
R = TypeVar("R")


def by_location(
    on_disk: Callable[Concatenate[Path, P], R], in_objects: Callable[Concatenate[ObjectRepository, P], R]
) -> Callable[Concatenate[Location, P], R]:
    """Return a function that calls the one for a folder or the one for object storage, by its first argument.

    Its name and its documentation are those of `on_disk`; both do the same.
    """

    @functools.wraps(on_disk)
    def call(repository: Location, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if isinstance(repository, ObjectRepository):
            return in_objects(repository, *args, **kwargs)
        return on_disk(repository, *args, **kwargs)

    return call
