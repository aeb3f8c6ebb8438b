"""`repo_manager.deploy` from Python equals the command: tags, settings, the repository's own server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

import repo_manager
from repo_manager.errors import RepositoryError, RolloutUndoneError
from repo_manager.repository.tags import set_tag
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import RolloutOptions
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.records import running_server

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
POLICY = "version_policy { specific { versions: [1] } }\n"


@pytest.fixture
def model(repository: Path, client: TritonClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of two versions, the first tagged `stable`."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    name = f"m{len(list(repository.glob('m*')))}"
    write_model(repository, name, SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    set_tag(repository, name, "stable", 1)
    return name


def test_a_number_a_tag_or_the_newest(
    repository: Path, server: EmbeddedServer, client: TritonClient, model: str
) -> None:
    told: list[str] = []
    assert repo_manager.deploy(repository, model, "stable", server.grpc_url, report=told.append).ready == (1,)
    assert repo_manager.deploy(repository, model, to=[server.http_url]).ready == (2,)
    assert repo_manager.deploy(repository, model, 1, client).ready == (1,)
    assert repo_manager.rollback(repository, model, server.grpc_url).version == 2
    assert observe(client, model).ready == (2,)
    assert any("answers" in event for event in told)


def test_the_server_and_the_keys_of_the_settings(
    repository: Path, server: EmbeddedServer, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPO_MANAGER_SERVER", server.grpc_url)
    done = repo_manager.deploy(repository, model, 2)
    assert (done.target, done.ready, done.servers[0].started) == (server.grpc_url, (2,), False)
    monkeypatch.setenv("REPO_MANAGER_SIGNED_BY", str(tmp_path / "key.pub"))
    with pytest.raises(RepositoryError):
        repo_manager.deploy(repository, model, 1)
    assert repo_manager.deploy(repository, model, 1, options=RolloutOptions()).ready == (1,)


def test_a_dry_run_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write_model(tmp_path, "alone", SCALING_CONFIG + POLICY, {1: scaling_model(2.0)})
    planned = repo_manager.deploy(tmp_path, "alone", options=RolloutOptions(dry_run=True))
    (server,) = planned.servers
    assert (planned.dry_run, planned.changed, server.ready) == (True, False, ())
    assert server.plan is not None
    assert [(step.version, str(step.action)) for step in server.plan.steps] == [(1, "load")]
    assert running_server(tmp_path) is None


def test_what_cannot_be_deployed_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("repo_manager.pipeline.background.ensure_server", lambda *_, **__: pytest.fail("started"))
    folder = write_model(tmp_path, "alone", SCALING_CONFIG + POLICY, {1: scaling_model(2.0)})
    with pytest.raises(RepositoryError, match="no earlier deployment"):
        repo_manager.rollback(tmp_path, "alone")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    with pytest.raises(RepositoryError, match="cannot be written"):
        repo_manager.deploy(tmp_path, "alone")


def test_a_server_that_was_started_for_what_fails_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write_model(tmp_path, "alone", SCALING_CONFIG + POLICY, {1: b"no model"})
    command = [sys.executable, "-m", "repo_manager", "deploy", "alone:1", "-r", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == RolloutUndoneError.exit_code, ended.stderr
    assert "The server started for it is stopped again." in ended.stderr
    assert running_server(tmp_path) is None
