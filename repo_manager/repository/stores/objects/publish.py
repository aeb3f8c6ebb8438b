"""Publishing to object storage, where nothing can be renamed into place.

    1. claim      the number, by compare-and-swap of the ledger: from then on it is "being published"
    2. files      each compared with what was sent; those of an interrupted attempt are found again
    3. manifest   create-only, last of the version's objects
    4. current    for a first version config.pbtxt, create-only, which names this version
    5. settle     the ledger's entry goes: only now the version exists for any of our commands

Triton has no idea of the ledger: it takes a prefix with a number for a version as soon as it holds one object. So a
model whose policy is `latest` or `all` is not published to; by numbers (`specific`) Triton asks only for what is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError, RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, check_file_name, validate_model_name
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.manifest import FileRecord, Manifest, manifest_text, parse_manifest
from repo_manager.repository.publish import (
    PublishedVersion,
    PublishPlan,
    first_config_text,
    make_manifest,
    used_numbers,
)
from repo_manager.repository.publish_checks import check_arguments, check_model
from repo_manager.repository.stores.objects.claim import Claim, claimed
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.content import measure
from repo_manager.repository.stores.objects.facts import ChangedMeanwhileError
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored
from repo_manager.repository.stores.objects.transport import Progress, upload_files
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    VARIANTS_FOLDER,
    ModelConfig,
    parse_config,
    version_policy,
)
from repo_manager.triton_config.labels import labels_text

__all__ = ["plan_publish", "publish"]


def plan_publish(
    repository: ObjectRepository, name: str, files: Mapping[str, Path], config: ModelConfig
) -> PublishPlan:
    """As `repository.publish.plan_publish`."""
    with disk_errors(f"plan publishing {name}"):
        validate_model_name(name)
        check_arguments(name, files, config)
        store = open_client(repository)
        with mirrored(store, name, must_exist=False, versions=False) as mirror:
            first = _check(mirror, name, config)
            taken = used_numbers(mirror.folder)
            highest = max(0, mirror.snapshot.ledger.state.highest_version, *taken)
        size_bytes = sum(path.stat().st_size for path in files.values())
        return PublishPlan(repository, name, highest + 1, first, first, size_bytes)


def publish(
    repository: ObjectRepository,
    name: str,
    files: Mapping[str, Path],
    config: ModelConfig,
    details: Mapping[str, Any],
    *,
    expected: Mapping[str, FileRecord] | None = None,
    config_text: str | None = None,
    progress: Progress | None = None,
) -> PublishedVersion:
    """As `repository.publish.publish`. What an interrupted attempt with the same content has sent is not sent again."""
    with disk_errors(f"publish {name}"):
        validate_model_name(name)
        check_arguments(name, files, config)
        store = open_client(repository)
        with mirrored(store, name, must_exist=False, versions=False) as mirror:
            first = _check(mirror, name, config)
            taken = used_numbers(mirror.folder)
        measured = {file: (Path(path), measure(Path(path), store.options.part_bytes)) for file, path in files.items()}
        records = {file: each[1].record for file, each in measured.items()}
        _check_expected(records, expected)
        beside = _beside(config) if first else {}
        content = _content_digest(records, config, beside)
        with claimed(store, name, content, list(files), list(beside), lambda: taken) as claim:
            manifest = make_manifest(name, claim.version, config, records, details)
            told = _told(claim, progress or (lambda _: None))
            upload_files(store, f"{name}/{claim.version}", measured, told)
            for file, data in beside.items():
                _create_same(store, f"{name}/{file}", data)
            claim.check()
            manifest = _create_manifest(store, f"{name}/{claim.version}/{MANIFEST_FILENAME}", manifest)
            try:
                first = _make_current(store, claim, config, config_text)
            except InputError:
                # It does not fit what another writer made of the model meanwhile: no sweep may settle it.
                store.delete([f"{name}/{claim.version}/{MANIFEST_FILENAME}"])
                raise
            claim.settle()
    version = claim.version
    return PublishedVersion(store.location, name, version, store.location / name / str(version), manifest, first, first)


def _beside(config: ModelConfig) -> dict[str, bytes]:
    """Return what lies beside the versions and comes with the first one only: labels, and variants of config.pbtxt."""
    labels = {check_file_name(file): labels_text(text).encode() for file, text in config.labels.items()}
    variants = {check_file_name(f"{VARIANTS_FOLDER}/{name}.pbtxt"): text for name, text in config.variants.items()}
    return {**labels, **{file: text.encode() for file, text in variants.items()}}


def _told(claim: Claim, progress: Progress) -> Progress:

    def told(count: int) -> None:
        claim.keep_alive()
        progress(count)

    return told


def _make_current(store: ObjectClient, claim: Claim, config: ModelConfig, config_text: str | None) -> bool:
    """Write the config.pbtxt of a first version, create-only; return whether it was one.

    Where another writer was quicker this version is the next one, and has to fit what he wrote.
    """
    key = f"{claim.name}/{CONFIG_FILENAME}"
    if store.head(key) is None:
        try:
            store.create(key, first_config_text(claim.version, config, config_text).encode())
            return True
        except ChangedMeanwhileError:
            pass
    found = store.get(key)
    if found is not None and found[0] == first_config_text(claim.version, config, config_text).encode():
        return True  # An interrupted attempt of this publication wrote it.
    with mirrored(store, claim.name, versions=False) as mirror:
        _check(mirror, claim.name, config)
    return False


def _check(mirror: Mirror, name: str, config: ModelConfig) -> bool:
    """Check the configuration against the existing model; return whether there is none yet."""
    first = check_model(mirror.folder, name, config)
    if not first and mirror.snapshot.config is not None:
        policy = version_policy(parse_config(mirror.snapshot.config[0].decode(errors="replace"), where=name))
        if isinstance(policy, str):
            raise RepositoryError(
                f"model {name!r} in {mirror.root} has the version policy {policy!r}: Triton "
                "could load the new version while it is uploaded, as no object store has a rename",
                hint=f"Name the versions to serve: repo-manager deploy {name}:VERSION, or repo-manager config {name} "
                "--set 'version_policy={specific {versions: [VERSION]}}'.",
            )
    return first


def _check_expected(records: Mapping[str, FileRecord], expected: Mapping[str, FileRecord] | None) -> None:
    if expected is None:
        return
    for name in sorted({*records, *expected}):
        if records.get(name) != expected.get(name):
            raise RepositoryError(
                f"{name} was to be {expected.get(name)}, and is {records.get(name)}",
                hint="The source or a disk is damaged; `repo-manager verify` the source.",
            )


def _content_digest(records: Mapping[str, FileRecord], config: ModelConfig, labels: Mapping[str, bytes]) -> str:
    """One digest of all that is sent: by it a repeated command finds its own interrupted attempt."""
    lines = [f"{file}\0{record.size_bytes}\0{record.sha256}\n" for file, record in sorted(records.items())]
    lines += [f"{file}\0{hashlib.sha256(text).hexdigest()}\n" for file, text in sorted(labels.items())]
    return hashlib.sha256(("".join(lines) + config.backend).encode()).hexdigest()


def _create_manifest(store: ObjectClient, key: str, manifest: Manifest) -> Manifest:
    """Write the manifest create-only; return the one that stands there: an interrupted attempt's, if any."""
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
