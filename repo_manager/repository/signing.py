"""Signed versions: who vouches for a version's content, its model's name and its number.

A signature lists every file in a version's folder, manifest.json included, and the manifest names the model and the
number: so it holds for the one version in the one place only. It is in the root, as
`.repo-manager.NAME.VERSION.sig.json`, because Triton would load the version again for a file in its folder, and
ignores files in the root.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location, LocationLike
from repo_manager.repository.look import changeable_model, check_no_link, existing_model, with_beside, with_versions
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.signing_files import signature_name
from repo_manager.repository.signing_format import (
    MAX_SIGNATURE_BYTES,
    SigningKey,
    make_signature,
    signed_files,
    verify_signature,
)
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store
from repo_manager.repository.view import ModelView, VersionView
from repo_manager.repository.vouching import check_beside, check_facts, fingerprint, sign_beside
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.types import StrPath

__all__ = ["SignatureCheck", "SigningKey", "WrittenSignature", "check_served", "check_signature", "sign_version"]


@dataclasses.dataclass(frozen=True)
class WrittenSignature:
    """A signature made, or would be.

    Attributes:
        name: name of the signed version's model.
        version: number of the signed version. The signature holds for no other.
        file: where the signature is, below the root.
        files: number of files it covers.
        replaced: whether the version had one before.
        applied: whether it was written. False for a dry run.
    """

    name: str
    version: int
    file: str
    files: tuple[str, ...]
    replaced: bool
    applied: bool


@dataclasses.dataclass(frozen=True)
class SignatureCheck:
    """A valid signature.

    Attributes:
        name: name of the checked version's model.
        version: number of the version the signature vouches for.
        key: the key, or root certificate, of the verification.
        files: number of files it covers.
        state: inodes and times of the files before they were read. `None` for object storage. If they are the same
            after a load, the loaded files are the verified ones.
    """

    name: str
    version: int
    key: Path
    files: tuple[str, ...]
    state: Mapping[str, tuple[int, ...]] | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata={"json": False}
    )


def sign_version(
    repository: LocationLike, name: str, version: int, key: StrPath | SigningKey, *, dry_run: bool = False
) -> WrittenSignature:
    """Sign a version as it was published. An earlier signature of it is replaced.

    The content is compared with the manifest first: files changed after publishing are not signed. From object storage
    the version is fetched.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model of the version. Its config.pbtxt must run the files as their manifest says.
        version: number of an existing version. It needs a manifest, and unchanged files.
        key: a private elliptic curve key in PEM, or one with its password or certificate.
        dry_run: check and sign, but write nothing.

    Raises:
        UsageError: the key cannot be used.
        RepositoryError: no such version, it has no manifest or differs from it, or the store refuses.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    with disk_errors(f"sign {name}:{version}"):
        store = open_store(repository)
        manifest = _manifest_in_place(_signable(store, name, version)[1])
        key = key if isinstance(key, SigningKey) else SigningKey(Path(key))
        with store.fetch(name, version, compare=False) as folder:
            content = make_signature(folder, key)
        view = store.look(name)
        check_facts(with_beside(store, view), manifest)
        beside, beside_content = sign_beside(store, view, version, key)
        signed = signed_files(content)
        _check_as_published(signed, manifest, f"{name}:{version}")
        file = signature_name(name, version)
        replaced = store.read(file) is not None
        if not dry_run:
            with store.exclusive(name):
                _signable(store, name, version)
                store.put(file, content)
                if beside_content is not None:
                    store.put(beside, beside_content)
    return WrittenSignature(name, version, file, tuple(sorted(signed)), replaced, applied=not dry_run)


