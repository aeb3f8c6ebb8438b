"""Signatures of versions in object storage: made and checked on this machine, over the content as it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.signing import Signature, SignatureCheck, SigningKey
from repo_manager.repository.signing import check_signature as check_on_disk
from repo_manager.repository.signing import sign_version as sign_on_disk
from repo_manager.repository.signing_files import signature_path
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.fetch import fetch_version
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored

__all__ = ["check_signature", "sign_version"]


def sign_version(
    repository: ObjectRepository, name: str, version: int, key: Path | SigningKey, *, dry_run: bool = False
) -> Signature:
    """As `repository.signing.sign_version`; the version is fetched for it."""
    store = open_client(repository)
    with _content(store, name, version) as mirror:
        signature = sign_on_disk(mirror.root, name, version, key, dry_run=dry_run)
        if not dry_run:
            path = signature_path(mirror.root, name, version)
            store.put(path.name, path.read_bytes())
    return signature


def check_signature(repository: ObjectRepository, name: str, version: int, keys: Sequence[Path]) -> SignatureCheck:
    """As `repository.signing.check_signature`; the version is fetched for it."""
    with _content(open_client(repository), name, version) as mirror:
        return check_on_disk(mirror.root, name, version, keys)


@contextlib.contextmanager
def _content(store: ObjectClient, name: str, version: int) -> Iterator[Mirror]:
    """Give a picture of the model in which this version's files are whole, and its signature is there."""
    with mirrored(store, name) as mirror, disk_errors(f"fetch {name}:{version}"):
        if version not in mirror.snapshot.versions:
            raise RepositoryError(
                f"model {name!r} has no version {version}", hint=f"`repo-manager show {name}` lists them."
            )
        folder = mirror.folder / str(version)
        for fact in mirror.files[str(version)]:
            (folder / fact.key).unlink(missing_ok=True)
        fetch_version(store, name, version, folder, compare=False)
        path = signature_path(mirror.root, name, version)
        found = store.get(path.name)
        if found is not None:
            path.write_bytes(found[0])
        yield mirror
