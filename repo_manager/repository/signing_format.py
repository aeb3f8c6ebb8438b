"""The OpenSSF model-signing format: the one caller of the `model_signing` package.

A signature is a Sigstore bundle (JSON) over an in-toto statement with each file's digest. Keys are elliptic curve keys
in PEM (P-256, P-384, P-521). With a certificate the bundle carries the certificate's chain.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.files import work_folder
from repo_manager.optional import require
from repo_manager.validation import check_fields

__all__ = ["SigningKey", "check_key", "key_kind", "make_signature", "signed_files", "verify_signature"]

MAX_SIGNATURE_BYTES = 16 << 20
_MAX_KEY_BYTES = 1 << 20
_NEW_PAIR = "openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem; openssl ec -in KEY.pem -pubout -out KEY.pub"
_KIND_HINT = f"Use an elliptic curve key. To make a pair: {_NEW_PAIR}"
_PRIVATE_HINT = f"Give the path of your private key. Only if you have none yet, make a pair: {_NEW_PAIR}"
_PUBLIC_HINT = (
    "Give the path of the signer's public key, or of a root certificate. If you have the private key, this writes the "
    "public one: openssl pkey -in KEY.pem -pubout -out KEY.pub"
)
_CERTIFICATE_HINT = "Give the path of the certificate."
_LOCKED_HINT = "Give its password: --password-file FILE (sign only), or REPO_MANAGER_KEY_PASSWORD."
_LOCKED_WITH_CERTIFICATE_HINT = "Sign with the bare key, or give an unencrypted key file only you can read."
_PASSWORD_HINT = "Check the password: the first line of --password-file, or REPO_MANAGER_KEY_PASSWORD."
_OPEN_HINT = "Leave out --password-file, and unset REPO_MANAGER_KEY_PASSWORD."
_NO_PASSWORD, _NEEDLESS_PASSWORD = "Password was not given", "Password was given but"
# Errors of the package and its dependencies for bad keys and bundles. They have no common base class.
_VENDOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class SigningKey:
    """The signer's key and certificates.

    Attributes:
        path: a private elliptic curve key, PEM.
        password: of the key. `None` for an unencrypted one.
        certificate: of the key, PEM. `None` signs with the bare key.
        chain: certificates between it and the root, PEM.
    """

    path: Path
    password: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


def key_kind(path: Path) -> str:
    """Return whether a file to verify with holds a `key` (public) or a `certificate` (a root of trust).

    Raises:
        UsageError: it cannot be read, is neither, or is a private key.
    """
    text = _read_pem(path, _PUBLIC_HINT)
    if "PRIVATE KEY-----" in text:
        raise UsageError(
            f"{path} is a private key; a signature is checked with the public one",
            hint=f"openssl pkey -in {path} -pubout writes it. Keep the private key where only the signer can read it.",
        )
    if "-----BEGIN CERTIFICATE-----" in text:
        return "certificate"
    if "-----BEGIN PUBLIC KEY-----" in text:
        return "key"
    raise UsageError(f"{path} is no public key and no certificate in PEM format", hint=_PUBLIC_HINT)


def make_signature(folder: Path, key: SigningKey) -> bytes:
    """Sign all files below a folder.

    Args:
        folder: folder whose files are signed, subfolders included.
        key: private key and its certificates.

    Returns:
        The signature's file content.

    Raises:
        UsageError: the key, its password or a certificate does not fit.
        RepositoryError: the folder holds links or special files.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    signer = _signer(key)
    with work_folder("repo-manager-sign-") as work:
        file = Path(work) / "signature.json"
        try:
            signer.sign(folder, file)
        except _VENDOR_ERRORS as exc:
            raise RepositoryError(f"{folder} cannot be signed: {_reason(exc)}") from exc
        return file.read_bytes()


def check_key(key: SigningKey) -> None:
    """Find out whether a key can sign, before anything long is begun.

    Raises:
        UsageError: the key, its password or a certificate does not fit.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    _signer(key)


def verify_signature(folder: Path, content: bytes, key: Path) -> None:
    """Check a signature by one key: it must be made by this key, and list exactly the files below a folder.

    Args:
        folder: folder with exactly the signed files.
        content: content of the signature's file, a Sigstore bundle.
        key: a public key, or a root certificate, PEM.

    Raises:
        UsageError: the file holds no usable key.
        RepositoryError: it does not verify. With the reason.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    verifying = require("model_signing.verifying")
    exceptions = require("cryptography.exceptions")
    openssl = require("OpenSSL.crypto")
    config = verifying.Config()
    try:
        if key_kind(key) == "key":
            config.use_elliptic_key_verifier(public_key=key)
        else:
            config.use_certificate_verifier(certificate_chain=[key])
    except _VENDOR_ERRORS as exc:
        hint = _KIND_HINT if _is_of_other_kind(exc) else _PUBLIC_HINT
        raise UsageError(f"{key} cannot check signatures: {_reason(exc)}", hint=hint) from exc
    with work_folder("repo-manager-verify-") as work:
        file = Path(work) / "signature.json"
        file.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning about old bundles
                config.verify(folder, file)
        except exceptions.InvalidSignature as exc:
            raise RepositoryError("it was changed, or made with another key") from exc
        except openssl.X509StoreContextError as exc:
            raise RepositoryError(f"it does not stand behind the signer's certificate: {exc}") from exc
        except _VENDOR_ERRORS as exc:
            raise RepositoryError(_mismatch(str(exc), folder, content) or _reason(exc)) from exc
    _check_coverage(folder, content)


