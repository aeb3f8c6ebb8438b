"""Changing what is current in object storage: config.pbtxt, labels, tags, deployments; each by compare-and-swap."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.edit import ConfigChange, change_with, edit_with
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.relabel import LabelChange
from repo_manager.repository.relabel import read_labels as read_labels_on_disk
from repo_manager.repository.relabel import set_labels as set_labels_on_disk
from repo_manager.repository.state import ModelState
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.facts import ChangedMeanwhileError, Mark, ObjectFact
from repo_manager.repository.stores.objects.ledger import Ledger, change_ledger, read_ledger
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored
from repo_manager.repository.stores.objects.scan import existing_snapshot, pending_sentences
from repo_manager.repository.tags import check_tag_target, tag_holder, validate_tag
from repo_manager.triton_config import CONFIG_FILENAME, parse_config, replace_version_policy, served_versions
from repo_manager.triton_config.version_policy import version_policy

__all__ = [
    "change_config",
    "edit_config",
    "put_config",
    "read_config_bytes",
    "read_labels",
    "record_deployment",
    "remove_tag",
    "set_labels",
    "set_served_versions",
    "set_tag",
    "touch_config",
    "write_config_bytes",
]

R = TypeVar("R")
_ATTEMPTS = 20
_TICK_S = 0.05
_LONGEST_TICK_S = 3.0


def change_config(
    repository: ObjectRepository, name: str, changes: Mapping[str, str | None], *, dry_run: bool = False
) -> ConfigChange:
    """As `repository.edit.change_config`; checked against what the manifests recorded, so that nothing is fetched."""
    return _edited(
        repository, name, lambda mirror: change_with(mirror.root, name, changes, dry_run=dry_run, models=False), dry_run
    )


def edit_config(repository: ObjectRepository, name: str, text: str, *, dry_run: bool = False) -> ConfigChange:
    """As `repository.edit.edit_config`; checked against what the manifests recorded, so that nothing is fetched."""
    return _edited(
        repository, name, lambda mirror: edit_with(mirror.root, name, text, dry_run=dry_run, models=False), dry_run
    )


def _edited(
    repository: ObjectRepository, name: str, edit: Callable[[Mirror], ConfigChange], dry_run: bool
) -> ConfigChange:
    store = open_client(repository)
    with mirrored(store, name) as mirror:
        change = edit(mirror)
        after = change.after if change.applied or dry_run else change.before
        if isinstance(version_policy(parse_config(after)), str):
            _refuse_open_policy(mirror)
        if not change.applied:
            return change
        before = None if mirror.snapshot.config is None else mirror.snapshot.config[1]
        try:
            put_config(store, name, change.after.encode(), before)
        except ChangedMeanwhileError as exc:
            raise RepositoryError(
                f"{store.location / name / CONFIG_FILENAME} was changed meanwhile", hint="Run the command again."
            ) from exc
    return change


def _refuse_open_policy(mirror: Mirror) -> None:
    """With `latest` or `all` Triton would take a version whose upload is under way, or broke off."""
    said = [sentence for _, sentence, _ in pending_sentences(mirror.snapshot.ledger)]
    if said:
        raise ConfigError(
            f"the version policy would let Triton load what is not whole: {'; '.join(said)}",
            hint="Let it end, or sweep its rest with `repo-manager gc`; or name the versions to serve.",
        )


def put_config(store: ObjectClient, name: str, data: bytes, before: ObjectFact | None) -> Mark:
    """Write config.pbtxt if nobody else did meanwhile, and see that Triton can tell that it is new.

    S3 keeps times of modification by the second, and Triton loads nothing that is not newer than what it saw: a second
    write within one second waits for the next and writes again.

    Args:
        store: the repository's.
        name: the model.
        data: the new content.
        before: what stood there; `None`: nothing did.

    Raises:
        ChangedMeanwhileError: another content stands there now.
    """
    key = f"{name}/{CONFIG_FILENAME}"
    mark = store.create(key, data) if before is None else store.replace(key, data, before.mark)
    deadline = time.monotonic() + _LONGEST_TICK_S
    while before is not None:
        now = store.head(key)
        if now is None or now.mark.e_tag != mark.e_tag:
            raise ChangedMeanwhileError(key)
        if now.modified > before.modified or time.monotonic() > deadline:
            break
        time.sleep(_TICK_S)
        mark = store.replace(key, data, now.mark)
    return mark


def read_config_bytes(repository: ObjectRepository, name: str) -> bytes | None:
    """As `repository.config_file.read_config_bytes`."""
    found = open_client(repository).get(f"{name}/{CONFIG_FILENAME}")
    return None if found is None else found[0]


def write_config_bytes(repository: ObjectRepository, name: str, content: bytes | None) -> None:
    """As `repository.config_file.write_config_bytes`. The last writer wins: it puts back what was."""
    store = open_client(repository)

    def write() -> None:
        found = store.get(f"{name}/{CONFIG_FILENAME}")
        if content is None:
            store.delete([f"{name}/{CONFIG_FILENAME}"])
        elif found is None or found[0] != content:
            put_config(store, name, content, None if found is None else found[1])

    _insisting(store, name, write)


def touch_config(repository: ObjectRepository, name: str) -> None:
    """As `repository.config_file.touch_config`: the same content is written again."""
    store = open_client(repository)

    def write() -> None:
        found = store.get(f"{name}/{CONFIG_FILENAME}")
        if found is not None:
            put_config(store, name, *found)

    _insisting(store, name, write)


def set_served_versions(repository: ObjectRepository, name: str, versions: Iterable[int]) -> tuple[int, ...]:
    """As `repository.policy.set_served_versions`.

    A removal marks a version in the ledger and then looks at the policy; this writes the policy and then looks at the
    ledger. So never both go through.
    """
    wanted = tuple(sorted(set(versions)))
    store = open_client(repository)

    def write() -> tuple[int, ...]:
        snapshot = existing_snapshot(store, name)
        missing = [version for version in wanted if version not in snapshot.versions]
        if missing:
            raise RepositoryError(
                f"model {name!r} has no version {', '.join(map(str, missing))}; "
                f"it has {', '.join(map(str, snapshot.versions)) or 'none'}",
                hint=f"`repo-manager show {name}` lists them.",
            )
        where = str(store.location / name / CONFIG_FILENAME)
        if snapshot.config is None:
            raise ConfigError(f"{where} does not exist", hint="`repo-manager verify --repair` writes it.")
        text = snapshot.config[0].decode(errors="replace")
        previous = served_versions(parse_config(text, where=where), snapshot.versions)
        changed = replace_version_policy(text, wanted, where=where)
        if changed == text:
            return previous
        mark = put_config(store, name, changed.encode(), snapshot.config[1])
        going = sorted(set(wanted) & read_ledger(store, name).pending.keys())
        if going:
            fact = store.head(f"{name}/{CONFIG_FILENAME}")
            if fact is not None and fact.mark.e_tag == mark.e_tag:
                put_config(store, name, snapshot.config[0], fact)
            raise RepositoryError(f"{name}:{going[0]} is being removed at this moment", hint="Choose another version.")
        return previous

    return _insisting(store, name, write)


def _insisting(store: ObjectClient, name: str, write: Callable[[], R]) -> R:
    """Do it again when another writer came between reading and writing."""
    for attempt in range(_ATTEMPTS):
        try:
            return write()
        except ChangedMeanwhileError:
            time.sleep(_TICK_S * (attempt + 1))
    raise RepositoryError(
        f"{store.location / name / CONFIG_FILENAME} was changed by others {_ATTEMPTS} times in a row",
        hint="Run the command again when nobody else works on this model.",
    )


def record_deployment(repository: ObjectRepository, name: str, version: int) -> None:
    """As `repository.policy.record_deployment`."""
    store = open_client(repository)
    existing_snapshot(store, name)
    _change_state(store, name, lambda state: state.deployed(version))


def _change_state(store: ObjectClient, name: str, change: Callable[[ModelState], ModelState]) -> Ledger:
    return change_ledger(store, name, lambda ledger: dataclasses.replace(ledger, state=change(ledger.state)))


def set_tag(repository: ObjectRepository, name: str, tag: str, version: int, *, dry_run: bool = False) -> int | None:
    """As `repository.tags.set_tag`."""
    validate_tag(tag)
    store = open_client(repository)
    snapshot = existing_snapshot(store, name)
    check_tag_target(name, version, snapshot.versions)
    before = snapshot.ledger.state.tags.get(tag)
    if not dry_run:

        def change(ledger: Ledger) -> Ledger:
            if version in ledger.pending:
                raise RepositoryError(f"model {name!r} has no version {version} any more")
            state = dataclasses.replace(ledger.state, tags={**ledger.state.tags, tag: version})
            return dataclasses.replace(ledger, state=state)

        change_ledger(store, name, change)
    return before


def remove_tag(repository: ObjectRepository, name: str, tag: str, *, dry_run: bool = False) -> int:
    """As `repository.tags.remove_tag`."""
    store = open_client(repository)
    version = tag_holder(name, tag, existing_snapshot(store, name).ledger.state)
    if not dry_run:
        _change_state(store, name, lambda s: dataclasses.replace(s, tags={t: v for t, v in s.tags.items() if t != tag}))
    return version


def read_labels(repository: ObjectRepository, name: str) -> dict[str, tuple[str, ...]]:
    """As `repository.relabel.read_labels`."""
    with mirrored(open_client(repository), name, versions=False) as mirror:
        return read_labels_on_disk(mirror.root, name)


def set_labels(
    repository: ObjectRepository, name: str, output: str, labels: tuple[str, ...], *, dry_run: bool = False
) -> LabelChange:
    """As `repository.relabel.set_labels`."""
    store = open_client(repository)
    with mirrored(store, name, versions=False) as mirror:
        change = set_labels_on_disk(mirror.root, name, output, labels, dry_run=dry_run)
        if dry_run or not change.applied:
            return change
        try:
            if change.before != change.after:
                # The labels first: a file that nothing names yet is harmless, a named one that is missing is not.
                data = (mirror.folder / change.file).read_bytes()
                there = {fact.key: fact for fact in mirror.snapshot.level.files}.get(change.file)
                key = f"{name}/{change.file}"
                _ = store.create(key, data) if there is None else store.replace(key, data, there.mark)
            text = (mirror.folder / CONFIG_FILENAME).read_bytes()
            before = mirror.snapshot.config
            if before is not None and text != before[0]:
                put_config(store, name, text, before[1])
        except ChangedMeanwhileError as exc:
            raise RepositoryError(f"{name} was changed meanwhile", hint="Run the command again.") from exc
    return change
