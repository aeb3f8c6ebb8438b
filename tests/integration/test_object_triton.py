"""The real tritonserver serves straight from object storage (moto), by the command line alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.object_stores import BUCKET, moto_server, s3_environment
from support.waiting import eventually

from repo_manager import samples
from repo_manager.server.client import TritonClient
from repo_manager.server.guard import stubs_of
from repo_manager.server.process import start_ticks

pytestmark = [pytest.mark.integration, pytest.mark.slow]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    with moto_server() as address:
        yield address


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # it has the servers' key
    environment = {**os.environ, **s3_environment()}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "repo_manager", *map(str, arguments)]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )
        text = f"{arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        assert ended.returncode == code, text
        assert s3_environment()["AWS_SECRET_ACCESS_KEY"] not in text
        return ended

    return run


def test_add_deploy_roll_back_load_test_and_clean_up(run: Run, moto: tuple[str, int], tmp_path: Path) -> None:
    root = f"s3://http://127.0.0.1:{moto[1]}/{BUCKET}/path/models"
    run("add", samples.sample_model(), "-n", "digits", "-r", root)
    # Stray objects of a bucket, and our own records in the root, must not become models.
    stray = f"http://127.0.0.1:{moto[1]}/{BUCKET}/path/models/.repo-manager.other.state"
    headers = {"content-type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(stray, data=b"{}", method="PUT", headers=headers)).close()
    try:
        first = json.loads(run("deploy", "digits", "-r", root, "--json").stdout)
        assert first["rollout"]["servers"][0]["started"]
        assert (first["rollout"]["servers"][0]["ready"], first["rollout"]["servers"][0]["smoke"]["reference"]) == (
            [1],
            "golden",
        )
        with TritonClient.connect(first["rollout"]["servers"][0]["name"]) as client:
            assert {entry.name for entry in client.repository_index()} == {"digits"}

        run("add", samples.sample_model(), "-n", "digits", "-r", root, "-p", "fp16")
        # Triton sees nothing of the new version until it is deployed.
        assert json.loads(run("status", "-r", root, "--json").stdout)["models"][0]["ready"] == [1]
        second = json.loads(run("deploy", "digits", "-r", root, "--json").stdout)
        assert (second["rollout"]["servers"][0]["ready"], second["rollout"]["servers"][0]["previous"]) == ([2], [1])
        back = json.loads(run("rollback", "digits", "-r", root, "--json").stdout)
        assert (back["rollout"]["servers"][0]["ready"], back["rollout"]["servers"][0]["previous"]) == ([1], [2])
        assert json.loads(run("status", "-r", root, "--json").stdout)["models"][0]["differences"] == []

        load = run("loadtest", "digits", "-r", root, "-c", "2", "--duration", "2", "--slo", "errors<1%", "--json")
        assert json.loads(load.stdout)["verdict"]["outcome"] == "pass"
        assert "is selected" in run("remove", "digits:1", "-r", root, code=3).stderr
        run("copy", "digits:2", "-r", root, "--into", tmp_path / "local")
        run("verify", "-r", tmp_path / "local")
        run("verify", "-r", root)
    finally:
        run("serve", "--stop", "-r", root)


def test_a_stub_that_dies_is_noticed_though_its_path_names_no_model(
    run: Run, moto: tuple[str, int], tmp_path: Path
) -> None:
    """Triton's Python backend runs copies of an object store's files, in folders with names of their own."""
    root = f"s3://http://127.0.0.1:{moto[1]}/{BUCKET}/stubs/models"
    for name in ("digits", "other"):
        run("add", samples.sample_model(), "-n", name, "-r", root)
    try:
        first = json.loads(run("deploy", "digits", "-r", root, "--json").stdout)
        run("deploy", "other", "-r", root)
        pid = next(
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if f"--model-repository={root}" in command_line(folder)
        )
        before = {stub.instance: stub.pid for stub in stubs_of(pid)}
        assert set(before) == {"digits_0_0", "other_0_0"}
        assert not {stub.model for stub in stubs_of(pid)} & {"digits", "other"}
        # The server reads the store. The code of models gets no credentials.
        secret = s3_environment()["AWS_SECRET_ACCESS_KEY"].encode()
        assert secret in Path(f"/proc/{pid}/environ").read_bytes()
        for stub in before.values():
            environment = Path(f"/proc/{stub}/environ").read_bytes()
            assert b"PATH=" in environment
            assert b"AWS_" not in environment
            assert secret not in environment
        os.kill(before["digits_0_0"], signal.SIGKILL)
        assert eventually(lambda: start_ticks(before["digits_0_0"]) is None)

        def is_back() -> bool:
            pids = {stub.instance: stub.pid for stub in stubs_of(pid)}
            return pids.get("digits_0_0", before["digits_0_0"]) != before["digits_0_0"]

        assert eventually(is_back, timeout_s=60.0)
        assert {stub.instance: stub.pid for stub in stubs_of(pid)}["other_0_0"] == before["other_0_0"]
        with TritonClient.connect(first["rollout"]["servers"][0]["name"]) as client:
            assert eventually(lambda: client.model_ready("digits", 1), timeout_s=30.0)
        load = run("loadtest", "digits", "-r", root, "-c", "1", "--duration", "2", "--json")
        assert json.loads(load.stdout)["points"][0]["errors"] == 0
    finally:
        run("serve", "--stop", "-r", root)


def command_line(folder: Path) -> list[str]:
    try:
        return (folder / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []
