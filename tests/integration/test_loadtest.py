"""The load test against a real tritonserver with tiny models of the python backend."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.serving import running_server

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.gates import Outcome
from repo_manager.loadtest.compare import ComparePlan, compare
from repo_manager.loadtest.judge import judge, parse_slo
from repo_manager.loadtest.merge import read_report
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.perf_analyzer.install import PerfAnalyzer, install_perf_analyzer
from repo_manager.loadtest.result import LoadTestReport, Progress
from repo_manager.loadtest.run import run_load_test
from repo_manager.report.load_html import load_page
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.stats.histogram import Histogram
from repo_manager.types import as_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "x").as_numpy()
            {body}
            answers.append(pb.InferenceResponse([pb.Tensor("y", x)]))
        return answers
"""
BODIES = {
    "echo": "pass",
    "slow": "time.sleep(0.02)",
    "stalls": "self.n = getattr(self, 'n', 0) + 1; time.sleep(0.5 if self.n == 100 else 0)",
    "picky": 'answers.append(pb.InferenceResponse(error=pb.TritonError("no thanks"))); continue',
}
CONFIG = """
backend: "python"
max_batch_size: 8
input [{{ name: "x" data_type: TYPE_FP32 dims: [{dims}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [-1] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
dynamic_batching {{}}
"""


def write_model(repository: Path, name: str, body: str, dims: str = "16") -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL.format(body=body))
    (repository / name / "config.pbtxt").write_text(CONFIG.format(dims=dims))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    repository = tmp_path_factory.mktemp("repository")
    for name, body in BODIES.items():
        write_model(repository, name, body)
    write_model(repository, "wide", "pass", "-1")
    options = ServerOptions(repository=str(repository), load=(*BODIES, "wide"))
    with running_server(options) as running:
        yield running


def load(target: EmbeddedServer, protocol: str, model: str, **changes) -> LoadTestReport:
    url = target.grpc_url if protocol == "grpc" else target.http_url
    values = {"warmup_s": 0.2, "window_s": 0.3, "metrics_url": f"{target.metrics_url}", **changes}
    return run_load_test(LoadTestOptions(url, model, **values))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_sweep_has_a_row_for_every_level(target, protocol):
    report = load(target, protocol, "echo", concurrency=(1, 4), duration_s=2.0)
    assert [point.level for point in report.points] == [1, 4]
    for point in report.points:
        assert point.errors == 0
        assert point.requests > 100
        latency = point.latency
        assert 0 < latency.min_ns <= latency.p50_ns <= latency.p90_ns <= latency.p99_ns <= latency.max_ns
        # Little's law: requests in flight = rate x time in the system, less the client's own turn-around.
        assert point.throughput_per_s * latency.mean_ns / 1e9 == pytest.approx(point.level, rel=0.25)
        server = point.server
        assert server.requests == pytest.approx(point.requests, rel=0.2)
        assert server.queue_ns + server.compute_infer_ns < latency.mean_ns
        assert 1 <= server.mean_batch <= 4
        assert sum(size * count for size, count in server.batches.items()) == server.inferences
        assert point.intervals.p99_ns.low <= latency.p99_ns * 1.001
        assert Histogram.from_json(dict(point.histogram)).count == point.requests
        assert any("nv_gpu_utilization" in line for line in point.gpu.missing)
    document = json.loads(json.dumps(as_json(report)))
    assert document["schema_version"] == 1
    assert document["target"]["model"] == "echo"


def test_the_largest_load_is_searched(target, tmp_path):
    """20 ms of work at a time: 400 ms are enough for a few requests in flight, never for 64."""
    gate = parse_slo("p99<400ms")
    report = load(target, "grpc", "slow", concurrency=(1, 64), until=(gate,), duration_s=1.0)
    search = report.search
    assert 1 <= search.holds < search.fails <= 64
    assert [point.level for point in report.points] == sorted({step.level for step in search.steps})
    measured = {point.level: point for point in report.points}
    for step in search.steps:
        assert step.decision in ("holds", "fails", "undecided")
        assert step.seconds <= 1.1
        if measured[step.level].duration_s == step.seconds and step.decision != "undecided":
            assert (measured[step.level].latency.p99_ns < gate.limit) is (step.decision == "holds")
    path = tmp_path / "report.json"
    path.write_text(json.dumps(as_json(report)))
    assert read_report(path).search == search
    assert search.reason in html.unescape(load_page(report))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_open_loop_holds_its_rate(target, protocol):
    (point,) = load(target, protocol, "slow", rate=(25.0,), duration_s=2.0).points
    assert point.throughput_per_s == pytest.approx(25, rel=0.1)
    assert 20e6 < point.latency.p50_ns < 60e6
    assert point.client.late_share is not None


