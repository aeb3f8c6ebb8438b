"""The declared state on real servers: added, changed and removed; and the signature policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import onnx_models
from support.serving import running_server

from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False


@pytest.fixture(scope="module")
def second(repository: Path) -> Iterator[EmbeddedServer]:
    with running_server(ServerOptions(repository=str(repository), auto_complete=False)) as running:
        yield running


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Callable[..., Any]:
    """Run a command as a user does. Return its exit code, its JSON and its messages."""
    folder = tmp_path_factory.mktemp("declared")
    onnx_models.save(onnx_models.mlp(), folder / "a.onnx")

    def run(models: dict[str, Any], *arguments: object, **environment: str) -> tuple[int, Any, str]:
        (folder / "repository.yaml").write_text(yaml.safe_dump({"models": models}))
        command = [sys.executable, "-m", "repo_manager", "apply", str(folder / "repository.yaml"), "--json"]
        done = subprocess.run(
            [*command, "--repository", str(repository), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout), done.stderr

    return run


def ready(server: EmbeddedServer, name: str) -> list[int]:
    with TritonClient.connect(server.grpc_url) as client:
        return sorted(number for number, entry in client.versions(name).items() if entry.state == "READY")


def write_keys(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_declared_model_comes_changes_and_goes(
    shell: Callable[..., Any], server: EmbeddedServer, second: EmbeddedServer, tmp_path: Path
) -> None:
    targets = [server.grpc_url, second.grpc_url]
    model = {"source": "a.onnx", "serve": "newest", "targets": targets}
    other = {"source": "a.onnx", "targets": [server.grpc_url]}
    assert shell({"m": model, "other": other})[0] == 0
    assert [ready(each, "m") for each in (server, second)] == [[1], [1]]
    assert ready(server, "other") == [1]
    code, plan, _ = shell({"m": model, "other": other}, "--check")
    assert (code, plan["changes"]) == (0, False)

    with TritonClient.connect(second.grpc_url) as client:
        client.unload("m")
    assert shell({"m": model, "other": other}, "--check")[0] == 8
    changed = {**model, "precision": "fp16", "config": {"instance_group": {"count": 2}}}
    assert shell({"m": changed, "other": other})[0] == 0
    assert [ready(each, "m") for each in (server, second)] == [[2], [2]]
    with TritonClient.connect(second.grpc_url) as client:
        assert client.model_config("m").instance_group[0].count == 2

    # The policy: a version without a trusted signature is built, and not deployed.
    private, public = write_keys(tmp_path)
    policy = {"REPO_MANAGER_SIGNED_BY": str(public)}
    unsigned = {"m": {**changed, "precision": "fp32", "convert": {"max_drift": 0.2}}}
    code, plan, _ = shell(unsigned, "--check", **policy)
    assert code == 3
    assert "the new version would not be signed" in plan["models"][0]["error"]
    assert shell(unsigned, "--check", "--sign", private, **policy)[0] == 8
    code, result, _ = shell(unsigned, **policy)
    assert code == 3
    assert "is not signed" in result["models"][0]["error"]
    assert [ready(each, "m") for each in (server, second)] == [[2], [2]]
    signed = {**changed, "precision": "fp32", "convert": {"max_drift": 0.3}}
    assert shell({"m": signed}, "--sign", private, **policy)[0] == 0
    assert [ready(each, "m") for each in (server, second)] == [[4], [4]]

    code, result, _ = shell({"m": signed}, "--prune", **policy)
    assert code == 0, result
    assert ready(server, "other") == []
    assert shell({"m": signed}, "--prune", "--check", **policy)[0] == 0


def test_a_server_that_is_gone_fails_its_model_only(shell: Callable[..., Any]) -> None:
    nowhere = {"source": "a.onnx", "targets": ["grpc://127.0.0.1:9"]}
    code, result, _ = shell({"n": nowhere, "p": {"source": "a.onnx"}}, "--timeout", "5")
    assert code == 5
    assert {model["name"]: model["exit_code"] for model in result["models"]} == {"n": 5, "p": 0}
