"""One roll-out of a model at a time."""

from __future__ import annotations

import contextlib

from repo_manager.repository import Location
from repo_manager.repository.stores import open_store

__all__ = ["rollout_lease"]


def rollout_lease(repository: Location, name: str, *, timeout_s: float) -> contextlib.AbstractContextManager[None]:
    """Hold the right to change what is served of a model, for as long as the block lasts.

    Raises:
        RepositoryError: another roll-out of this model holds it for longer than `timeout_s`, or the
            root cannot be written.
    """
    return open_store(repository).lease(name, timeout_s=timeout_s)
