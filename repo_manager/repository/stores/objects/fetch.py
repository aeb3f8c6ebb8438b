"""A version's files on this machine: fetched in parts, compared with the manifest, gone on with after a crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.manifest import FileRecord, Manifest, parse_manifest
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.transport import save_object

__all__ = ["fetch_version", "read_manifest"]


def read_manifest(store: ObjectClient, name: str, version: int) -> Manifest | None:
    """Return a version's manifest, or `None` when it has none.

    Args:
        store: the repository's open store. It gets one request.
        name: model of the version, as in the object's key.
        version: number of the version. A missing one gives `None`.

    Raises:
        RepositoryError: it is no manifest.
    """
    key = f"{name}/{version}/{MANIFEST_FILENAME}"
    found = store.get(key)
    if found is None:
        return None
    return parse_manifest(found[0].decode(errors="replace"), where=str(store.location / key))


def fetch_version(
    store: ObjectClient,
    name: str,
    version: int,
    target: Path,
    names: Sequence[str] | None = None,
    *,
    compare: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a version's files into a folder, each as its manifest says.

    Args:
        store: the open store to fetch from, with its part size.
        name: model of the version, as in the objects' keys.
        version: number of the version. For a missing one no file is written.
        target: the folder. Made when it is missing. Files present, whole or in part, are kept.
        names: the files wanted, missing ones are left out. `None`: all. The manifest always comes along.
        compare: refuse a file different from its manifest. Without it everything is fetched as it is.
        progress: called with the number of bytes arrived.

    Raises:
        RepositoryError: a file differs from its manifest, or cannot be fetched.
    """
    manifest = read_manifest(store, name, version) if compare else None
    records = {} if manifest is None else manifest.files
    target.mkdir(parents=True, exist_ok=True)
    for fact in store.walk(f"{name}/{version}"):
        inside = fact.key.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in inside):
            raise RepositoryError(f"{store.location / name / str(version)} holds {fact.key!r}, which is no file's name")
        if names is not None and fact.key not in (*names, MANIFEST_FILENAME):
            continue
        expected: FileRecord | None = records.get(fact.key)
        save_object(store, f"{name}/{version}/{fact.key}", fact, target / fact.key, expected)
        progress(fact.size_bytes)
