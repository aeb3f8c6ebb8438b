"""The whole path from the shell, on the real tritonserver."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import onnx_models
from support.json_documents import check_document

from repo_manager import samples

pytestmark = [pytest.mark.integration, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with caches and settings of its own."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Run:
    def run(*arguments: object, code: int | None = 0, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "repo_manager", *map(str, arguments)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment, cwd=cwd, stdin=subprocess.DEVNULL
        )
        assert code is None or ended.returncode == code, (
            f"{arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        )
        return ended

    return run


@pytest.fixture
def repository(tmp_path: Path, run: Run) -> Iterator[Path]:
    """A repository with two versions of the sample. A server started by a test is stopped afterwards."""
    root = tmp_path / "repository"
    for precision in ("fp32", "fp16"):
        run("add", samples.sample_model(), "-n", "digits", "-r", root, "-p", precision)
    yield root
    run("serve", "--stop", "-r", root)


def processes_below(folder: Path) -> list[str]:
    """Command lines of every running process with a path below `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in text and "-m pytest" not in text:
                found.append(text)
    return found


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def test_deploy_starts_a_server_serves_rolls_back_and_is_load_tested(
    run: Run, repository: Path, tmp_path: Path
) -> None:
    first = run("deploy", "digits:1", "-r", repository, "--json")
    deployed = json.loads(first.stdout)
    assert deployed["rollout"]["servers"][0]["started"]
    assert "serve --stop" in first.stderr
    assert deployed["rollout"]["servers"][0]["ready"] == [1]
    assert deployed["rollout"]["servers"][0]["smoke"]["reference"] == "golden"

    second = json.loads(run("deploy", "digits", "-r", repository, "--json").stdout)
    assert not second["rollout"]["servers"][0]["started"]
    assert (second["rollout"]["version"], second["rollout"]["servers"][0]["ready"]) == (2, [2])
    again = json.loads(run("deploy", "digits:2", "-r", repository, "--json").stdout)
    assert not again["rollout"]["changed"]

    back = json.loads(run("rollback", "digits", "-r", repository, "--json").stdout)
    assert (back["rollout"]["version"], back["rollout"]["servers"][0]["ready"]) == (1, [1])

    page = tmp_path / "load.html"
    for protocol in ("grpc", "http"):
        load = run(
            *("loadtest", "digits", "-r", repository, "-c", "1,4", "--duration", "2", "--protocol", protocol),
            *("--slo", "errors<1%", "--report", page, "--json"),
        )
        report = json.loads(load.stdout)
        assert [point["level"] for point in report["points"]] == [1, 4]
        assert all(point["errors"] == 0 and point["throughput_per_s"] > 0 for point in report["points"])
        assert all(point["server"]["compute_infer_ns"] > 0 for point in report["points"])
        assert report["verdict"]["outcome"] == "pass"
        assert "<svg" in page.read_text()
    # A gate on errors: any other gate can fail because a busy machine delays the client.
    run("loadtest", "digits", "-r", repository, "--rate", "50", "--duration", "2", "--slo", "errors>50%", code=4)
    run("loadtest", "missing", "-r", repository, "-c", "1", code=5)


def test_a_corrupt_version_is_refused_and_the_old_one_serves_on(run: Run, repository: Path) -> None:
    run("deploy", "digits:1", "-r", repository)
    before = (repository / "digits" / "config.pbtxt").read_text()
    model = repository / "digits" / "2" / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:1000])
    ended = run("deploy", "digits:2", "-r", repository, code=None)
    assert ended.returncode in (3, 5)
    assert ended.stderr.count("Error:") == 1
    assert "Traceback" not in ended.stderr
    assert (repository / "digits" / "config.pbtxt").read_text() == before
    still = json.loads(run("deploy", "digits:1", "-r", repository, "--json").stdout)
    assert not still["rollout"]["changed"]
    assert still["rollout"]["servers"][0]["ready"] == [1]


def test_a_dry_run_shows_the_plan_and_changes_nothing(run: Run, repository: Path) -> None:
    run("deploy", "digits:1", "-r", repository)
    before = (repository / "digits" / "config.pbtxt").read_text()
    plan = json.loads(run("deploy", "digits:2", "-r", repository, "--dry-run", "--json").stdout)["rollout"]["servers"][
        0
    ]["plan"]
    assert {step["version"]: step["action"] for step in plan["steps"]} == {1: "drop", 2: "load"}
    assert (repository / "digits" / "config.pbtxt").read_text() == before


def test_serve_answers_on_given_ports_and_stops_on_interrupt(
    repository: Path, environment: dict[str, str], run: Run
) -> None:
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for sock in (one, two, three):
            sock.bind(("127.0.0.1", 0))
        http, grpc, metrics = (sock.getsockname()[1] for sock in (one, two, three))
    command = [sys.executable, "-m", "repo_manager", "serve", "-r", str(repository), "--load", "all", "--json"]
    command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            wait_until(lambda: b"}\n" in os.read(process.stdout.fileno(), 65536), "ready")  # type: ignore[union-attr]
            run("loadtest", "digits", "--url", f"http://127.0.0.1:{http}", "-c", "1", "--duration", "2")
            run("deploy", "digits:2", "-r", repository, "--to", f"grpc://127.0.0.1:{grpc}")
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"successfully loaded 'digits'" in errors
    assert b"Loaded at the start: digits\n" in errors
    assert processes_below(repository) == []
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", grpc))


def test_a_taken_port_is_told(run: Run, repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("serve", "-r", repository, "--http-port", port, code=5)
    assert str(port) in ended.stderr


def test_an_unreachable_server_changes_nothing(run: Run, repository: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = (repository / "digits" / "config.pbtxt").read_text()
    run("deploy", "digits:2", "-r", repository, "--to", f"grpc://127.0.0.1:{port}", "--timeout", "5", code=5)
    assert (repository / "digits" / "config.pbtxt").read_text() == before


def test_quickstart_works_twice_with_the_usual_ports_taken(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "any folder"
    folder.mkdir()
    with socket.socket() as http, socket.socket() as grpc:
        for sock, port in ((http, 8000), (grpc, 8001)):
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue  # taken already, as intended
            sock.listen()
        for version in (1, 2):
            ended = run("quickstart", "--seconds", "0.3", "--json", cwd=folder)
            document = json.loads(ended.stdout)
            check_document("quickstart", document)
            assert [model["added"]["version"] for model in document["result"]["models"]] == [version, version]
            assert all(model["accuracy"] > 0.95 for model in document["result"]["models"])
            assert "GPU" in ended.stderr
            assert "<svg" in Path(document["report"]).read_text()
            assert processes_below(folder) == []


def test_quickstart_leaves_no_process_when_interrupted(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "repo_manager", "quickstart", "--seconds", "30"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Deployed"):
                break
        assert processes_below(tmp_path), "the server runs while the load test does"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert processes_below(tmp_path) == []


def test_a_load_test_sends_numbers_that_a_language_model_takes(run: Run, tmp_path: Path) -> None:
    """Numbers from 0 to 9 are refused by a table of two rows."""
    model, root = onnx_models.save(onnx_models.bert_like(), tmp_path / "bert.onnx"), tmp_path / "repository"
    run("add", model, "-n", "bert", "-r", root)
    run("deploy", "bert", "-r", root)
    try:
        load = run(*("loadtest", "bert", "-r", root, "-c", "2", "-b", "4", "--duration", "2", "--json"))
    finally:
        run("serve", "--stop", "-r", root)
    report = json.loads(load.stdout)
    (point,) = report["points"]
    assert point["errors"] == 0
    assert point["throughput_per_s"] > 0
    (note,) = [note for note in report["notes"] if "Random integers" in note]
    for text in ("input_ids from 0 to 499", "token_type_ids from 0 to 1", "position_ids from 0 to 39"):
        assert text in note
