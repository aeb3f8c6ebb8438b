"""The record of one model: numbers given out, deployments, tags, and work under way.

It is one object in the root, `.repo-manager.MODEL.state`, where Triton ignores objects, changed by compare-and-swap
only. A version's number is given out by such a change, so exactly one of any number of writers gets it, for ever.

`pending` holds the versions being published or removed. They are no versions for anybody until the entry is gone: with
its removal a version begins to exist, or has ceased to.
"""

from __future__ import annotations

import dataclasses
import json
import random
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from repo_manager.errors import ConcurrentChangeError, RepositoryError
from repo_manager.repository.layout import STATE_FILENAME
from repo_manager.repository.state import ModelState
from repo_manager.repository.state_file import format_entry, parse_entry
from repo_manager.repository.stores.base import ChangedMeanwhileError
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.facts import Mark
from repo_manager.repository.stores.objects.holder import Holder, parse_holder

__all__ = ["RECORD", "Ledger", "Pending", "change_ledger", "ledger_key", "read_ledger"]

_SCHEMA_VERSION = 1
RECORD = ".repo-manager.{name}.state"
_OWN = ("schema_version", "writer", "pending", "lease")
_CONTENTION_S = 300.0


@dataclasses.dataclass(frozen=True)
class Pending:
    """A version being published or removed.

    Attributes:
        action: `publish` or `remove`. A sweep settles a whole publication, and ends a removal.
        holder: the process at work. When it is dead or silent, others take over.
        content: digest of the published content. By it the same command finds its own rest. Empty for a removal.
        files: the objects of the version: all a sweep may delete.
        beside: label files for a model's first version.
        whole: the model is removed with all its versions.
    """

    action: str
    holder: Holder
    content: str = ""
    files: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Ledger:
    """One model's record.

    Attributes:
        state: as for a repository on disk.
        pending: version -> the work under way on it.
        lease: who may change the served versions right now. `None` when nobody has asked for it.
        mark: the object's content this was read from. `None` when there is none.
    """

    state: ModelState = dataclasses.field(default_factory=ModelState)
    pending: Mapping[int, Pending] = dataclasses.field(default_factory=dict)
    lease: Holder | None = None
    mark: Mark | None = None

    def with_pending(self, version: int, entry: Pending | None) -> Ledger:
        """Return it with an entry set, or taken away.

        Args:
            version: number the entry is for. It replaces an earlier entry.
            entry: the entry. `None`: remove it.
        """
        rest = {number: each for number, each in self.pending.items() if number != version}
        return dataclasses.replace(self, pending=rest if entry is None else {**rest, version: entry})


def ledger_key(name: str) -> str:
    """Return the object's key."""
    return RECORD.format(name=name)


def read_ledger(store: ObjectClient, name: str) -> Ledger:
    """Read a model's record. An empty one when there is none.

    A repository copied here from a disk brings its `.repo-manager.json`: its content counts until the model has a
    record of its own.

    Raises:
        RepositoryError: it is damaged.
    """
    found = store.get(ledger_key(name))
    if found is None:
        return Ledger(state=_from_disk(store, name))
    try:
        document = json.loads(found[0])
        state = parse_entry({key: value for key, value in document.items() if key not in _OWN})
        pending = {int(number): _parse_pending(entry) for number, entry in document.get("pending", {}).items()}
        lease = parse_holder(document["lease"]) if document.get("lease") else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise RepositoryError(
            f"{store.location / ledger_key(name)} is damaged: {exc!r}",
            hint="`repo-manager verify --repair` sets it aside: numbers then go on from the highest that is there, and "
            "only the roll-back version and the tags are lost.",
        ) from exc
    return Ledger(state, pending, lease, found[1].mark)


def change_ledger(store: ObjectClient, name: str, change: Callable[[Ledger], Ledger]) -> Ledger:
    """Change a model's record by compare-and-swap. When another writer was first, `change` is asked again.

    Args:
        store: the repository's open store. It must support conditional writes.
        name: model whose record changes. A missing record is created.
        change: the record as it is to the record as it will be. An equal one writes nothing. May raise to give up.

    Raises:
        RepositoryError: the record is damaged, or others changed it all the time for minutes.
    """
    deadline = time.monotonic() + _CONTENTION_S
    tries = 0
    while True:
        before = read_ledger(store, name)
        after = change(before)
        if after == before and before.mark is not None:
            return before
        data = _text(after).encode()
        try:
            key = ledger_key(name)
            mark = store.create(key, data) if before.mark is None else store.replace(key, data, before.mark)
            return dataclasses.replace(after, mark=mark)
        except ChangedMeanwhileError as exc:
            if time.monotonic() > deadline:
                raise ConcurrentChangeError(
                    f"{store.location / ledger_key(name)} was changed by others each time for {_CONTENTION_S:g} s",
                    hint="Run the command again when fewer work on this model.",
                ) from exc
            tries += 1
            time.sleep(random.uniform(0.0, min(2.0, 0.02 * 2 ** min(tries, 8))))


def _text(ledger: Ledger) -> str:
    document = {
        **format_entry(ledger.state),
        "schema_version": _SCHEMA_VERSION,
        # Makes each text unique, so a writer recognises its own text after a lost answer.
        "writer": secrets.token_hex(8),
        "pending": {str(number): dataclasses.asdict(entry) for number, entry in sorted(ledger.pending.items())},
        "lease": None if ledger.lease is None else dataclasses.asdict(ledger.lease),
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _parse_pending(fields: Mapping[str, Any]) -> Pending:
    return Pending(
        action=str(fields["action"]),
        holder=parse_holder(fields["holder"]),
        content=str(fields.get("content", "")),
        files=tuple(str(name) for name in fields.get("files", ())),
        beside=tuple(str(name) for name in fields.get("beside", ())),
        whole=bool(fields.get("whole", False)),
    )


def _from_disk(store: ObjectClient, name: str) -> ModelState:
    found = store.get(STATE_FILENAME)
    if found is None:
        return ModelState()
    try:
        return parse_entry(json.loads(found[0]).get("models", {}).get(name, {}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise RepositoryError(f"{store.location / STATE_FILENAME} is damaged: {exc!r}") from exc