def test_an_overloaded_open_loop_counts_from_the_schedule(target):
    """20 ms of work 100 times a second: the backlog grows by half a second a second, and so does the latency."""
    (point,) = load(target, "grpc", "slow", rate=(100.0,), duration_s=2.0, warmup_s=0.0, timeout_s=20.0).points
    assert point.latency.max_ns > 700e6
    assert "of 100 requests/s were answered" in point.reason


def test_gates_judge_a_measured_report(target):
    report = load(target, "http", "slow", concurrency=(1,), duration_s=0.9)
    assert judge(report, [parse_slo("p99<1s"), parse_slo("throughput>5")]).outcome is Outcome.PASS
    assert judge(report, [parse_slo("p50<10ms")]).outcome is Outcome.FAIL


@pytest.mark.parametrize(("protocol", "in_flight"), [("grpc", 4096), ("http", 4096), ("grpc", 16)])
def test_a_rate_above_what_the_server_holds_fails_its_latency_gates(target, protocol, in_flight):
    """The model takes 20 ms a request: it holds 50 a second."""
    report = load(target, protocol, "slow", rate=(120.0,), duration_s=3.0, max_in_flight=in_flight)
    assert report.points[0].outcome == "overloaded"
    assert "holds at most about" in report.points[0].reason
    assert judge(report, [parse_slo("p99<100ms")]).outcome is Outcome.FAIL


def test_a_stall_of_the_server_is_not_forgotten(target):
    """One request in 100/s waits 0.5 s: the ones due meanwhile wait behind it, and an open loop says so."""
    (point,) = load(target, "grpc", "stalls", rate=(100.0,), duration_s=2.0, warmup_s=0.0).points
    histogram = Histogram.from_json(dict(point.histogram))
    # At least those due in the first 0.4 s. A slow machine takes longer to catch up, so there may be more.
    assert histogram.share_above(100_000_000) * histogram.count >= 30
    assert point.latency.p99_ns > 400e6


def test_a_comparison_sees_a_difference_and_none(target):
    slow = LoadTestOptions(target.grpc_url, "slow", concurrency=(2,), metrics_url=target.metrics_url)
    echo = dataclasses.replace(slow, model="echo")
    plan = ComparePlan(pairs=8, block_s=0.3, settle_s=0.05)
    different = compare(slow, echo, plan=plan)
    assert different.is_different
    mean = next(number for number in different.numbers if number.name == "mean latency")
    assert mean.better == "B"
    assert mean.ratio < 0.5
    assert any("energy" in note for note in different.notes)
    same = compare(slow, slow, plan=plan)
    assert all(0.5 < number.ratio < 2 for number in same.numbers)
    json.dumps(as_json(same))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_errors_are_counted_with_the_servers_words(target, protocol):
    (point,) = load(target, protocol, "picky", concurrency=(2,), duration_s=2.0).points
    assert point.outcome == "failed"
    assert point.requests == 0
    assert point.errors > 10
    assert "no thanks" in point.error_messages[0].message
    assert point.server.requests > 10  # Triton counts an error answer of a backend as a success


def test_batches_count_as_inferences(target):
    (point,) = load(target, "grpc", "echo", concurrency=(2,), duration_s=2.0, batch_size=4).points
    assert point.throughput_per_s == pytest.approx(4 * point.requests / point.duration_s)
    # Triton counts a request before its inferences, and the counters are read while other requests run.
    assert point.server.inferences == pytest.approx(4 * point.server.requests, rel=0.05)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_large_inputs_pass_the_flow_control(target, protocol):
    (point,) = load(
        target, protocol, "wide", concurrency=(3,), duration_s=2.0, shapes={"x": (150_000,)}, distinct=4
    ).points
    assert point.errors == 0
    assert point.requests > 10


def test_the_windows_end_a_run_that_has_no_fixed_length(target):
    seen: list[Progress] = []
    options = LoadTestOptions(target.http_url, "slow", concurrency=(1,), warmup_s=0.2, window_s=0.5, stability=0.5)
    (point,) = run_load_test(options, progress=seen.append).points
    assert point.outcome == "stable"
    assert len(point.windows) >= 3
    assert sum(window.used for window in point.windows) == 3
    assert all(window.requests >= 20 for window in point.windows)
    assert {event.phase for event in seen} == {"warming up", "measuring", "done"}
    assert seen[-1].point == point


