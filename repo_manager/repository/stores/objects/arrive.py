"""Publishing to object storage, where nothing can be renamed into place.

    1. claim      the number, by compare-and-swap of the ledger: from then on it is "being published"
    2. files, each compared with the sent bytes. Those of an interrupted attempt are found again
    3. manifest   create-only, last of the version's objects
    4. current    for a first version config.pbtxt, create-only, which names this version
    5. settle     the ledger's entry goes: only now the version exists for any of our commands

Triton has no idea of the ledger: it takes a prefix with a number for a version as soon as it holds one object. So a
model whose policy is `latest` or `all` is not published to. By numbers (`specific`) Triton asks only for the named
versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

from repo_manager.errors import InputError, RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.manifest import FileRecord, Manifest, manifest_text, parse_manifest
from repo_manager.repository.stores.base import Arrived, ChangedMeanwhileError, Incoming, Progress
from repo_manager.repository.stores.objects.claim import Claim, ClaimPurpose, claimed
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.content import measure
from repo_manager.repository.stores.objects.transport import upload_files
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = ["publish_version"]


def publish_version(store: ObjectClient, look: Callable[[], ModelView], incoming: Incoming) -> Arrived:
    """As `Store.publish_version`. Files sent by an interrupted attempt with the same content are not sent again.

    Args:
        store: the repository's open store, with part size and number of uploads at a time.
        look: looks at the model now.
        incoming: the version to publish. Its files are measured before a number is claimed.
    """
    name, view = incoming.name, look()
    first = incoming.check(view)
    measured = {file: (path, measure(path, store.options.part_bytes)) for file, path in incoming.files.items()}
    records = {file: each[1].record for file, each in measured.items()}
    _check_expected(records, incoming.expected)
    beside = incoming.beside if first else {}
    content = _content_digest(records, beside, incoming.identity)
    wanted = ClaimPurpose(content, tuple(sorted(records)), tuple(sorted(beside)), incoming.number, incoming.claiming)
    with claimed(store, name, wanted, lambda: view.used_numbers) as claim:
        manifest = incoming.manifest(claim.version, records)
        upload_files(store, f"{name}/{claim.version}", measured, _told(claim, incoming.progress))
        for file, data in beside.items():
            _create_same(store, f"{name}/{file}", data)
        claim.check()
        manifest = _create_manifest(store, f"{name}/{claim.version}/{MANIFEST_FILENAME}", manifest)
        try:
            first, view = _make_current(store, claim.version, look, incoming, view)
        except InputError:
            # Another writer changed the model, and this version no longer fits. No sweep may finish its publication.
            store.delete([f"{name}/{claim.version}/{MANIFEST_FILENAME}"])
            raise
        claim.settle()
    return Arrived(claim.version, manifest, first, view)


def _told(claim: Claim, progress: Progress) -> Progress:

    def told(count: int) -> None:
        claim.keep_alive()
        progress(count)

    return told


def _make_current(
    store: ObjectClient, version: int, look: Callable[[], ModelView], incoming: Incoming, view: ModelView
) -> tuple[bool, ModelView]:
    """Write the config.pbtxt of a first version, create-only. Return whether it was one, and the model as it is now.

    Where another writer was quicker this version is the next one, and must fit the other's configuration.
    """
    key = f"{incoming.name}/{CONFIG_FILENAME}"
    data = incoming.first_config(version)
    with_ours = dataclasses.replace(view, exists=True, config=data)
    if store.head(key) is None:
        try:
            store.create(key, data)
            return True, with_ours
        except ChangedMeanwhileError:
            pass
    found = store.get(key)
    if found is not None and found[0] == data:
        return True, with_ours  # written by an interrupted attempt of this publication
    now = look()
    incoming.check(now)
    return False, now


def _check_expected(records: Mapping[str, FileRecord], expected: Mapping[str, FileRecord] | None) -> None:
    if expected is None:
        return
    for name in sorted({*records, *expected}):
        if records.get(name) != expected.get(name):
            raise RepositoryError(
                f"{name} was to be {expected.get(name)}, and is {records.get(name)}",
                hint="The source or a disk is damaged; `repo-manager verify` the source.",
            )


def _content_digest(records: Mapping[str, FileRecord], beside: Mapping[str, bytes], identity: str) -> str:
    """One digest of everything sent: by it a repeated command finds its own interrupted attempt."""
    lines = [f"{file}\0{record.size_bytes}\0{record.sha256}\n" for file, record in sorted(records.items())]
    lines += [f"{file}\0{hashlib.sha256(text).hexdigest()}\n" for file, text in sorted(beside.items())]
    return hashlib.sha256(("".join(lines) + identity).encode()).hexdigest()


def _create_manifest(store: ObjectClient, key: str, manifest: Manifest) -> Manifest:
    """Write the manifest create-only. Return the present one, perhaps of an interrupted attempt."""
    try:
        store.create(key, manifest_text(manifest).encode())
        return manifest
    except ChangedMeanwhileError:
        found = store.get(key)
        there = None if found is None else parse_manifest(found[0].decode(errors="replace"), where=key)
        if there is None or there.files != manifest.files:
            raise RepositoryError(f"{store.location / key} exists and is of another version") from None
        return there


def _create_same(store: ObjectClient, key: str, data: bytes) -> None:
    try:
        store.create(key, data)
    except ChangedMeanwhileError as exc:
        raise RepositoryError(
            f"{store.location / key} exists with other labels",
            hint="Remove it, or let the other publication of this model end first.",
        ) from exc
