"""`serve` as a user runs it: what ends by itself comes back when asked to, and says why when not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import ServerError
from repo_manager.rollout import deploy, status
from repo_manager.server import RunningServer, TritonClient, running_server
from repo_manager.server.guard import stubs_of
from repo_manager.server.process import start_ticks

pytestmark = pytest.mark.integration
X = np.ones((1, 4), np.float32)
POLICY = "version_policy { specific { versions: [1] } }\n"
Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_model(tmp_path, "m", SCALING_CONFIG + POLICY, {1: scaling_model(2.0)})
    return tmp_path


@pytest.fixture
def serve(models: Path) -> Iterator[Serve]:
    """Start `serve` with these arguments; it is ended at the test's end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "repo_manager", "serve", "-r", str(models), "--load", "m", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert until(lambda: running_server(models)) is not None
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def until(look: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """Wait until something is there, and return it; `None` when it never came."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    return None


def answers(url: str) -> bool:
    try:
        with TritonClient.connect(url) as client:
            return bool(client.infer("m", None, {"x": X}, timeout_s=2.0)["y"][0, 0] == 2.0)
    except ServerError:
        return False


def found(models: Path) -> RunningServer:
    server = running_server(models)
    assert server is not None
    return server


def test_a_killed_server_comes_back_on_its_ports_and_status_tells(serve: Serve, models: Path) -> None:
    serve("--restart", "on-failure")
    first = found(models)
    with TritonClient.connect(first.grpc_url) as client:
        deploy(models, "m", 1, client)
        (before,) = status(models, client, ("m",))
    assert (before.restarts, before.restarted) == (0, False)
    stubs = [stub.pid for stub in stubs_of(first.pid)]
    assert stubs
    os.kill(first.pid, signal.SIGKILL)
    second = until(lambda: (again := running_server(models)) is not None and again.pid != first.pid and again)
    assert second is not None
    assert (second.grpc_url, second.http_url) == (first.grpc_url, first.http_url)
    assert all(start_ticks(pid) is None for pid in stubs)
    with TritonClient.connect(second.grpc_url) as client:
        assert until(lambda: answers(second.grpc_url))
        (after,) = status(models, client, ("m",))
    assert (after.restarts, after.restarted, after.ready) == (1, True, (1,))


def test_a_killed_stub_comes_back_while_serve_runs(serve: Serve, models: Path) -> None:
    serve()
    server = found(models)
    assert answers(server.grpc_url)
    (stub,) = stubs_of(server.pid)
    os.kill(stub.pid, signal.SIGKILL)
    assert until(lambda: not answers(server.grpc_url))
    assert until(lambda: answers(server.grpc_url))
    assert found(models).pid == server.pid


def test_without_restart_a_killed_server_ends_serve_with_the_reason(serve: Serve, models: Path) -> None:
    process = serve("--restart", "no", "--json")
    os.kill(found(models).pid, signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "tritonserver ended with code -9" in errors
    assert running_server(models) is None
    assert json.loads(output[: output.index("\n}") + 2])["grpc_url"].startswith("grpc://127.0.0.1:")


def test_a_server_that_others_reach_is_warned_of(serve: Serve, models: Path) -> None:
    process = serve("--host", "0.0.0.0")
    process.terminate()
    assert "anyone can load models" in process.communicate(timeout=60)[1]