def check_signature(repository: LocationLike, name: str, version: int, keys: Sequence[StrPath]) -> SignatureCheck:
    """Check a version as it is now against the keys: one of them must vouch for it.

    It refuses a missing or damaged signature, and one of another key, version or model. It refuses changed, added and
    missing files, links and special files, and unsigned files beside the versions. It refuses a missing config.pbtxt,
    or one that runs the files by other code than the signed manifest says. A version in object storage is fetched
    first.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model of the version. Its config.pbtxt and the files beside are checked as well.
        version: number of the one version whose files are compared.
        keys: public keys or root certificates, PEM. One must fit.

    Raises:
        UsageError: no key was given, or one cannot be read.
        RepositoryError: no such version, or its signature does not hold.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    files = [Path(key) for key in keys]
    if not files:
        raise UsageError("no key to check signatures with", hint="Give a public key: --signed-by KEY.pub")
    with disk_errors(f"check the signature of {name}:{version}"):
        store = open_store(repository)
        view, content = _signable(store, name, version)
        state = fingerprint(view, version)
        signature = _read_signature(store, name, version)
        with store.fetch(name, version, compare=False) as folder:
            key = _verified_by(folder, signature, files, f"{name}:{version}")
        check_facts(with_beside(store, view), _manifest_in_place(content))
        check_beside(store, view, files)
    return SignatureCheck(name, version, key, tuple(sorted(signed_files(signature))), state)


def check_served(
    repository: Location, name: str, versions: Sequence[int], keys: Sequence[Path]
) -> tuple[SignatureCheck, ...]:
    """Check the signatures of all a load of a model runs: its versions, and those of the models of an ensemble.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model to load. For an ensemble its models are checked as well.
        versions: versions of `name` the load serves. An ensemble's models follow their own policies.
        keys: public keys or root certificates, PEM. One must fit each version.

    Raises:
        UsageError: no key was given, or one cannot be read.
        RepositoryError: a version is missing, or its signature does not hold.
        ConfigError: config.pbtxt of a model is broken.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    found: dict[tuple[str, int], SignatureCheck] = {}
    waiting = [(name, version) for version in versions]
    while waiting:
        model, version = waiting.pop(0)
        if (model, version) in found:
            continue
        found[model, version] = check_signature(repository, model, version, keys)
        view = open_store(repository).look(model)
        for step in view.parsed_config().message().ensemble_scheduling.step:
            part = existing_model(open_store(repository), step.model_name)
            # Loading an ensemble loads its models by their own version policies, whatever version the ensemble asks
            # for.
            waiting += [(part.name, each) for each in served_versions(part.parsed_config(), part.versions)]
    return tuple(found.values())


def _signable(store: Store, name: str, version: int) -> tuple[ModelView, VersionView]:
    """Return a version, checked to hold plain files and folders only: nothing else can be vouched for."""
    view = changeable_model(store, name)
    if version not in view.versions:
        raise RepositoryError(
            f"model {name!r} has no version {version}", hint=f"`repo-manager show {name}` lists its versions."
        )
    check_no_link(str(view.place / str(version)), view.level.links.get(str(version)))
    content = with_versions(store, view, (version,)).contents.get(version)
    if content is None:
        raise RepositoryError(f"{name}:{version} was removed at this moment", hint="Choose another version.")
    odd = [entry.name for entry in content.files if not entry.regular]
    if odd:
        raise RepositoryError(
            f"{name}:{version} holds links or special files, which no signature can cover: {', '.join(odd)}",
            hint="Put the content itself there.",
        )
    return view, content


def _manifest_in_place(version: VersionView) -> Manifest:
    manifest = version.manifest()
    name = version.path.parent.name
    if (manifest.model, manifest.version) != (name, version.number):
        raise RepositoryError(
            f"{name}:{version.number} holds what was published as {manifest.model}:{manifest.version}",
            hint="Versions are not moved by hand; use `repo-manager copy`, then sign the copy.",
        )
    return manifest


def _check_as_published(signed: dict[str, str], manifest: Manifest, what: str) -> None:
    expected = {file: record.sha256.removeprefix("sha256:") for file, record in manifest.files.items()}
    found = {file: digest for file, digest in signed.items() if file != MANIFEST_FILENAME}
    odd = sorted(file for file in {*expected, *found} if expected.get(file) != found.get(file))
    if odd:
        raise RepositoryError(
            f"{what} differs from its manifest, and is not signed: {', '.join(odd)}",
            hint="`repo-manager verify` shows changed, added and missing files.",
        )


def _read_signature(store: Store, name: str, version: int) -> bytes:
    file = signature_name(name, version)
    try:
        content = store.read(file, limit_bytes=MAX_SIGNATURE_BYTES)
    except RepositoryError as exc:
        raise RepositoryError(f"{store.location / file} is no signature", hint="Sign the version again.") from exc
    if content is None:
        raise RepositoryError(
            f"{name}:{version} is not signed", hint=f"Sign it: repo-manager sign {name}:{version} --key KEY.pem"
        )
    return content


def _verified_by(folder: Path, content: bytes, keys: Sequence[Path], what: str) -> Path:
    reasons = []
    for key in keys:
        try:
            verify_signature(folder, content, key)
        except RepositoryError as exc:
            reasons.append(f"{key.name}: {exc.message}")
            continue
        return key
    raise RepositoryError(
        f"the signature of {what} does not hold:\n  " + "\n  ".join(reasons),
        hint="The files, the signature or the key are not those of the signer. Do not deploy this version.",
    )
