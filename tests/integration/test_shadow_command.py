"""`deploy --shadow` and `--canary` from the shell on a real tritonserver: exit codes, and the versions served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.client import VersionedClient
from repo_manager.rollout.observe import observe
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
POLICY = "version_policy { specific { versions: [1] } }\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(repository: Path, server: EmbeddedServer, tmp_path: Path) -> Run:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "repo_manager",
            "deploy",
            *arguments,
            "-r",
            repository,
            "--to",
            server.grpc_url,
        ]
        return subprocess.run(
            [str(each) for each in command],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
        )

    return run


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((20, 1, 4)).astype(np.float32))
    return path


def test_a_trial_from_the_shell(
    repository: Path, client: TritonClient, run: Run, requests: Path, tmp_path: Path
) -> None:
    """Fail (4), undecided (6), pass (0): one model, one after the other."""
    versions = {1: scaling_model(2.0), 2: scaling_model(2.0), 3: scaling_model(3.0)}
    write_model(repository, "m", SCALING_CONFIG + POLICY, versions)
    client.load("m")
    shadow = ["--shadow", requests, "--shadow-rate", "300"]
    report = tmp_path / "report.json"
    failed = run("m:3", *shadow, "--gate", "drift<1e-2", "--shadow-report", report)
    assert (failed.returncode, observe(client, "m").ready) == (4, (1,)), failed.stderr
    assert "the gate drift<1e-2 failed" in failed.stderr
    assert "Shadow of m: version 3 against 1" in failed.stderr
    assert json.loads(report.read_text())["outcome"] == "fail"
    undecided = run("m:2", *shadow, "--shadow-duration", "300ms", "--gate", "errors<0.1%", "--json")
    assert (undecided.returncode, observe(client, "m").ready) == (6, (1,))
    assert json.loads(undecided.stdout)["error"]["type"] == "InconclusiveError"
    assert "requests in all would decide" in undecided.stderr
    passed = run("m:2", *shadow, "--gate", "errors<5%, agreement>90%", "--json")
    assert (passed.returncode, observe(client, "m").ready) == (0, (2,)), passed.stderr
    document = json.loads(passed.stdout)
    assert document["rollout"]["trial"]["shadow"]["outcome"] == "pass"
    assert document["rollout"]["servers"][0]["ready"] == [2]
    again = run("m:2", *shadow)
    assert again.returncode == 6
    assert "m:2 is served already" in again.stderr
    assert observe(client, "m").ready == (2,)


def test_ctrl_c_in_a_canary_step(
    repository: Path, client: TritonClient, server: EmbeddedServer, tmp_path: Path
) -> None:
    write_model(repository, "n", SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(2.0)})
    client.load("n")
    before = (repository / "n" / "config.pbtxt").read_bytes()
    command = [sys.executable, "-m", "repo_manager", "deploy", "n:2", "-r", str(repository), "--to", server.grpc_url]
    process = subprocess.Popen(
        [*command, "--canary", "50%,100%", "--step", "5m"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        # As from a shell: a background process may have been started with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    told = ""
    with process, VersionedClient(server.grpc_url, "n", refresh_s=0.0) as versioned:
        for line in process.stderr:
            told += line
            if "50 % of the traffic" in line:
                while versioned.weights is None:
                    assert process.poll() is None
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 5, told
        assert versioned.weights is None
    assert "interrupted" in told
    assert observe(client, "n").ready == (1,)
    assert (repository / "n" / "config.pbtxt").read_bytes() == before
