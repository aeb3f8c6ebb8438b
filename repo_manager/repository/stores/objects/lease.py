"""The right to change what is served of a model, where no kernel keeps a lock: an entry with a holder and an end."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from repo_manager.errors import LockHeldError, RepositoryError
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.holder import Holder
from repo_manager.repository.stores.objects.ledger import Ledger, change_ledger, read_ledger

__all__ = ["object_lease"]

_LEASE_S = 60.0
_POLL_S = 0.2


class _HeldError(Exception):
    """Somebody else holds the lease."""


@contextlib.contextmanager
def object_lease(client: ObjectClient, name: str, *, timeout_s: float) -> Iterator[Callable[[], str]]:
    """Hold a model's lease, an entry of its ledger, which is renewed while the block runs.

    A holder of this machine that is dead, and any that has not renewed its lease for a minute, is replaced. All of it
    is compare-and-swap, so there is one holder at most. It gives a function that returns who else holds it by now,
    empty while no other process does.

    Raises:
        RepositoryError: another process holds it for longer than `timeout_s`.
    """
    keeper = _Keeper(client, name, _acquire(client, name, time.monotonic() + timeout_s))
    keeper.start()
    try:
        yield keeper.other
    finally:
        keeper.end()


def _acquire(client: ObjectClient, name: str, deadline: float) -> Holder:
    while True:
        holder = Holder.me(_LEASE_S)

        def take(ledger: Ledger, holder: Holder = holder) -> Ledger:
            other = ledger.lease
            if other is not None and other.token != holder.token and other.alive:
                raise _HeldError(str(other))
            return dataclasses.replace(ledger, lease=holder)

        try:
            change_ledger(client, name, take)
            return holder
        except _HeldError as exc:
            if time.monotonic() >= deadline:
                raise LockHeldError(
                    f"another roll-out of {name} is under way ({exc})",
                    hint="Wait for it to end, then run this command again.",
                ) from exc
        time.sleep(_POLL_S)


class _Keeper(threading.Thread):
    """Renews a lease while its holder works, and gives it back at the end."""

    def __init__(self, client: ObjectClient, name: str, holder: Holder) -> None:
        super().__init__(name=f"lease of {name}", daemon=True)
        self._client, self._model, self._holder = client, name, holder
        self._ended = threading.Event()

    def run(self) -> None:
        """Renew it three times a lease."""
        while not self._ended.wait(_LEASE_S / 3):
            # Out of reach: the next round tries again, and every write of the roll-out is compared anyway.
            with contextlib.suppress(RepositoryError):
                self._set(self._holder.renewed(_LEASE_S))

    def other(self) -> str:
        """Return who else holds the lease by now. Empty while no other process does.

        Raises:
            RepositoryError: the store cannot be read.
        """
        lease = read_ledger(self._client, self._model).lease
        return "" if lease is None or lease.token == self._holder.token or not lease.alive else str(lease)

    def end(self) -> None:
        """Give it back. Where the store cannot be reached its end does."""
        self._ended.set()
        self.join()
        with contextlib.suppress(RepositoryError):
            self._set(None)

    def _set(self, holder: Holder | None) -> None:
        def change(ledger: Ledger) -> Ledger:
            mine = ledger.lease is not None and ledger.lease.token == self._holder.token
            return dataclasses.replace(ledger, lease=holder) if mine else ledger

        change_ledger(self._client, self._model, change)