def signed_files(content: bytes) -> dict[str, str]:
    """Return path -> digest (hexadecimal) of the files a signature lists. Nothing is verified.

    Raises:
        RepositoryError: the content is no such signature.
    """
    try:
        bundle = json.loads(content)
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        predicate = statement["predicate"]
        sharded = predicate["serialization"]["method"] == "shards"
        found: dict[str, str] = {}
        for resource in predicate["resources"]:
            name, digest = resource["name"], resource["digest"]
            found[name.rsplit(":", 2)[0] if sharded else name] = digest
    except _VENDOR_ERRORS as exc:
        raise RepositoryError(f"it is no signature in the OpenSSF model-signing format: {_reason(exc)}") from exc
    return found


def _signer(key: SigningKey) -> Any:
    signing, hashing = require("model_signing.signing"), require("model_signing.hashing")
    require("OpenSSL")
    signer = signing.Config().set_hashing_config(_every_file(hashing))
    _read_pem(key.path, _PRIVATE_HINT)
    try:
        if key.certificate is None:
            password = None if key.password is None else key.password.encode()
            signer.use_elliptic_key_signer(private_key=key.path, password=password)
        else:
            signer.use_certificate_signer(
                private_key=key.path, signing_certificate=key.certificate, certificate_chain=_chain(key)
            )
    except _VENDOR_ERRORS as exc:
        raise UsageError(f"{key.path} cannot sign: {_reason(exc)}", hint=_hint(exc, key)) from exc
    return signer


def _mismatch(text: str, folder: Path, content: bytes) -> str:
    """The package's word the files are not those of a good signature, in ours. Empty when this is not the reason."""
    if not text.startswith("Signature mismatch"):
        return ""
    listed, present, told = set(signed_files(content)), _files(folder), text.replace("\\'", "'")
    changed = {name for name in listed & present if f"Hash mismatch for '{name}'" in told}
    kinds = {"changed": changed, "missing": listed - present, "added": present - listed}
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    return "the files are not the signed ones; " + "; ".join(found) if found else ""


def _check_coverage(folder: Path, content: bytes) -> None:
    """Refuse files a signature leaves out: the format lets one ignore paths, and the package ignores .git*."""
    added = sorted(_files(folder) - set(signed_files(content)))
    if added:
        raise RepositoryError(f"not covered by the signature: {', '.join(added)}")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _every_file(hashing: Any) -> Any:
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _chain(key: SigningKey) -> tuple[Path, ...]:
    if key.password is not None:
        raise UsageError(
            "an encrypted key cannot be used with a certificate",
            hint=_LOCKED_WITH_CERTIFICATE_HINT,
        )
    own = () if key.certificate is None else (key.certificate,)
    for path in (*own, *key.chain):
        if "-----BEGIN CERTIFICATE-----" not in _read_pem(path, _CERTIFICATE_HINT):
            raise UsageError(f"{path} is no certificate in PEM format", hint=_CERTIFICATE_HINT)
    # The package cannot read an empty chain. The certificate itself adds nothing to the chain.
    return key.chain or own


def _read_pem(path: Path, hint: str) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_KEY_BYTES:
            raise UsageError(f"{path} is not a key file", hint=hint)
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as exc:
        raise UsageError(f"{path}: the key cannot be read: {exc.strerror or exc}") from exc


def _hint(exc: Exception, key: SigningKey) -> str:
    """Return the next step with a private key that cannot sign. A new pair comes last: nobody trusts it yet."""
    text = str(exc)
    if _NO_PASSWORD in text:
        return _LOCKED_HINT if key.certificate is None else _LOCKED_WITH_CERTIFICATE_HINT
    if _NEEDLESS_PASSWORD in text:
        return _OPEN_HINT
    if "incorrect password" in text.lower():
        return _PASSWORD_HINT
    return _KIND_HINT if _is_of_other_kind(exc) else _PRIVATE_HINT


def _is_of_other_kind(exc: Exception) -> bool:
    return "'curve'" in str(exc) or "Unsupported key for curve" in str(exc)


def _reason(exc: Exception) -> str:
    """A vendor's message on one line. A password's question in our words."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    if _NO_PASSWORD in text:
        return "it is encrypted, and no password was given (--password-file or REPO_MANAGER_KEY_PASSWORD)"
    if _NEEDLESS_PASSWORD in text:
        return "a password was given, and it is not encrypted"
    if text.startswith("Key mismatch"):
        return "it was made with another key"
    if _is_of_other_kind(exc):
        return "it is no elliptic curve key (P-256, P-384 or P-521)"
    return text[:500]
