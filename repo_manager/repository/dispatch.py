"""One name for each operation, wherever the repository is: a folder, or a prefix in object storage.

What is for object storage is imported when it is first used: a repository on disk does not wait for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from repo_manager.repository.location import Location, ObjectRepository

__all__ = ["by_location", "object_function"]

_OBJECTS = "repo_manager.repository.stores.objects"

P = ParamSpec("P")
R = TypeVar("R")


def by_location(on_disk: Callable[Concatenate[Path, P], R], in_objects: str) -> Callable[Concatenate[Location, P], R]:
    """Return a function that calls the one for a folder or the one for object storage, by its first argument.

    Its name and its documentation are those of `on_disk`; both do the same.

    Args:
        on_disk: the function for a folder.
        in_objects: `module.function` in `stores.objects`: the one for object storage, with the same arguments.
    """

    @functools.wraps(on_disk)
    def call(repository: Location, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if isinstance(repository, ObjectRepository):
            return object_function(in_objects)(repository, *args, **kwargs)  # type: ignore[no-any-return]
        return on_disk(repository, *args, **kwargs)

    call.in_objects = in_objects  # type: ignore[attr-defined]
    return call


def object_function(name: str) -> Callable[..., Any]:
    """Return a function of `repository.stores.objects`, by `module.function`."""
    module, _, function = name.partition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{_OBJECTS}.{module}"), function)
    return found
