"""`tune` on a real server: on copies only, resumable, and without a trace when it is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.json_documents import check_document
from support.serving import SCALING_CONFIG, running_server, scaling_model, write_model
from support.waiting import eventually

from repo_manager.loadtest.judge import parse_slo
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions, free_ports
from repo_manager.server.process import start_ticks
from repo_manager.tuning.measuring import HeldLoad
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.run import tuning_run
from repo_manager.tuning.scratch import CANDIDATE

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LARGEST = ("tune", "m", "--slo", "p50<2s", "--search", "preferred", "--budget", "100s", "--json")
"""For a model without an engine it measures only today's setting, with enough time on any machine."""
TUNE = (*LARGEST, "--rate", "40")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "m", SCALING_CONFIG, {1: scaling_model(2.0)})
    return tmp_path / "models"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def command(models: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "repo_manager", *arguments, "-r", str(models)]


def run(models: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(models, *arguments), env=environment, capture_output=True, text=True, check=False, timeout=240
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies(environment: dict[str, str]) -> list[Path]:
    return list((Path(environment["XDG_CACHE_HOME"]) / "repo-manager" / "tune").glob("scratch-*"))


def servers_below(folder: str) -> list[int]:
    """The tritonservers whose repository is in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "tritonserver" in arguments and folder in arguments and start_ticks(int(entry.name)) is not None:
                found.append(int(entry.name))
    return found


def is_under_way(cache: str) -> bool:
    """Whether a server of the tuning runs, and a copy has been loaded or is being so."""
    return bool(servers_below(cache) and list(Path(cache).rglob("models/candidate__*/config.pbtxt")))


def test_copies_have_what_was_fixed_beforehand(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--set` holds for today's configuration and for every other one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = TuneOptions(
        gates=(parse_slo("p50<2s"),), fixed={"dynamic_batching.default_queue_policy.max_queue_size": "77"}
    )
    with tuning_run(models, {"m": 1}, options) as run, TritonClient.connect(run.copies.url) as client:
        run.copies.load("today", {})
        assert (
            client.model_config(run.copies.named("today", "m")).dynamic_batching.default_queue_policy.max_queue_size
            == 77
        )


def test_it_measures_copies_and_goes_on_where_it_ended(models: Path, environment: dict[str, str]) -> None:
    before = tree(models)
    first = run(models, environment, *LARGEST)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    check_document("tune", result)
    assert result["today"]["value"] > 0
    assert result["outcome"] == "kept"
    assert tree(models) == before
    assert copies(environment) == []
    journal = Path(result["journal"]).read_text(encoding="utf-8").splitlines()
    second = run(models, environment, *LARGEST)
    assert second.returncode == 0, second.stderr
    again = json.loads(second.stdout)
    assert again["today"] == result["today"]  # read, not measured
    assert Path(result["journal"]).read_text(encoding="utf-8").splitlines()[: len(journal)] == journal


def test_killed_it_leaves_nothing_that_the_next_run_does_not_remove(models: Path, environment: dict[str, str]) -> None:
    running = subprocess.Popen(
        command(models, *TUNE), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    cache = environment["XDG_CACHE_HOME"]
    assert eventually(lambda: is_under_way(cache), 60.0)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert eventually(lambda: not servers_below(cache), 60.0)
    assert len(copies(environment)) == 1
    sealed = copies(environment)[0].parent / "sealed-abcd1234.work"
    sealed.mkdir()
    record = copies(environment)[0].parent / "remote-1-1.json"
    record.write_text(json.dumps({"url": f"grpc://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}", "names": ["m__tune"]}))
    refused = run(models, environment, "tune", "m", "--slo", "p50<1ns", "--search", "queue_delay", "--budget", "10s")
    assert refused.returncode in (4, 6), refused.stderr
    assert copies(environment) == []
    assert not sealed.exists()
    assert not record.exists()
    assert servers_below(cache) == []


def test_interrupted_it_removes_its_copies(models: Path, environment: dict[str, str]) -> None:
    running = subprocess.Popen(
        command(models, *TUNE), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    cache = environment["XDG_CACHE_HOME"]
    assert eventually(lambda: is_under_way(cache), 60.0)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    assert copies(environment) == []
    assert servers_below(cache) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to tune for"),
        (("--slo", "throughput>5"), "no load can be searched by the gate"),
        (("--slo", "p99<1ms", "--search", "colour"), "colour cannot be searched"),
        (("--slo", "p99<1ms", "--budget", "soon"), "--budget soon: expected a time"),
    ],
)
def test_what_cannot_be_sought_is_named(
    arguments: tuple[str, ...], says: str, models: Path, environment: dict[str, str]
) -> None:
    done = run(models, environment, "tune", "m", *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_on_a_server_elsewhere_copies_come_and_go_and_others_are_served(
    models: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    write_model(tmp_path / "other", "steady", SCALING_CONFIG.replace('"m"', '"steady"'), {1: scaling_model(3.0)})
    with running_server(ServerOptions(str(tmp_path / "other"), load=("steady",), auto_complete=False)) as server:
        header = next(iter(server.client_options.headers.items()))
        (tmp_path / "header").write_text(f"{header[0]}: {header[1]}\n", encoding="utf-8")
        to = ("--to", server.grpc_url, "--header-file", str(tmp_path / "header"))
        with TritonClient.connect(server.grpc_url) as client:

            def ready() -> list[str]:
                return [each for each in named() if client.model_ready(each)]

            def named() -> list[str]:
                records = (Path(environment["XDG_CACHE_HOME"]) / "repo-manager" / "tune").glob("remote-*.json")
                return [each for record in records for each in json.loads(record.read_text(encoding="utf-8"))["names"]]

            killed = subprocess.Popen(
                command(models, *TUNE, *to), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            assert eventually(lambda: bool(ready()), 60.0)
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            left = ready()
            assert left  # Triton keeps its counters
            done = run(models, environment, *TUNE, *to)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["today"]["value"] > 0
            assert (named(), [each for each in left if client.model_ready(each)]) == ([], [])
            x = np.ones((1, 4), np.float32)
            assert client.infer("steady", None, {"x": x})["y"][0, 0] == 3.0


def test_a_server_that_ends_under_load_starts_again_and_a_setting_that_ends_it_twice_is_out(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tuning_run(models, {"m": 1}, TuneOptions(gates=(parse_slo("p50<2s"),), rate=40.0, budget_s=100.0)) as run:
        measured, kills = run.loads.measured, [True, False, True, True]

        def measured_on_a_dying_server(copy: str, against: float | None) -> HeldLoad:
            if kills.pop(0):
                (server,) = servers_below(str(tmp_path))
                os.kill(server, signal.SIGKILL)
            return measured(copy, against)

        monkeypatch.setattr(run.loads, "measured", measured_on_a_dying_server)
        today = run.evaluate(run.subjects.today(), None, 0.0)
        assert today.value is not None
        out = run.evaluate({"m": dataclasses.replace(today.setting, instances=2)}, today, 0.04)
        assert not out.is_better
        assert out.reason == "the server ended 2 times under its load"
        run.copies.load(CANDIDATE, {})
        assert run.copies.client.model_ready(run.copies.named(CANDIDATE, "m"))
    assert servers_below(str(tmp_path)) == []
