"""Putting right in object storage what can be put right without guessing."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import version_number
from repo_manager.repository.location import Location, ObjectRepository
from repo_manager.repository.manifest import FileRecord, Manifest, read_manifest
from repo_manager.repository.repair import Repair, config_repair, find_content
from repo_manager.repository.scan import find_model
from repo_manager.repository.stores.objects.change import put_config
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.content import measure
from repo_manager.repository.stores.objects.ledger import change_ledger, ledger_key, read_ledger
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored
from repo_manager.repository.stores.objects.remove import abandoned_work, sweep
from repo_manager.repository.stores.objects.scan import existing_snapshot, model_names, read_version_manifest
from repo_manager.repository.stores.objects.transport import object_record, save_object, upload_files
from repo_manager.triton_config import CONFIG_FILENAME

__all__ = ["repair"]


@dataclasses.dataclass(frozen=True)
class _Step:
    where: str
    action: str
    apply: Callable[[], None]


def repair(
    repository: ObjectRepository, name: str | None = None, *, copies: tuple[Location, ...] = (), dry_run: bool = False
) -> tuple[Repair, ...]:
    """As `repository.repair.repair`; `copies` may be folders or in object storage."""
    store = open_client(repository)
    with disk_errors(f"repair {repository}"):
        names = model_names(store) if name is None else (name,)
        done: list[Repair] = []
        for model in names:
            for step in _steps(store, model, copies, dry_run):
                if not dry_run:
                    step.apply()
                done.append(Repair(step.where, step.action, applied=not dry_run))
    return tuple(done)


def _steps(store: ObjectClient, name: str, copies: tuple[Location, ...], dry_run: bool) -> Iterator[_Step]:
    """Say what is to be done with a model, one after the other: each step sees what the ones before it did."""
    damaged = _damaged_ledger(store, name)
    if damaged is not None:
        yield damaged
        if dry_run:
            return
    for version in sorted(abandoned_work(read_ledger(store, name))):
        text = "ended or removed what an interrupted command had begun"
        yield _Step(f"{name}/{version}", text, lambda: None)
    if not dry_run:
        sweep(store, name)
    with contextlib.suppress(RepositoryError):
        existing_snapshot(store, name)
        with mirrored(store, name) as mirror:
            yield from _config_step(store, mirror)
            yield from _file_steps(store, mirror, copies)


def _damaged_ledger(store: ObjectClient, name: str) -> _Step | None:
    try:
        read_ledger(store, name)
        return None
    except RepositoryError:
        key = ledger_key(name)

        def set_aside() -> None:
            found = store.get(key)
            if found is not None:
                store.put(f"{key}.damaged", found[0])
                store.delete([key])
            numbers = [number for folder in store.list(name).folders if (number := version_number(folder)) is not None]
            change_ledger(
                store,
                name,
                lambda ledger: dataclasses.replace(ledger, state=ledger.state.numbered(max(numbers, default=0))),
            )

        return _Step(key, f"set aside as {key}.damaged and begun anew from the versions that are there", set_aside)


def _config_step(store: ObjectClient, mirror: Mirror) -> Iterator[_Step]:
    name = mirror.snapshot.name
    found = config_repair(mirror.folder, find_model(mirror.root, name))
    if found is not None:
        action, text = found
        before = mirror.snapshot.config
        yield _Step(
            f"{name}/{CONFIG_FILENAME}",
            action,
            lambda: _ignore(put_config(store, name, text.encode(), None if before is None else before[1])),
        )


def _ignore(_: object) -> None:
    return None


def _file_steps(store: ObjectClient, mirror: Mirror, copies: tuple[Location, ...]) -> Iterator[_Step]:
    name = mirror.snapshot.name
    for version in mirror.snapshot.versions:
        try:
            manifest = read_manifest(mirror.folder / str(version))
        except RepositoryError:
            continue
        facts = {fact.key: fact for fact in mirror.files.get(str(version), ())}
        for file, record in manifest.files.items():
            key = f"{name}/{version}/{file}"
            fact = facts.get(file)
            if fact is not None and fact.size_bytes == record.size_bytes and object_record(store, key, fact) == record:
                continue
            source = _find(store, mirror, record, copies, key)
            if source is not None:
                yield _Step(f"{name}/{version}/{file}", f"restored from {source[0]}", source[1])


def _find(
    store: ObjectClient, mirror: Mirror, record: FileRecord, copies: tuple[Location, ...], key: str
) -> tuple[str, Callable[[], None]] | None:
    """Find the same content in another version or another repository; return where, and how it is put back."""
    name = mirror.snapshot.name
    for place in (store.location, *copies):
        if not isinstance(place, ObjectRepository):
            with contextlib.suppress(RepositoryError):
                path = find_content(place / name, record, ())
                if path is not None:
                    return str(path), lambda path=path: _send(store, path, key)
            continue
        other = open_client(place)
        for found, manifest in _manifests(other, name):
            for file, each in manifest.files.items():
                candidate = f"{name}/{found}/{file}"
                fact = other.head(candidate) if each == record else None
                if fact is None or (place == store.location and candidate == key):
                    continue
                if fact.size_bytes == record.size_bytes and object_record(other, candidate, fact) == record:
                    return str(place / candidate), _fetcher(other, candidate, store, key, record)
    return None


def _manifests(store: ObjectClient, name: str) -> Iterator[tuple[int, Manifest]]:
    for folder in store.list(name).folders:
        number = version_number(folder)
        if number is not None:
            with contextlib.suppress(RepositoryError):
                manifest = read_version_manifest(store, name, number)
                if manifest is not None:
                    yield number, manifest


def _fetcher(
    source: ObjectClient, candidate: str, target: ObjectClient, key: str, record: FileRecord
) -> Callable[[], None]:
    def fetch() -> None:
        fact = source.head(candidate)
        if fact is None:
            raise RepositoryError(f"{source.location / candidate} was removed meanwhile")
        with tempfile.TemporaryDirectory(prefix="repo-manager-objects-") as place:
            path = Path(place) / "restored"
            save_object(source, candidate, fact, path, record)
            _send(target, path, key)

    return fetch


def _send(store: ObjectClient, path: Path, key: str) -> None:
    folder, _, file = key.rpartition("/")
    upload_files(store, folder, {file: (path, measure(path, store.options.part_bytes))}, lambda _: None)
