"""The right to change a model's served versions, where no kernel keeps a lock: an entry with a holder and an end."""

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
    """Another process holds the lease."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


@contextlib.contextmanager
def object_lease(client: ObjectClient, name: str, *, timeout_s: float) -> Iterator[Callable[[], str]]:
    """Hold a model's lease, an entry of its ledger, renewed while the block runs.

    A dead holder of this machine is replaced. So is one of another machine whose lease is not renewed for a minute
    while this process looks on: the clocks of two machines may differ, and may jump. All of it is compare-and-swap, so
    there is one holder at most. It gives a function for the present other holder, empty while there is none.

    Args:
        client: the open store with the model's ledger, asked often during a wait.
        name: model whose served versions the block changes.
        timeout_s: deadline of the call in seconds.

    Raises:
        LockHeldError: another process holds it for longer than `timeout_s`. Where its time is up by this machine's
            clock, the minute is waited for.
    """
    keeper = _Keeper(client, name, _acquire(client, name, time.monotonic() + timeout_s))
    keeper.start()
    try:
        yield keeper.other
    finally:
        keeper.end()


class _Watch:
    """Looks on whether a holder renews its lease.

    Attributes:
        renewed: it was renewed, or went to another holder, since the first look.
    """

    def __init__(self) -> None:
        self.renewed = False
        self._seen, self._since = "", 0.0

    def is_silent(self, other: Holder) -> bool:
        """Say whether a lease has been the same for as long as one lasts."""
        told, now = repr(other), time.monotonic()
        if told != self._seen:
            self.renewed = bool(self._seen)
            self._seen, self._since = told, now
        return now - self._since >= _LEASE_S


def _acquire(client: ObjectClient, name: str, deadline: float) -> Holder:
    watch = _Watch()
    while True:
        holder = Holder.me(_LEASE_S)

        def take(ledger: Ledger, holder: Holder = holder) -> Ledger:
            other = ledger.lease
            if other is not None and other.token != holder.token:
                is_dead = other.is_known and not other.alive
                if not is_dead and not watch.is_silent(other):
                    raise _HeldError(other)
            return dataclasses.replace(ledger, lease=holder)

        try:
            change_ledger(client, name, take)
            return holder
        except _HeldError as exc:
            is_doubtful = not exc.holder.alive and not watch.renewed
            if time.monotonic() >= deadline and not is_doubtful:
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
            # On an error, the next round tries again. Every write of the roll-out checks the lease anyway.
            with contextlib.suppress(RepositoryError):
                self._set(self._holder.renewed(_LEASE_S))

    def other(self) -> str:
        """Return who else holds the lease by now. Empty while no other process does.

        Raises:
            RepositoryError: the store cannot be read.
        """
        lease = read_ledger(self._client, self._model).lease
        return "" if lease is None or lease.token == self._holder.token else str(lease)

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
