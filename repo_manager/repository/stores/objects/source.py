"""A version in object storage as the source of a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.stores.objects.client import open_client
from repo_manager.repository.stores.objects.fetch import fetch_version, kept_download
from repo_manager.repository.stores.objects.mirror import mirrored
from repo_manager.repository.transfer_parts import Source, source_config

__all__ = ["content", "look"]


def look(source: ObjectRepository, name: str, version: int, new_name: str) -> Source:
    """Say what is to be copied; nothing large is fetched.

    Args:
        source: the repository.
        name: the model there.
        version: its version.
        new_name: the model's name where it is copied to.

    Raises:
        RepositoryError: no such version, or it has no manifest.
    """
    with mirrored(open_client(source), name) as mirror:
        if version not in mirror.snapshot.versions:
            raise RepositoryError(f"model {name!r} in {source} has no version {version}")
        manifest = read_manifest(mirror.folder / str(version))
        facts = mirror.files.get(str(version), ())
        present = tuple(sorted(fact.key for fact in facts if fact.key != MANIFEST_FILENAME))
        return Source(manifest, present, *source_config(mirror.folder, new_name), source.name)


@contextlib.contextmanager
def content(
    source: ObjectRepository, name: str, version: int, found: Source, progress: Callable[[int], None] | None
) -> Iterator[Path]:
    """Give the version's files on this machine, each as the manifest says, for as long as the block lasts.

    When the block fails they stay in the cache, so that the next attempt goes on with them.

    Raises:
        RepositoryError: a file cannot be fetched, or is not what the manifest says.
    """
    store = open_client(source)
    with kept_download(store, name, version, found.manifest.digest) as folder:
        fetch_version(store, name, version, folder, progress=progress or (lambda _: None))
        yield folder
