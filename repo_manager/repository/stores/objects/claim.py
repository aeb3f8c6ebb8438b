"""A version's number, claimed for a publication: drawn from the ledger, renewed while it is in use, found again."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from repo_manager.errors import RepositoryError
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.holder import LEASE_S, Holder
from repo_manager.repository.stores.objects.ledger import Ledger, Pending, change_ledger

__all__ = ["Claim", "ClaimPurpose", "claimed", "is_abandoned"]

_ACTIVE: set[str] = set()
"""Tokens of the claims this process works on."""


def is_abandoned(entry: Pending) -> bool:
    """Return whether nobody works on a version any more, so its rest may be continued or swept."""
    mine = entry.holder.pid == Holder.me().pid and entry.holder.machine == Holder.me().machine
    if mine and entry.holder.alive:
        return entry.holder.token not in _ACTIVE
    return not entry.holder.alive


class Claim:
    """A number of ours until `settled` or `claimed`'s end.

    Args:
        store: the open store whose ledger holds the claim.
        name: model whose version is published.
        version: the claimed number. It is no version for anybody until `settle`.
        holder: this process. The ledger's entry must have the same token.
    """

    def __init__(self, store: ObjectClient, name: str, version: int, holder: Holder) -> None:
        self.store, self.name, self.version, self.holder = store, name, version, holder
        self._renewed = time.monotonic()
        self._lock = threading.Lock()

    def keep_alive(self) -> None:
        """Renew the claim when a third of its time is over. Cheap to call often.

        Raises:
            RepositoryError: it was taken away: this process was silent for too long.
        """
        with self._lock:
            if time.monotonic() - self._renewed < LEASE_S / 3:
                return
            self.holder = self.holder.renewed()
            self._change(lambda entry: dataclasses.replace(entry, holder=self.holder))
            self._renewed = time.monotonic()

    def check(self) -> None:
        """Check whether the claim is still ours.

        Raises:
            RepositoryError: it is not.
        """
        self._change(lambda entry: entry)

    def settle(self) -> None:
        """End the publication: from now on the version exists.

        Raises:
            RepositoryError: the claim was taken away.
        """
        self._change(lambda _: None)

    def release(self) -> None:
        """Let anybody go on with the work, or sweep it."""
        self._change(lambda entry: dataclasses.replace(entry, holder=entry.holder.released()))

    def _change(self, change: Callable[[Pending], Pending | None]) -> None:
        def apply(ledger: Ledger) -> Ledger:
            entry = ledger.pending.get(self.version)
            if entry is None or entry.holder.token != self.holder.token:
                raise RepositoryError(
                    f"{self.name}:{self.version} was taken over: this process was silent for more than {LEASE_S:g} s",
                    hint="Run the command again.",
                )
            return ledger.with_pending(self.version, change(entry))

        change_ledger(self.store, self.name, apply)


@dataclasses.dataclass(frozen=True)
class ClaimPurpose:
    """The purpose of a claimed number.

    Attributes:
        content: digest of the published content.
        files: names of the version's objects, sorted.
        beside: names of the label files for a first version, sorted.
        number: the number it must be. `None`: the next one.
        claiming: as `Incoming.claiming`. With it, no other process may be publishing the same content.
    """

    content: str
    files: tuple[str, ...]
    beside: tuple[str, ...]
    number: int | None = None
    claiming: Callable[[], None] | None = None


@contextlib.contextmanager
def claimed(
    store: ObjectClient,
    name: str,
    wanted: ClaimPurpose,
    taken: Callable[[], Sequence[int]],
) -> Iterator[Claim]:
    """Claim a number. An abandoned publication of the same content is taken over, with what it has uploaded.

    When the block fails the claim is released and stays in the ledger, so the same command goes on from there.

    Args:
        store: the open store whose ledger gives the number out.
        name: model to publish under. Without a ledger it gets one.
        wanted: content and wanted number of the version.
        taken: numbers present in the store, whatever the ledger says.

    Raises:
        RepositoryError: the wanted number is not free, or another command publishes the same content.
    """
    holder = Holder.me()
    number = 0

    def draw(ledger: Ledger) -> Ledger:
        nonlocal number
        if wanted.claiming is not None:
            wanted.claiming()  # it sees all finished work; unfinished work is in the ledger
            _refuse_twin(ledger, name, wanted, holder)
        for version, entry in sorted(ledger.pending.items()):
            ours = entry.holder.token == holder.token
            if wanted.number not in (None, version):
                continue
            if ours or (entry.action == "publish" and entry.content == wanted.content and is_abandoned(entry)):
                number = version
                return ledger.with_pending(version, dataclasses.replace(entry, holder=holder))
        used = taken()
        number = ledger.state.number_for(wanted.number, used)
        state = ledger.state.given_out(number, used)
        entry = Pending("publish", holder, wanted.content, wanted.files, wanted.beside)
        return dataclasses.replace(ledger, state=state).with_pending(number, entry)

    _ACTIVE.add(holder.token)
    try:
        change_ledger(store, name, draw)
        claim = Claim(store, name, number, holder)
        try:
            yield claim
        except BaseException:
            # If this fails too, the end of this process releases the claim.
            with contextlib.suppress(RepositoryError):
                claim.release()
            raise
    finally:
        _ACTIVE.discard(holder.token)


def _refuse_twin(ledger: Ledger, name: str, wanted: ClaimPurpose, holder: Holder) -> None:
    for version, entry in ledger.pending.items():
        same = entry.action == "publish" and entry.content == wanted.content
        if same and entry.holder.token != holder.token and not is_abandoned(entry):
            raise RepositoryError(
                f"another command publishes the same content as {name}:{version} right now",
                hint="Let it end. The same command then finds the version, and does nothing.",
            )
