"""A killed roll-out: its remains are named, are not taken for proven, and the next command ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.repository.location import parse_location
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.records import running_server

pytestmark = [pytest.mark.integration, pytest.mark.slow]
POLICY = "version_policy { specific { versions: [1] } }\n"
KILLED = """
import os, signal, sys
from pathlib import Path
from repo_manager.rollout.deploy import deploy
def report(event):
    if sys.argv[3] in event:
        os.kill(os.getpid(), signal.SIGKILL)
deploy(Path(sys.argv[1]), "m", 2, sys.argv[2], report=report)
"""
MOMENTS = {
    "before the load": "serving versions 1, 2",
    "after the proof": "answers",
    "at the last load": "serving version 2",
}


@pytest.fixture(params=MOMENTS)
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A repository whose deploy of m:2, after m:1, was killed, and its server's URL."""
    root = tmp_path / "models"
    root.mkdir()
    versions = {1: scaling_model(2.0), 2: scaling_model(3.0)}
    write_model(root, "m", SCALING_CONFIG + POLICY, versions)
    try:
        url = serve(root, "--load", "none")
        deploy(root, "m", 1, url)
        command = [sys.executable, "-c", KILLED, str(root), url, MOMENTS[request.param]]
        assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
        yield root, url
    finally:
        stop(root)


def serve(root: Path, *options: str) -> str:
    """Start a server in the background as a user does; return its URL."""
    command = [sys.executable, "-m", "repo_manager", "serve", "--detach", "-r", str(root), "--no-auto-complete"]
    subprocess.run([*command, *options], check=True, timeout=120, capture_output=True)
    running = running_server(parse_location(str(root)))
    assert running is not None
    return running.grpc_url


def stop(root: Path) -> None:
    command = [sys.executable, "-m", "repo_manager", "serve", "--stop", "-r", str(root)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def answer(url: str) -> float:
    with TritonClient.connect(url) as client:
        return float(client.infer("m", None, {"x": np.ones((1, 4), np.float32)})["y"][0, 0])


def test_status_names_it_and_deploy_finishes_it(killed: tuple[Path, str]) -> None:
    root, url = killed
    (model,) = status(root, url).models
    assert model.deployed == 1
    assert any("version 2 is on trial since" in each for each in model.differences)
    done = deploy(root, "m", 2, url)
    assert done.servers[0].ready == (2,)
    assert done.servers[0].proof == "inference"
    assert answer(url) == 3.0
    (model,) = status(root, url).models
    assert (model.deployed, model.differences) == (2, ())
    assert model_state(root, "m").unproven is None


@pytest.mark.parametrize("killed", ["after the proof"], indirect=True)
def test_rollback_undoes_it(killed: tuple[Path, str]) -> None:
    root, url = killed
    done = rollback(root, "m", url)
    assert (done.version, done.servers[0].ready) == (1, (1,))
    assert answer(url) == 2.0
    (model,) = status(root, url).models
    assert (model.deployed, model.differences) == (1, ())
    assert model_state(root, "m").unproven is None


@pytest.mark.parametrize("killed", ["at the last load"], indirect=True)
def test_a_server_that_starts_serves_what_was_proven(killed: tuple[Path, str]) -> None:
    root, _ = killed
    stop(root)
    url = serve(root)
    with TritonClient.connect(url) as client:
        assert {version: entry.state for version, entry in client.versions("m").items()} == {1: "READY"}
    assert find_model(root, "m").selected == (1,)
    assert answer(url) == 2.0
    deploy(root, "m", 2, url)
    assert answer(url) == 3.0
