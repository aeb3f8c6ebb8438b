"""Looking at a repository in object storage."""

from __future__ import annotations

import concurrent.futures

from repo_manager.errors import RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.manifest import Manifest, parse_manifest
from repo_manager.repository.scan import ModelEntry, VersionEntry, model_entry
from repo_manager.repository.state import ModelState, previous_version
from repo_manager.repository.stores.objects.claim import is_abandoned
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.ledger import Ledger, ledger_model, read_ledger
from repo_manager.repository.stores.objects.mirror import Snapshot, take_snapshot
from repo_manager.repository.tags import resolve_in
from repo_manager.triton_config import CONFIG_FILENAME

__all__ = [
    "existing_snapshot",
    "find_model",
    "model_names",
    "model_state",
    "model_states",
    "pending_sentences",
    "previous_deployment",
    "read_version_manifest",
    "resolve_version",
    "scan",
]


def scan(repository: ObjectRepository, *, deep: bool = True) -> tuple[ModelEntry, ...]:
    """As `repository.scan.scan`: one listing of the root, then three small requests a model, many at a time."""
    store = open_client(repository)
    names = [name for name in store.list().folders if not name.startswith(".")]
    with concurrent.futures.ThreadPoolExecutor(store.options.lookups) as pool:
        found = list(pool.map(lambda name: _looked_at(store, name), names))
    entries = []
    for name, shot in zip(names, found, strict=True):
        if isinstance(shot, RepositoryError):
            entries.append(ModelEntry(name, repository / name, "", 0, "latest:1", (), (), (shot.message,)))
        # What is nothing but a publication or a removal under way, or its rest, is no model; `verify` tells of it.
        elif shot.versions or not shot.ledger.pending:
            entries.append(_entry(store, shot, deep=deep))
    return tuple(entries)


def _looked_at(store: ObjectClient, name: str) -> Snapshot | RepositoryError:
    """Look at a model; one whose record is damaged does not hide the others."""
    try:
        return take_snapshot(store, name)
    except RepositoryError as exc:
        return exc


def model_names(store: ObjectClient) -> tuple[str, ...]:
    """Return every model that has a folder or a record."""
    level = store.list()
    recorded = {name for fact in level.files if (name := ledger_model(fact.key)) is not None}
    return tuple(sorted({*(name for name in level.folders if not name.startswith(".")), *recorded}))


def find_model(repository: ObjectRepository, name: str) -> ModelEntry:
    """As `repository.scan.find_model`."""
    store = open_client(repository)
    return _entry(store, existing_snapshot(store, name), deep=True)


def existing_snapshot(store: ObjectClient, name: str) -> Snapshot:
    """Look at a model that has to be there.

    Raises:
        RepositoryError: there is none of that name.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise RepositoryError(f"{store.location} has no model {name!r}", hint="`repo-manager list` shows the models.")
    snapshot = take_snapshot(store, name)
    if not snapshot.exists:
        raise RepositoryError(f"{store.location} has no model {name!r}", hint="`repo-manager list` shows the models.")
    return snapshot


def pending_sentences(ledger: Ledger) -> tuple[tuple[int, str, bool], ...]:
    """Say what is being done with versions: number, sentence, and whether its doer is gone."""
    said = []
    for version, entry in sorted(ledger.pending.items()):
        doing = "published" if entry.action == "publish" else "removed"
        gone = is_abandoned(entry)
        state = "was begun and not ended" if gone else "is under way"
        said.append((version, f"version {version} is being {doing} by {entry.holder}, which {state}", gone))
    return tuple(said)


def _entry(store: ObjectClient, shot: Snapshot, *, deep: bool) -> ModelEntry:
    path = store.location / shot.name
    problems = [sentence for _, sentence, gone in pending_sentences(shot.ledger) if gone]
    text = None
    if shot.config is None:
        problems.append(f"has no {CONFIG_FILENAME}; Triton derives one where the backend can")
    else:
        try:
            text = shot.config[0].decode()
        except UnicodeDecodeError as exc:
            problems.append(f"{CONFIG_FILENAME} cannot be read: {exc}")
    if deep:
        with concurrent.futures.ThreadPoolExecutor(store.options.lookups) as pool:
            versions = tuple(pool.map(lambda number: _version(store, path, number), shot.versions))
    else:
        versions = tuple(VersionEntry(number, path) for number in shot.versions)
    return model_entry(path, text, versions, problems)


def _version(store: ObjectClient, path: ObjectRepository, number: int) -> VersionEntry:
    size_bytes = sum(fact.size_bytes for fact in store.walk(f"{path.name}/{number}"))
    manifest, problems = None, []
    try:
        manifest = read_version_manifest(store, path.name, number)
    except RepositoryError as exc:
        problems.append(exc.message)
    return VersionEntry(number, path, manifest, size_bytes, tuple(problems))


def read_version_manifest(store: ObjectClient, name: str, version: int) -> Manifest | None:
    """Return a version's manifest; `None` when it has none.

    Raises:
        RepositoryError: it is no manifest.
    """
    key = f"{name}/{version}/{MANIFEST_FILENAME}"
    found = store.get(key)
    if found is None:
        return None
    return parse_manifest(found[0].decode(errors="replace"), where=str(store.location / key))


def model_state(repository: ObjectRepository, name: str) -> ModelState:
    """As `repository.policy.model_state`."""
    return read_ledger(open_client(repository), name).state


def model_states(repository: ObjectRepository) -> dict[str, ModelState]:
    """As `repository.policy.model_states`."""
    store = open_client(repository)
    names = model_names(store)
    with concurrent.futures.ThreadPoolExecutor(store.options.lookups) as pool:
        ledgers = pool.map(lambda name: read_ledger(store, name), names)
        return {name: ledger.state for name, ledger in zip(names, ledgers, strict=True)}


def previous_deployment(repository: ObjectRepository, name: str) -> int | None:
    """As `repository.policy.previous_deployment`."""
    snapshot = existing_snapshot(open_client(repository), name)
    return previous_version(snapshot.ledger.state, snapshot.versions)


def resolve_version(repository: ObjectRepository, target: str) -> tuple[str, int]:
    """As `repository.tags.resolve_version`."""
    name, _, wanted = target.partition(":")
    snapshot = existing_snapshot(open_client(repository), name)
    return name, resolve_in(name, wanted, snapshot.versions, snapshot.ledger.state)
