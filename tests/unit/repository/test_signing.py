"""Signatures by real keys: valid ones hold, and everything else is refused."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.signing import SigningKey, check_signature, sign_version
from repo_manager.repository.transfer import copy_version
from repo_manager.repository.verify import verify

Publish = Callable[..., object]
PASSWORD = "sesame"


def write_key(folder: Path, name: str, key: object, password: str | None = None) -> tuple[Path, Path]:
    """Write a private key and its public one, as openssl does."""
    locked = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, form, locked))  # type: ignore[attr-defined]
    form_of_public = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form_of_public))  # type: ignore[attr-defined]
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    found: dict[str, Path] = {}
    for name, key, password in (
        ("a", ec.generate_private_key(ec.SECP256R1()), None),
        ("b", ec.generate_private_key(ec.SECP384R1()), None),
        ("locked", ec.generate_private_key(ec.SECP521R1()), PASSWORD),
        ("ed", ed25519.Ed25519PrivateKey.generate(), None),
    ):
        found[name], found[f"{name}.pub"] = write_key(folder, name, key, password)
    return found


@pytest.fixture
def signed(root: Path, put: Publish, keys: dict[str, Path]) -> Path:
    """m:1 and m:2, n:1, all signed by key a."""
    for name in ("m", "m", "n"):
        put(name)
    for name, version in (("m", 1), ("m", 2), ("n", 1)):
        sign_version(root, name, version, keys["a"])
    return root


def signature(root: Path, name: str, version: int) -> Path:
    return root / f".repo-manager.{name}.{version}.sig.json"


def test_a_signature_holds_and_leaves_the_version_alone(signed: Path, keys: dict[str, Path]) -> None:
    check = check_signature(signed, "m", 1, [keys["b.pub"], keys["a.pub"]])
    assert check.key == keys["a.pub"]
    assert check.files == ("manifest.json", "model.onnx", "model.onnx.data")
    assert {path.name for path in (signed / "m/1").iterdir()} == set(check.files)
    assert verify(signed, models=False) == ()


def test_the_plain_command_line_verifies_it(signed: Path, keys: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed / "m/1")]
    command += ["--signature", str(signature(signed, "m", 1)), "--public_key", str(keys["a.pub"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (signed / "m/1/model.onnx").write_bytes(b"other")
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0


def tamper(root: Path) -> None:
    content = bytearray((root / "m/1/model.onnx").read_bytes())
    content[7] ^= 1
    (root / "m/1/model.onnx").write_bytes(content)


def swap(root: Path, *pairs: tuple[str, str]) -> None:
    for a, b in pairs:
        (root / a).rename(root / "aside")
        (root / b).rename(root / a)
        (root / "aside").rename(root / b)


ONE, TWO, OTHER = ".repo-manager.m.1.sig.json", ".repo-manager.m.2.sig.json", ".repo-manager.n.1.sig.json"


def reword(root: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the statement of a signature, as somebody without the key could."""
    bundle = json.loads((root / ONE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (root / ONE).write_text(json.dumps(bundle))


def without_signatures(root: Path) -> None:
    bundle = json.loads((root / ONE).read_text())
    bundle["dsseEnvelope"]["signatures"] = []
    (root / ONE).write_text(json.dumps(bundle))


def hidden(root: Path) -> None:
    (root / "m/1/.git").mkdir()
    (root / "m/1/.git/hook").write_text("x")


def bytecode(root: Path) -> None:
    (root / "m/1/__pycache__").mkdir()
    (root / "m/1/__pycache__/model.cpython-311.pyc").write_bytes(b"x")


def hard_link(root: Path) -> None:
    (root / "m/1/model.onnx").unlink()
    (root.parent / "other").write_bytes(b"other")
    (root / "m/1/model.onnx").hardlink_to(root.parent / "other")


def config_of(root: Path, old: str, new: str) -> None:
    text = (root / "m/config.pbtxt").read_text()
    assert old in text
    (root / "m/config.pbtxt").write_text(text.replace(old, new))


def append(root: Path, text: str) -> None:
    with (root / "m/config.pbtxt").open("a") as file:
        file.write(text + "\n")


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte": (tamper, "changed: model.onnx"),
    "a changed manifest": (
        lambda r: (r / "m/1/manifest.json").write_text((r / "m/1/manifest.json").read_text() + " "),
        "changed: manifest.json",
    ),
    "an added file": (lambda r: (r / "m/1/extra.so").write_text("x"), "added: extra.so"),
    "an added file that git would ignore": (lambda r: (r / "m/1/.gitignore").write_text("x"), "not covered"),
    "an added hidden folder": (hidden, "not covered"),
    "bytecode in the place of the code": (bytecode, "added: __pycache__/model.cpython-311.pyc"),
    "a hard link to another content": (hard_link, "changed: model.onnx"),
    "a missing file": (lambda r: (r / "m/1/model.onnx.data").unlink(), "missing: model.onnx.data"),
    "a missing manifest": (lambda r: (r / "m/1/manifest.json").unlink(), "missing: manifest.json"),
    "a link": (lambda r: (r / "m/1/l").symlink_to("/etc/passwd"), "links or special files"),
    "a linked folder": (lambda r: (r / "m/1/l").symlink_to("/etc"), "links or special files"),
    "the version as a link": (
        lambda r: (shutil.move(r / "m/1", r.parent / "x"), (r / "m/1").symlink_to(r.parent / "x")),
        "is a symbolic link",
    ),
    "a swapped version": (lambda r: swap(r, ("m/1", "m/2")), "does not hold"),
    "a version swapped with its signature": (
        lambda r: swap(r, ("m/1", "m/2"), (ONE, TWO)),
        "published as m:2",
    ),
    "a swapped model with its signature": (lambda r: swap(r, ("m", "n"), (ONE, OTHER)), "published as n:1"),
    "another version's signature": (lambda r: shutil.copy(r / TWO, r / ONE), "changed: manifest.json"),
    "another model's signature": (lambda r: shutil.copy(r / OTHER, r / ONE), "does not hold"),
    "no signature": (lambda r: (r / ONE).unlink(), "is not signed"),
    "an empty signature": (lambda r: (r / ONE).write_bytes(b""), "does not hold"),
    "half a signature": (lambda r: (r / ONE).write_bytes((r / ONE).read_bytes()[:900]), "does not hold"),
    "no JSON object": (lambda r: (r / ONE).write_text("[1]"), "does not hold"),
    "deep JSON": (lambda r: (r / ONE).write_text("[" * 100000), "does not hold"),
    "a signature that is a link": (lambda r: ((r / ONE).unlink(), (r / ONE).symlink_to(r / TWO)), "no signature"),
    "unsigned files": (without_signatures, "does not hold"),
    "reworded: no files": (lambda r: reword(r, lambda s: s["predicate"].update(resources=[])), "does not hold"),  # type: ignore[attr-defined]
    "reworded: paths ignored": (
        lambda r: reword(r, lambda s: s["predicate"]["serialization"].update(ignore_paths=["model.onnx"])),  # type: ignore[index]
        "does not hold",
    ),
    "another backend for the same files": (
        lambda r: config_of(r, 'backend: "onnxruntime"', 'backend: "python"'),
        "by other code.*backend",
    ),
    "another backend, in escapes": (
        lambda r: config_of(r, '"onnxruntime"', "'\\160\\171' 'thon'"),
        "by other code.*backend",
    ),
    "a warm-up that reads a file elsewhere": (
        lambda r: append(
            r,
            'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 '
            'input_data_file: "../../passwd" } } }',
        ),
        "by other code.*model_warmup",
    ),
    "another model file": (
        lambda r: append(r, 'default_model_filename: "model.onnx.data"'),
        "by other code.*default_model_filename",
    ),
    "a library of custom operators": (
        lambda r: append(r, 'model_operations { op_library_filename: "/tmp/x.so" }'),
        "by other code.*model_operations",
    ),
    "no config.pbtxt": (lambda r: (r / "m/config.pbtxt").unlink(), "has no config.pbtxt"),
    "config.pbtxt as a link": (
        lambda r: (
            shutil.move(r / "m/config.pbtxt", r.parent / "c"),
            (r / "m/config.pbtxt").symlink_to(r.parent / "c"),
        ),
        "links or special files",
    ),
    "a broken config.pbtxt": (lambda r: append(r, "}"), "config.pbtxt"),
    "another platform's files": (
        lambda r: config_of(r, 'backend: "onnxruntime"', 'platform: "tensorflow_savedmodel"'),
        "by other code",
    ),
    "a runtime": (lambda r: append(r, 'runtime: "model.py"'), "by other code.*runtime"),
    "a file for one kind of GPU": (
        lambda r: append(r, 'cc_model_filenames { key: "7.5" value: "other.onnx" }'),
        "by other code.*cc_model_filenames",
    ),
    "an environment": (
        lambda r: append(r, 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/env.tar.gz" } }'),
        "by other code.*EXECUTION_ENV_PATH",
    ),
    "a parameter that names a file": (
        lambda r: append(r, 'parameters { key: "TRITON_BATCH_STRATEGY_PATH" value { string_value: "evil.so" } }'),
        "by other code.*TRITON_BATCH_STRATEGY_PATH",
    ),
    "an agent": (
        lambda r: append(r, 'model_repository_agents { agents { name: "evil" } }'),
        "by other code.*model_repository_agents",
    ),
    "an accelerator's plug-in": (
        lambda r: append(
            r,
            'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" '
            'parameters { key: "plugin_path" value: "/tmp/x.so" } } } }',
        ),
        "by other code.*execution_accelerators",
    ),
    "an ensemble instead": (
        lambda r: append(r, 'ensemble_scheduling { step { model_name: "n" model_version: -1 } }'),
        "by other code.*ensemble_scheduling|config.pbtxt",
    ),
    "a label file elsewhere": (
        lambda r: append(r, 'output { name: "z" data_type: TYPE_FP32 dims: 1 label_filename: "../../passwd" }'),
        "by other code.*passwd",
    ),
    "a library beside the versions": (lambda r: beside(r, "libtriton_onnxruntime.so"), "libtriton_onnxruntime.so"),
    "a Python file beside the versions": (lambda r: beside(r, "model.py"), "unsigned files.*model.py"),
    "warm-up data": (lambda r: beside(r, "warmup/data"), "unsigned files.*warmup/data"),
    "a first state": (lambda r: beside(r, "initial_state/state"), "unsigned files.*initial_state/state"),
    "a file deep in a folder": (lambda r: beside(r, "a/b/c.so"), "unsigned files.*a/b/c.so"),
    "a hidden file beside the versions": (lambda r: beside(r, ".hidden"), "unsigned files.*.hidden"),
    "another spelling of the version's number": (lambda r: beside(r, "01/model.onnx"), "unsigned files.*01/model.onnx"),
    "a folder that Triton takes for a version": (lambda r: beside(r, "1.tmp/model.onnx"), "unsigned files.*1.tmp"),
    "a link beside the versions": (lambda r: (r / "m/x.so").symlink_to("/etc/passwd"), "links or special files"),
    "a linked folder beside the versions": (lambda r: (r / "m/x").symlink_to("/etc"), "links or special files"),
    "a variant with another backend": (
        lambda r: beside(r, "configs/other.pbtxt", 'backend: "python"'),
        "configs/other.pbtxt would run .* by other code.*backend",
    ),
    "a variant": (
        lambda r: beside(r, "configs/other.pbtxt", (r / "m/config.pbtxt").read_text()),
        "unsigned files.*configs/other.pbtxt",
    ),
}


def beside(root: Path, name: str, text: str = "x") -> None:
    file = root / "m" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused(attack: str, signed: Path, keys: dict[str, Path]) -> None:
    act, reason = ATTACKS[attack]
    check_signature(signed, "m", 1, [keys["a.pub"]])
    act(signed)
    with pytest.raises(RepositoryError, match=reason):
        check_signature(signed, "m", 1, [keys["a.pub"]])


def test_a_key_that_is_not_trusted_is_refused(signed: Path, keys: dict[str, Path]) -> None:
    with pytest.raises(RepositoryError, match="made with another key"):
        check_signature(signed, "m", 1, [keys["b.pub"]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("count: 1", "count: 3"),
        ("dynamic_batching {", "dynamic_batching { max_queue_delay_microseconds: 7"),
        ('backend: "onnxruntime"', 'backend: "onnxruntime" default_model_filename: "model.onnx"'),
        ('backend: "onnxruntime"', 'platform: "onnxruntime_onnx"'),
    ],
)
def test_a_configuration_that_runs_the_same_code_keeps_the_signature(
    old: str, new: str, signed: Path, keys: dict[str, Path]
) -> None:
    config_of(signed, old, new)
    check_signature(signed, "m", 1, [keys["a.pub"]])


@pytest.mark.parametrize("value", ["7", "true", "0.5"])
def test_a_number_among_the_parameters_is_tuning(value: str, signed: Path, keys: dict[str, Path]) -> None:
    append(signed, f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{value}" }} }}')
    check_signature(signed, "m", 1, [keys["a.pub"]])


def test_files_beside_the_versions_are_signed_with_any_of_them(signed: Path, keys: dict[str, Path]) -> None:
    beside(signed, "labels.txt", "cat\ndog\n")
    with pytest.raises(RepositoryError, match=r"unsigned files.*labels\.txt"):
        check_signature(signed, "m", 1, [keys["a.pub"]])
    sign_version(signed, "m", 2, keys["a"])
    for version in (1, 2):
        check_signature(signed, "m", version, [keys["a.pub"]])
    with pytest.raises(RepositoryError, match="made with another key"):
        check_signature(signed, "m", 1, [keys["b.pub"]])
    # Neither other content, nor another model's signature of the same content, nor one more file.
    beside(signed, "labels.txt", "dog\ncat\n")
    with pytest.raises(RepositoryError, match=r"changed: files/labels\.txt"):
        check_signature(signed, "m", 1, [keys["a.pub"]])
    (signed / "n" / "labels.txt").write_text("cat\ndog\n")
    shutil.copy(signed / ".repo-manager.m.2.beside.sig.json", signed / ".repo-manager.n.1.beside.sig.json")
    with pytest.raises(RepositoryError, match=r"changed: about\.json"):
        check_signature(signed, "n", 1, [keys["a.pub"]])
    beside(signed, "labels.txt", "cat\ndog\n")
    beside(signed, "libtriton_onnxruntime.so")
    with pytest.raises(RepositoryError, match=r"added: files/libtriton_onnxruntime\.so"):
        check_signature(signed, "m", 1, [keys["a.pub"]])
    (signed / "m" / "libtriton_onnxruntime.so").unlink()
    remove(signed, "m", 2)
    assert not (signed / ".repo-manager.m.2.beside.sig.json").exists()


def test_a_version_that_says_nothing_of_its_configuration_is_not_vouched_for(
    root: Path, put: Publish, keys: dict[str, Path]
) -> None:
    put()
    manifest = root / "m/1/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "config": ""}))
    with pytest.raises(RepositoryError, match="says nothing"):
        sign_version(root, "m", 1, keys["a"])


@pytest.mark.parametrize("place", ["$$TRITON_MODEL_DIRECTORY/../envs/e.tar.gz", "{root}/envs/e.tar.gz"])
def test_code_in_the_repository_outside_the_model_cannot_be_signed(
    place: str, root: Path, put: Publish, keys: dict[str, Path]
) -> None:
    put()
    text = place.replace("{root}", str(root))
    append(root, f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{text}" }} }}')
    manifest = root / "m/1/manifest.json"
    config = (root / "m/config.pbtxt").read_text()
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "config": config}))
    with pytest.raises(RepositoryError, match="outside the model's folder, so no signature covers it"):
        sign_version(root, "m", 1, keys["a"])


def test_a_file_that_is_exchanged_for_a_moment_leaves_a_trace(signed: Path, keys: dict[str, Path]) -> None:
    file = signed / "m/1/model.onnx"
    content, times = file.read_bytes(), file.stat()
    before = check_signature(signed, "m", 1, [keys["a.pub"]])
    assert check_signature(signed, "m", 1, [keys["a.pub"]]).state == before.state
    file.write_bytes(b"other")
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check_signature(signed, "m", 1, [keys["a.pub"]]).state != before.state


def test_what_was_changed_after_publishing_is_not_signed(root: Path, put: Publish, keys: dict[str, Path]) -> None:
    put()
    tamper(root)
    with pytest.raises(RepositoryError, match=r"is not signed: model\.onnx"):
        sign_version(root, "m", 1, keys["a"])
    assert not signature(root, "m", 1).exists()


def test_a_dry_run_writes_nothing(root: Path, put: Publish, keys: dict[str, Path]) -> None:
    put()
    before = sorted(root.rglob("*"))
    assert not sign_version(root, "m", 1, keys["a"], dry_run=True).applied
    assert sorted(root.rglob("*")) == before


def test_an_encrypted_key_needs_its_password(root: Path, put: Publish, keys: dict[str, Path]) -> None:
    put()
    with pytest.raises(UsageError, match="no password was given") as raised:
        sign_version(root, "m", 1, keys["locked"])
    assert raised.value.hint == "Give its password: --password-file FILE (sign only), or REPO_MANAGER_KEY_PASSWORD."
    with pytest.raises(UsageError, match="Incorrect password") as raised:
        sign_version(root, "m", 1, SigningKey(keys["locked"], "guess"))
    assert (raised.value.hint or "").startswith("Check the password")
    assert "guess" not in str(raised.value)
    assert "guess" not in repr(SigningKey(keys["locked"], "guess"))
    sign_version(root, "m", 1, SigningKey(keys["locked"], PASSWORD))
    check_signature(root, "m", 1, [keys["locked.pub"]])


@pytest.mark.parametrize(
    ("name", "reason", "first_step"),
    [
        ("ed", "no elliptic curve key", "Use an elliptic curve key"),
        ("a.pub", "private key", "Give the path of your private key. Only if you have none yet, make a pair"),
        ("none", "is not a key file", "Give the path of your private key. Only if you have none yet, make a pair"),
    ],
)
def test_what_is_no_key_for_signing_is_told(
    name: str, reason: str, first_step: str, root: Path, put: Publish, keys: dict[str, Path], tmp_path: Path
) -> None:
    put()
    with pytest.raises(UsageError, match=reason) as raised:
        sign_version(root, "m", 1, keys.get(name, tmp_path / "none"))
    assert (raised.value.hint or "").startswith(first_step)


def test_a_password_for_a_key_without_one(root: Path, put: Publish, keys: dict[str, Path]) -> None:
    put()
    with pytest.raises(UsageError, match="it is not encrypted") as raised:
        sign_version(root, "m", 1, SigningKey(keys["a"], PASSWORD))
    assert (raised.value.hint or "").startswith("Leave out --password-file")


def test_no_password_is_asked_for_where_a_certificate_rules_it_out(
    root: Path, put: Publish, keys: dict[str, Path], tmp_path: Path
) -> None:
    put()
    certificate = tmp_path / "certificate.pem"
    certificate.write_text("-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(UsageError, match="it is encrypted") as raised:
        sign_version(root, "m", 1, SigningKey(keys["locked"], certificate=certificate))
    assert (raised.value.hint or "").startswith("Sign with the bare key")


@pytest.mark.parametrize(
    ("name", "reason"), [("ed.pub", "no elliptic curve key"), ("a", "is a private key"), ("none", "not a key file")]
)
def test_a_policy_whose_key_cannot_be_used_refuses(
    name: str, reason: str, signed: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason) as raised:
        check_signature(signed, "m", 1, [keys.get(name, tmp_path / "none")])
    assert ("-genkey" in (raised.value.hint or "")) == (name == "ed.pub")  # a new pair would not check old signatures


def test_no_key_at_all_is_an_error(signed: Path) -> None:
    with pytest.raises(UsageError, match="no key"):
        check_signature(signed, "m", 1, [])


def test_a_removed_version_takes_its_signature_along(signed: Path) -> None:
    remove(signed, "m", 2)
    assert not signature(signed, "m", 2).exists()
    assert signature(signed, "m", 1).exists()
    remove(signed, "n", force=True)
    assert not signature(signed, "n", 1).exists()


def test_gc_takes_signatures_that_a_crash_left(signed: Path) -> None:
    shutil.copy(signature(signed, "m", 1), signature(signed, "gone", 7))
    assert [problem.where for problem in verify(signed, models=False)] == [".repo-manager.gone.7.sig.json"]
    gc(signed, dry_run=True)
    assert signature(signed, "gone", 7).exists()
    gc(signed)
    assert verify(signed, models=False) == ()
    assert signature(signed, "m", 1).exists()


def test_a_copy_is_another_version_and_has_to_be_signed_anew(
    signed: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    copy_version(signed, "m", 2, tmp_path / "production")
    with pytest.raises(RepositoryError, match="m:2 is not signed"):
        check_signature(tmp_path / "production", "m", 2, [keys["a.pub"]])


def make_certificate(folder: Path, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None) -> dict:
    """A self-signed root, or a signer's certificate under one."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"c{len(list(folder.iterdir()))}")])
    now = datetime.datetime.now(datetime.timezone.utc)
    others = ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    usage = dict.fromkeys([*others, "encipher_only", "decipher_only"], False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=issuer is not None, key_cert_sign=issuer is None, crl_sign=False, **usage),
            critical=True,
        )
    )
    certificate = builder.sign(key if issuer is None else issuer[1], hashes.SHA256())
    path = folder / f"{name.rfc4514_string()}.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return {"certificate": certificate, "key": key, "path": path}


def test_a_certificate_is_checked_up_to_its_root(root: Path, put: Publish, tmp_path: Path) -> None:
    put()
    folder = tmp_path / "certificates"
    folder.mkdir()
    authority, stranger = make_certificate(folder, None), make_certificate(folder, None)
    signer = make_certificate(folder, (authority["certificate"], authority["key"]))
    private, _ = write_key(folder, "signer", signer["key"])
    sign_version(root, "m", 1, SigningKey(private, certificate=signer["path"]))
    assert check_signature(root, "m", 1, [authority["path"]]).key == authority["path"]
    with pytest.raises(RepositoryError, match="does not stand behind"):
        check_signature(root, "m", 1, [stranger["path"]])
    tamper(root)
    with pytest.raises(RepositoryError, match=r"changed: model\.onnx"):
        check_signature(root, "m", 1, [authority["path"]])


def test_a_certificate_of_another_key_is_told(root: Path, put: Publish, keys: dict[str, Path], tmp_path: Path) -> None:
    put()
    folder = tmp_path / "certificates"
    folder.mkdir()
    other = make_certificate(folder, None)
    with pytest.raises(UsageError, match="does not match"):
        sign_version(root, "m", 1, SigningKey(keys["a"], certificate=other["path"]))
