"""A signature policy also covers versions served already: on one server, on several, in object storage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.object_stores import BUCKET, moto_server, s3_environment, tiny_config, tiny_files
from support.serving import running_server, scaling_model

from repo_manager.cli.main import main
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.repository.publish import publish
from repo_manager.repository.scan import find_model
from repo_manager.repository.signing import sign_version
from repo_manager.rollout.checks import CheckOutcome, check_version
from repo_manager.server.command import ServerOptions
from repo_manager.triton_config.config import parse_config

pytestmark = pytest.mark.integration
Run = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; its public one lies beside it."""
    private = tmp_path_factory.mktemp("keys") / "key.pem"
    made = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private.write_bytes(
        made.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    private.with_suffix(".pub").write_bytes(public)
    return private


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: object) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["repo-manager", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, (int, type(None)))
        return ended.value.code or 0, json.loads(capfd.readouterr().out)

    return run


@pytest.fixture
def served(tmp_path: Path, key: Path) -> Iterator[tuple[Path, list[str]]]:
    """A signed m:1, and the URLs of two servers of its repository."""
    root = tmp_path / "models"
    root.mkdir()
    model = tmp_path / "model.onnx"
    onnx.save(scaling_model(2.0, width=3), model)
    config = """backend: "onnxruntime" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: 3 } output { name: "y" data_type: TYPE_FP32 dims: 3 }"""
    publish(root, "m", {"model.onnx": model}, parse_config(config, where="config.pbtxt"), {"precision": "fp32"})
    sign_version(root, "m", 1, key)
    options = ServerOptions(str(root), auto_complete=False)
    with running_server(options) as first, running_server(options) as second:
        yield root, [first.grpc_url, second.http_url]


def test_a_served_version_that_was_tampered_with_is_not_confirmed(
    run: Run, served: tuple[Path, list[str]], key: Path
) -> None:
    root, urls = served
    one = ("deploy", "m:1", "-r", root, "--to", urls[0])
    all_of_them = ("deploy", "m:1", "-r", root, "--to", urls[0], "--to", urls[1])
    policy = ("--signed-by", key.with_suffix(".pub"))
    assert run(*all_of_them, *policy)[0] == 0
    code, document = run(*one, *policy)
    assert (code, document["rollout"]["changed"]) == (0, False)
    assert [check["name"] for check in document["rollout"]["servers"][0]["checks"]] == ["files", "config", "signature"]
    manifest = root / "m" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("fp32", "fp16"))
    (root / "m" / "1" / "added.txt").write_text("not what was signed")
    for command, servers in ((one, urls[:1]), (all_of_them, urls)):
        code, document = run(*command, *policy)
        error = document["error"]
        assert (code, error["exit_code"]) == (3, 3)
        assert (
            f"m:1 was not confirmed, and nothing was changed: {', '.join(servers)} still serves it" in error["message"]
        )
        assert "files: m:1 is damaged" in error["message"]
        assert "signature: the signature of m:1 does not hold" in error["message"]
        assert f"repo-manager rollback -r {root} m" in error["hint"]
        assert run(*command, *policy, "--dry-run")[0] == 3
        assert run(*command)[0] == 0  # without the policy, served versions need no signature
    status = run("status", "-r", root, "--to", urls[0], "--to", urls[1])[1]
    assert [model["ready"] for model in status["models"]] == [[1], [1]]


def test_signatures_in_object_storage_are_checked(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    with moto_server() as (_, port):
        root = parse_location(f"s3://http://127.0.0.1:{port}/{BUCKET}/signed")
        assert isinstance(root, ObjectRepository)
        publish(root, "m", tiny_files(tmp_path / "source"), tiny_config("m"), {"precision": "fp32"})

        def signature() -> tuple[CheckOutcome, str]:
            checks = check_version(root, find_model(root, "m"), 1, signed_by=[key.with_suffix(".pub")])
            return next((each.outcome, each.detail) for each in checks if each.name == "signature")

        assert signature() == (CheckOutcome.REFUSED, "m:1 is not signed")
        sign_version(root, "m", 1, key)
        assert signature() == (CheckOutcome.PASSED, "key.pub vouches for it")