def test_saturation_is_found(target):
    report = load(target, "grpc", "slow", until_saturation=True, duration_s=0.6)
    assert [point.level for point in report.points][:2] == [1, 2]
    assert len(report.points) < 8


def test_what_cannot_be_tested_is_said_before_the_load(target):
    with pytest.raises(ServerRefusedError, match="unknown model"):
        load(target, "grpc", "nothing", concurrency=(1,))
    with pytest.raises(ServerRefusedError, match="nothing"):
        load(target, "http", "nothing", concurrency=(1,))
    with pytest.raises(UsageError, match="dynamic shape"):
        load(target, "grpc", "wide", concurrency=(1,))
    for url in ("grpc://127.0.0.1:9", "http://127.0.0.1:9"):
        with pytest.raises(ServerUnreachableError):
            run_load_test(LoadTestOptions(url, "echo", concurrency=(1,)))


def test_files_in_the_current_folder_do_no_harm(target, tmp_path):
    for name in ("numpy", "signal", "random", "repo_manager"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    script = f"""
import sys; sys.path.pop(0)
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
print(run_load_test(LoadTestOptions({target.grpc_url!r}, "echo", concurrency=(1,), duration_s=2.0)).points[0].errors)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_no_worker_outlives_its_parent(target):
    script = f"""
import os, threading
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
threading.Timer(1.5, os._exit, (9,)).start()
run_load_test(LoadTestOptions({target.grpc_url!r}, "echo", concurrency=(1,), duration_s=60.0, timeout_s=1.0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 9, done.stderr
    deadline = 50
    while deadline and _workers_of_dead_parents():
        deadline -= 1
        subprocess.run(["sleep", "0.1"], check=True)
    assert not _workers_of_dead_parents()


def test_ctrl_c_leaves_no_worker_and_no_noise(target):
    script = f"""
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
def tell(event):
    print("running", flush=True)
try:
    run_load_test(LoadTestOptions({target.grpc_url!r}, "slow", rate=(200.0,), duration_s=60.0), progress=tell)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.endswith("interrupted\n")
    assert err == ""
    assert not _workers_of_dead_parents()


def _workers_of_dead_parents() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if any(b"repo_manager.loadtest.worker.process" in word for word in words) and parent == 1:
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def perf_analyzer(tmp_path_factory: pytest.TempPathFactory) -> PerfAnalyzer:
    return install_perf_analyzer(Path(os.environ["XDG_CACHE_HOME"]) / "repo-manager")


def test_perf_analyzer_gives_the_same_kind_of_row(target, perf_analyzer):
    report = load(target, "grpc", "slow", concurrency=(1, 2), client="perf_analyzer", window_s=1.0, stability=0.5)
    assert [point.level for point in report.points] == [1, 2]
    for point in report.points:
        assert point.outcome == "stable", point.reason
        assert point.client.name == "perf_analyzer"
        assert 20e6 < point.latency.p50_ns < 100e6
        assert point.throughput_per_s > 10
        assert point.requests > 10
        assert point.server.compute_infer_ns > 15e6


def test_perf_analyzers_failures_are_rows(target, perf_analyzer):
    (point,) = load(target, "http", "picky", concurrency=(1,), client="perf_analyzer", window_s=0.5).points
    assert point.outcome == "failed"
    assert "no thanks" in point.reason or "exit code" in point.reason
    with pytest.raises(UsageError, match="burst"):
        load(target, "http", "slow", rate=(5.0,), arrival="burst", client="perf_analyzer")


def test_inputs_from_a_file(target, tmp_path):
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((5, 16)))
    (point,) = load(target, "grpc", "echo", concurrency=(1,), duration_s=2.0, data=tmp_path / "d.npz").points
    assert point.errors == 0


def test_a_number_of_requests_ends_a_run(target):
    (point,) = load(target, "http", "slow", concurrency=(1,), request_count=30, stability=0.9, duration_s=None).points
    assert 30 <= point.requests <= 40
    assert point.outcome == "stable"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_a_browser_shows_the_page_in_light_and_dark(target, tmp_path):
    report = load(target, "grpc", "echo", concurrency=(1, 2), duration_s=0.6)
    page = tmp_path / "report.html"
    page.write_text(load_page(report, judge(report, [parse_slo("p99<1s")])))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    shots = []
    for scheme in ("0", "1"):
        shot = tmp_path / f"{scheme}.png"
        look = [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", "--window-size=1200,1800"]
        subprocess.run([*command, *look, page.as_uri()], capture_output=True, timeout=120, check=True)
        shots.append(shot.read_bytes())
    assert min(map(len, shots)) > 30_000
    assert shots[0] != shots[1]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert dom.stdout.count("<svg") == 5
