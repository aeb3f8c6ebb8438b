"""Signed versions: who vouches for a version's content, its model's name and its number.

A signature lists every file in a version's folder, manifest.json included, and the manifest names the model and the
number: so it holds for that version in that place only. It lies in the root, as `.repo-manager.NAME.VERSION.sig.json`,
because Triton would load the version again for a file in its folder, and ignores files in the root.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError, UsageError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location
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
from repo_manager.repository.view import ModelView, VersionView, changeable_model, check_no_link, with_versions
from repo_manager.triton_config import parse_config

__all__ = ["Signature", "SignatureCheck", "SigningKey", "check_signature", "sign_version"]

# Fields of config.pbtxt that decide which code runs on the files; the others are tuning and may change.
_CODE_FIELDS = ("runtime", "cc_model_filenames", "model_operations", "model_repository_agents", "ensemble_scheduling")
_CODE_PARAMETERS = ("EXECUTION_ENV_PATH",)


@dataclasses.dataclass(frozen=True)
class Signature:
    """A signature that was made, or would be.

    Attributes:
        name: the model.
        version: its version.
        file: where the signature lies, below the root.
        files: what it covers.
        replaced: whether the version had one before.
        applied: whether it was written.
    """

    name: str
    version: int
    file: str
    files: tuple[str, ...]
    replaced: bool
    applied: bool


@dataclasses.dataclass(frozen=True)
class SignatureCheck:
    """A signature that holds.

    Attributes:
        name: the model.
        version: its version.
        key: the key, or root certificate, by which it was verified.
        files: what it covers.
    """

    name: str
    version: int
    key: Path
    files: tuple[str, ...]


def sign_version(
    repository: Location, name: str, version: int, key: Path | SigningKey, *, dry_run: bool = False
) -> Signature:
    """Sign a version as it was published; an earlier signature of it is replaced.

    The content is compared with the manifest first: what was changed after publishing is not signed. From object
    storage the version is fetched.

    Args:
        repository: the root.
        name: the model.
        version: its version.
        key: a private elliptic curve key in PEM, or one with its password or certificate.
        dry_run: check and sign, but write nothing.

    Raises:
        UsageError: the key cannot be used.
        RepositoryError: no such version, it has no manifest, is not what the manifest says, or the store refuses.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    with disk_errors(f"sign {name}:{version}"):
        store = open_store(repository)
        manifest = _manifest_in_place(_signable(store, name, version)[1])
        with store.fetch(name, version, compare=False) as folder:
            content = make_signature(folder, key if isinstance(key, SigningKey) else SigningKey(key))
        signed = signed_files(content)
        _check_as_published(signed, manifest, f"{name}:{version}")
        file = signature_name(name, version)
        replaced = store.read(file) is not None
        if not dry_run:
            with store.exclusive(name):
                _signable(store, name, version)
                store.put(file, content)
    return Signature(name, version, file, tuple(sorted(signed)), replaced, applied=not dry_run)


def check_signature(repository: Location, name: str, version: int, keys: Sequence[Path]) -> SignatureCheck:
    """Check that one of the keys vouches for a version as it is now.

    Refused are: no signature; a damaged one; one of another key, version or model; a file that was changed, added
    or is missing; links and special files; and a config.pbtxt that would run the files by other code than the signed
    manifest says. From object storage the version is fetched.

    Args:
        repository: the root.
        name: the model.
        version: its version.
        keys: public keys or root certificates, PEM; one has to fit.

    Raises:
        UsageError: no key was given, or one cannot be read.
        RepositoryError: no such version, or its signature does not hold.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    if not keys:
        raise UsageError("no key to check signatures with", hint="Give a public key: --signed-by KEY.pub")
    with disk_errors(f"check the signature of {name}:{version}"):
        store = open_store(repository)
        view, content = _signable(store, name, version)
        signature = _read_signature(store, name, version)
        with store.fetch(name, version, compare=False) as folder:
            key = _verified_by(folder, signature, keys, f"{name}:{version}")
        _check_code(view, _manifest_in_place(content))
    return SignatureCheck(name, version, key, tuple(sorted(signed_files(signature))))


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
            f"{what} is not what its manifest says, and is not signed: {', '.join(odd)}",
            hint="`repo-manager verify` shows what was changed, added or is missing.",
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


def _check_code(view: ModelView, manifest: Manifest) -> None:
    """Compare what config.pbtxt makes of the files with the signed manifest: it lies outside the signed folder."""
    if not manifest.config or not view.has_config:
        return
    try:
        signed_config, current_config = parse_config(manifest.config, where=MANIFEST_FILENAME), view.parsed_config()
    except ConfigError as exc:
        raise RepositoryError(exc.message, hint=exc.hint) from exc
    signed, current = signed_config.message(), current_config.message()
    odd = ["backend"] if signed_config.backend != current_config.backend else []
    odd += ["default_model_filename"] if signed_config.model_filename != current_config.model_filename else []
    odd += [field for field in _CODE_FIELDS if getattr(signed, field, None) != getattr(current, field, None)]
    odd += [
        f"parameters.{key}"
        for key in _CODE_PARAMETERS
        if signed.parameters[key].string_value != current.parameters[key].string_value
    ]
    if odd:
        raise RepositoryError(
            f"{view.config_place} would run the signed files by other code than their manifest says: {', '.join(odd)}",
            hint=f"Put these fields back as manifest.json has them: repo-manager config {view.name} --set ...",
        )
