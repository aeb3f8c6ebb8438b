"""sign and verify --signed-by from the command line: exit codes, the policy, and no secret in the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from repo_manager import samples

Run = Callable[..., Any]
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem and key.pub, locked.pem with its password in locked.txt, stranger.pub."""
    folder = tmp_path_factory.mktemp("keys")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for name in ("key", "locked", "stranger"):
        key = ec.generate_private_key(ec.SECP256R1())
        lock = serialization.BestAvailableEncryption(PASSWORD.encode()) if name == "locked" else None
        text = key.private_bytes(pem, form, lock or serialization.NoEncryption())
        (folder / f"{name}.pem").write_bytes(text)
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    (folder / "locked.txt").write_text(f"{PASSWORD}\n")
    return folder


@pytest.fixture
def repository(run: Run, tmp_path: Path) -> Path:
    root = tmp_path / "models"
    assert run("add", samples.sample_model(), "--name", "d", "--repository", root, "--quiet").code == 0
    return root


def test_signed_and_verified(run: Run, repository: Path, keys: Path) -> None:
    signed = run("sign", "d:1", "--key", keys / "key.pem", "-r", repository, "--json")
    assert signed.code == 0
    assert json.loads(signed.out)["files"] == ["golden.npz", "manifest.json", "model.onnx"]
    verified = run("verify", "d", "--signed-by", keys / "key.pub", "-r", repository, "--json")
    assert verified.code == 0
    assert [check["version"] for check in json.loads(verified.out)["signatures"]] == [1]
    assert "d:1 is signed by" in run("verify", "--signed-by", keys / "key.pub", "-r", repository).out
    two = ("--signed-by", keys / "stranger.pub", "--signed-by", keys / "key.pub")
    assert run("verify", *two, "-r", repository).code == 0


def test_a_dry_run_signs_nothing(run: Run, repository: Path, keys: Path) -> None:
    assert run("sign", "d", "--key", keys / "key.pem", "-r", repository, "--dry-run").code == 0
    assert run("verify", "--signed-by", keys / "key.pub", "-r", repository).code == 3


def test_what_does_not_hold_ends_with_3(run: Run, repository: Path, keys: Path) -> None:
    unsigned = run("verify", "--signed-by", keys / "key.pub", "-r", repository, "--json")
    assert unsigned.code == 3
    assert "d:1 is not signed" in unsigned.out
    run("sign", "d", "--key", keys / "key.pem", "-r", repository)
    stranger = run("verify", "--signed-by", keys / "stranger.pub", "-r", repository)
    assert stranger.code == 3
    assert "made with another key" in " ".join(stranger.out.split())
    (repository / "d/1/added").write_text("x")
    assert "added: added" in " ".join(run("verify", "--signed-by", keys / "key.pub", "-r", repository).out.split())


def test_the_policy_of_the_settings_is_verified(
    run: Run, repository: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("verify", "-r", repository).code == 0
    monkeypatch.setenv("REPO_MANAGER_SIGNED_BY", f"{keys / 'stranger.pub'}:{keys / 'key.pub'}")
    assert run("verify", "-r", repository).code == 3
    run("sign", "d", "--key", keys / "key.pem", "-r", repository)
    assert run("verify", "-r", repository).code == 0


def test_a_policy_whose_key_is_gone_refuses(
    run: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Path
) -> None:
    run("sign", "d", "--key", keys / "key.pem", "-r", repository)
    monkeypatch.setenv("REPO_MANAGER_SIGNED_BY", str(tmp_path / "gone.pub"))
    gone = run("verify", "-r", repository)
    assert gone.code == 2
    assert "gone.pub is not a key file" in gone.err


def test_passwords_come_from_a_file_or_the_environment_and_are_never_shown(
    run: Run, repository: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sign", "d", "--key", keys / "locked.pem", "-r", repository, "--json")
    without = run(*command)
    assert without.code == 2
    assert "--password-file or REPO_MANAGER_KEY_PASSWORD" in without.err
    by_file = run(*command, "--password-file", keys / "locked.txt")
    monkeypatch.setenv("REPO_MANAGER_KEY_PASSWORD", PASSWORD)
    by_environment = run(*command)
    monkeypatch.setenv("REPO_MANAGER_KEY_PASSWORD", "battery staple")
    wrong = run(*command)
    assert (by_file.code, by_environment.code, wrong.code) == (0, 0, 2)
    shown = "".join(ended.out + ended.err for ended in (without, by_file, by_environment, wrong))
    assert PASSWORD not in shown
    assert "battery" not in shown
    assert "PRIVATE" not in shown


def test_options_that_do_not_belong_together_are_told(run: Run, repository: Path, keys: Path) -> None:
    chain = run("sign", "d", "--key", keys / "key.pem", "--chain", keys / "key.pub", "-r", repository)
    assert chain.code == 2
    assert "--chain belongs to --certificate" in chain.err
    no_certificate = run("sign", "d", "--key", keys / "key.pem", "--certificate", keys / "key.pub", "-r", repository)
    assert no_certificate.code == 2
    assert "is no certificate" in no_certificate.err
    file = run("sign", "d", "--key", keys / "key.pem", "--password-file", keys / "none", "-r", repository)
    assert file.code == 2


def test_signing_is_part_of_add(run: Run, repository: Path, keys: Path) -> None:
    added = run("add", samples.sample_model(), "--name", "s", "-r", repository, "--sign", keys / "key.pem", "--quiet")
    assert added.code == 0
    assert run("verify", "s", "--signed-by", keys / "key.pub", "-r", repository).code == 0
    dry = run("add", samples.sample_model(), "-n", "t", "-r", repository, "--sign", keys / "key.pem", "-q", "--dry-run")
    assert dry.code == 0
    no_key = run("add", samples.sample_model(), "-n", "t", "-r", repository, "--sign", keys / "key.pub", "-q")
    assert no_key.code == 2
    assert not (repository / "t").exists()


def test_a_promotion_is_signed_where_it_goes(run: Run, repository: Path, keys: Path, tmp_path: Path) -> None:
    production = tmp_path / "production"
    copy = ("copy", "d", "--into", production, "-r", repository, "--sign", keys / "key.pem", "-q")
    assert run(*copy, "--dry-run").code == 0
    assert not production.exists()
    for _ in range(2):  # existing versions are signed, too
        assert run(*copy).code == 0
        assert run("verify", "d", "--signed-by", keys / "key.pub", "-r", production).code == 0
    assert run("copy", "d", "--into", tmp_path / "other", "-r", repository, "--sign", keys / "key.pub").code == 2
    assert not (tmp_path / "other").exists()
