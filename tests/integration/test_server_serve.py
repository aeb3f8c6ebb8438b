"""`serve` as a user runs it: an ended server is restarted on request, else the reason is shown."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import ServerError
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.guard import stubs_of
from repo_manager.server.process import start_ticks
from repo_manager.server.records import RunningServer, running_server, running_servers

pytestmark = [pytest.mark.integration, pytest.mark.slow]
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
        (before,) = status(models, client, ("m",)).models
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
        (after,) = status(models, client, ("m",)).models
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
    process = serve("--host", "0.0.0.0", "--open-control")
    process.terminate()
    assert "anyone can load models" in process.communicate(timeout=60)[1]
    process = serve("--host", "0.0.0.0")
    process.terminate()
    assert "travels in the clear" in process.communicate(timeout=60)[1]


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repo_manager", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("how", [("--detach",), ()], ids=["detached", "foreground"])
def test_a_second_serve_of_a_repository_is_refused_and_names_the_first(
    how: tuple[str, ...], serve: Serve, models: Path
) -> None:
    serve()
    first = found(models)
    second = shell("serve", "-r", models, "--http-port", "0", *how)
    assert (second.returncode, second.stdout) == (5, "")
    assert f"is already served: by pid {first.pid}, {first.control_url}" in second.stderr
    assert [server.pid for server in running_servers() if server.repository == models.resolve()] == [first.pid]


def test_a_server_in_the_background_has_every_option(models: Path) -> None:
    config = SCALING_CONFIG + POLICY + "response_cache { enable: true }\n"
    write_model(models, "m", config, {1: scaling_model(2.0)})
    options = ("--cache-bytes", str(1 << 20), "--rate-limiter", "--verbosity", "1", "--load", "m")
    done = shell("serve", "-r", models, "--detach", "--json", *options)
    try:
        assert done.returncode == 0, done.stderr
        server = found(models)
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text(encoding="utf-8").split("\0")
        assert {"--cache-config=local,size=1048576", "--rate-limit=execution_count", "--log-verbose=1"} <= set(
            arguments
        )
        assert answers(server.http_url)
        assert answers(server.http_url)
        with urllib.request.urlopen(server.metrics_url, timeout=5) as page:
            assert 'nv_cache_num_hits_per_model{model="m",version="1"} 1' in page.read().decode()
    finally:
        shell("serve", "--stop", "-r", models)


def test_a_stuck_server_is_killed_within_the_time_and_does_not_come_back(models: Path, serve: Serve) -> None:
    process = serve("--restart", "on-failure")
    server = found(models)
    os.kill(server.pid, signal.SIGSTOP)  # it ignores SIGTERM from now on
    started = time.monotonic()
    done = shell("serve", "--stop", "-r", models, "--timeout", "4")
    assert done.returncode == 0, done.stderr
    assert "was killed" in done.stderr
    assert f"Stopped the server of {models} (pid {server.pid})" in done.stdout
    assert time.monotonic() - started < 30
    assert process.wait(30) == 130
    assert running_server(models) is None


def test_an_address_of_another_machine_is_named(models: Path) -> None:
    for how in ((), ("--detach",)):
        done = shell("serve", "-r", models, "--host", "999.1.1.1", *how)
        assert done.returncode == 5
        assert "Error: The server cannot listen on 999.1.1.1" in done.stderr
        assert done.stderr.count("Error:") == 1
    assert running_server(models) is None


def test_commands_that_need_a_server_at_once_start_one(models: Path) -> None:
    names = [f"m{index}" for index in range(4)]
    for name in names:
        write_model(models, name, SCALING_CONFIG + POLICY, {1: scaling_model(2.0)})
    try:
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            done = list(pool.map(lambda name: shell("deploy", name, "-r", models, "--json"), names))
        assert [each.returncode for each in done] == [0] * len(names), [each.stderr for each in done]
        assert len([server for server in running_servers() if server.repository == models.resolve()]) == 1
        assert sum("started one" in each.stderr for each in done) == 1
    finally:
        shell("serve", "--stop", "-r", models)


def test_a_broken_deployed_model_does_not_keep_the_others_from_being_served(models: Path) -> None:
    write_model(models, "other", SCALING_CONFIG.replace('"m"', '"other"') + POLICY, {1: scaling_model(2.0)})
    try:
        for name in ("m", "other"):
            assert shell("deploy", name, "-r", models).returncode == 0
        assert shell("serve", "--stop", "-r", models).returncode == 0
        (models / "m" / "1" / "model.onnx").write_bytes(b"no model")
        started = shell("serve", "-r", models, "--detach", "--json")
        assert started.returncode == 0, started.stderr
        reason = json.loads(started.stdout)["failures"]["m"]
        assert "INVALID_PROTOBUF" in reason
        assert "At:" not in reason
        assert "m did not load: " in started.stderr
        assert set(json.loads(started.stdout)["failures"]) == {"m"}
        with TritonClient.connect(found(models).grpc_url) as client:
            assert client.infer("other", None, {"x": X}, timeout_s=10.0)["y"][0, 0] == 2.0
    finally:
        shell("serve", "--stop", "-r", models)
