"""One roll-out of a model at a time: a lock in the repository that dies with its holder, or a lease with an end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository import Location, ObjectRepository
from repo_manager.repository.stores.objects.lease import object_lease

__all__ = ["rollout_lease"]

_POLL_S = 0.02


@contextlib.contextmanager
def rollout_lease(repository: Location, name: str, *, timeout_s: float) -> Iterator[None]:
    """Hold the right to change what is served of a model.

    The lock is a hidden file in the root, where Triton ignores files. The kernel gives it up when
    its holder dies, so a lease never has to be broken by hand.

    Raises:
        RepositoryError: another roll-out of this model holds it for longer than `timeout_s`, or the
            root cannot be written.
    """
    if isinstance(repository, ObjectRepository):
        with object_lease(repository, name, timeout_s=timeout_s):
            yield
        return
    path = repository / f".repo-manager.rollout.{name}.lock"
    deadline = time.monotonic() + timeout_s
    try:
        descriptor = _acquire(path, deadline)
    except OSError as exc:
        raise RepositoryError(
            f"{path} cannot be created: {exc.strerror}", hint="Deploying needs write access."
        ) from exc
    if descriptor is None:
        raise RepositoryError(
            f"another roll-out of {name} is under way (it holds {path})",
            hint="Wait for it to end, then run this command again.",
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, deadline: float) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our opening and our locking it.
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(_POLL_S)
        os.close(descriptor)
