"""The load test over TLS, through shared memory, merged, interrupted, and with a dying server."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.certificates import make_certificates
from support.serving import running_server

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.loadtest.compare import ComparePlan, compare
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.transport import ClientOptions

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl"),
]

MODEL = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "x").as_numpy()
            if x.min() < 0.25 or x.max() > 0.75:
                answers.append(pb.InferenceResponse(error=pb.TritonError("wrong input")))
                continue
            answers.append(pb.InferenceResponse([pb.Tensor("y", x.mean(axis=(1, 2, 3), dtype=np.float32))]))
        return answers
"""
CONFIG = """
backend: "python"
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [3, 64, 64] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }]
instance_group [{ kind: KIND_CPU count: 1 }]
"""
TOKEN = "a-token-that-nobody-may-see"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that accepts pictures of one kind only, so an answer proves an unchanged request."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "gray" / "1").mkdir(parents=True)
    (repository / "gray" / "1" / "model.py").write_text(MODEL)
    (repository / "gray" / "config.pbtxt").write_text(CONFIG)
    return repository


@pytest.fixture(scope="module")
def target(repository: Path, certificates: Path) -> Iterator[EmbeddedServer]:
    """gRPC with mutual TLS and a restricted API; HTTP is plain."""
    arguments = (
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
        "--grpc-restricted-protocol=inference:key=secret",
    )
    options = ServerOptions(repository=str(repository), load=("gray",), extra_args=arguments, auto_complete=False)
    with running_server(options) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.new("RGB", (80, 70), (110 + 10 * number,) * 3).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def options(target: EmbeddedServer, certificates: Path, pictures: Path) -> Callable[..., LoadTestOptions]:
    access = ClientOptions(
        headers={"key": "secret"},
        token=TOKEN,
        root_certificates=certificates / "ca.pem",
        client_certificate=certificates / "client.pem",
        client_key=certificates / "client.key",
        server_name="triton.test",
    )

    def make(protocol: str, **changes: object) -> LoadTestOptions:
        url = target.grpc_url.replace("grpc://", "grpcs://") if protocol == "grpc" else target.http_url
        values = {"concurrency": (3,), "duration_s": 0.5, "warmup_s": 0.1, "data": pictures, **changes}
        return LoadTestOptions(url, "gray", metrics_url=target.metrics_url, access=access, **values)

    return make


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("shared_memory", ["none", "system"])
def test_pictures_arrive_over_tls_and_through_shared_memory(options, protocol, shared_memory):
    report = run_load_test(options(protocol, shared_memory=shared_memory, batch_size=2))
    (point,) = report.points
    assert point.errors == 0, point.error_messages
    assert point.requests > 20
    assert point.measured_from == pytest.approx(time.time(), abs=60)
    assert ownerless_regions() == []


def test_without_certificate_or_key_the_server_is_not_loaded(options):
    full = options("grpc")
    bare = dataclasses.replace(full.access, client_certificate=None, client_key=None)
    with pytest.raises(ServerUnreachableError):
        run_load_test(dataclasses.replace(full, access=bare))
    (point,) = run_load_test(dataclasses.replace(full, access=dataclasses.replace(full.access, headers={}))).points
    assert point.outcome == "failed"
    assert "restricted" in point.reason


def test_a_comparison_over_tls_with_shared_memory(options):
    side = options("grpc", shared_memory="system", duration_s=None, concurrency=(1,))
    plan = ComparePlan(pairs=6, block_s=0.1, settle_s=0.02)
    assert {number.name for number in compare(side, side, plan=plan).numbers} >= {"throughput", "p50 latency"}


def test_what_a_killed_load_test_left_is_gone_after_the_next_one(options, target, pictures):
    script = f"""
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
run_load_test(
    LoadTestOptions({target.http_url!r}, "gray", concurrency=(1,), duration_s=60.0, shared_memory="system",
                    data=__import__("pathlib").Path({str(pictures)!r})),
    progress=lambda event: print("running", flush=True),
)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    process.kill()
    process.wait()
    process.stdout.close()
    left = ownerless_regions()
    run_load_test(options("http", shared_memory="system", duration_s=2.0))
    assert not any(path.exists() for path in left)
    regions = target_regions(options("http"))
    assert regions == ()


def ownerless_regions() -> list[Path]:
    """Return the regions not locked by a living load test, as other tests run at the same time."""
    found = []
    for path in Path("/dev/shm").glob("repo-manager-load-*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            found.append(path)
    return found


def target_regions(options: LoadTestOptions) -> tuple[str, ...]:
    from repo_manager.loadtest.served_model import connect

    with connect(options) as served:
        return served.registered_memory()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "repo_manager", *map(str, arguments)]


def test_two_generators_merge_and_a_gate_judges_the_whole(target, pictures, tmp_path):
    start = time.time() + 8.0
    common = ("--input-data", pictures, "-c", "1,2", "--duration", "1", "--warmup", "0.2", "--start-at", start)
    runs = [
        subprocess.Popen(
            command(
                "loadtest", "gray", "--url", target.http_url, *common, "--seed", n, "--report", tmp_path / f"{n}.json"
            ),
            stdout=subprocess.DEVNULL,
        )
        for n in range(2)
    ]
    assert [run.wait(60) for run in runs] == [0, 0]
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    merged = tmp_path / "merged.json"
    merging = command("loadtest", "merge", *files, "-o", merged, "--report", tmp_path / "m.html", "--json", "-q")
    done = subprocess.run([*merging, "--slo", "p99<10s"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(merged.read_text())
    assert document["points"][0]["level"] == 2
    single = [json.loads(file.read_text())["points"][1] for file in files]
    assert document["points"][1]["requests"] == sum(point["requests"] for point in single)
    assert json.loads(done.stdout)["verdict"]["outcome"] == "pass"
    failing = subprocess.run([*merging, "--slo", "p99<1us"], capture_output=True, text=True, check=False)
    assert failing.returncode == 4
    wrong = subprocess.run(
        command("loadtest", "merge", files[0], files[0]), capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 3
    assert "first one again" in wrong.stderr


def test_ctrl_c_shows_what_was_measured(target, pictures, tmp_path):
    report = tmp_path / "r.json"
    how = ("--input-data", pictures, "-c", "1,2,4", "--duration", "1.5", "--warmup", "0.1", "--report", report)
    process = subprocess.Popen(
        command("loadtest", "gray", "--url", target.http_url, *how),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert "concurrency 1: " in process.stderr.readline()
    time.sleep(1.0)  # into the second level
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "concurrency 2" in out
    assert "interrupted" in out
    points = json.loads(report.read_text())["points"]
    assert [point["level"] for point in points] == [1, 2]
    assert points[1]["requests"] > 10
    assert points[1]["reason"].startswith("interrupted")


def test_a_server_that_dies_gives_failed_rows_and_exit_code_5(repository, start_server, pictures, tmp_path):
    server = start_server(ServerOptions(repository=str(repository), load=("gray",), auto_complete=False))
    report = tmp_path / "r.json"
    how = ("--input-data", pictures, "-c", "1,2", "--duration", "1.5", "--warmup", "0.1", "--report", report)
    process = subprocess.Popen(
        command("loadtest", "gray", "--url", server.grpc_url, *how),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "concurrency 1: " in process.stderr.readline()
    os.kill(server.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "1 of 2 load levels failed: concurrency 2" in err
    assert [point["outcome"] for point in json.loads(report.read_text())["points"]][1] == "failed"
    assert "failed" in out


def test_a_model_that_is_not_ready_is_said_so(options):
    missing = dataclasses.replace(options("http"), model="none", data=None)
    with pytest.raises(ServerRefusedError, match="none"):
        run_load_test(missing)


def test_a_region_of_a_remote_server_is_refused_with_the_reason(options, monkeypatch, tmp_path):
    from repo_manager.loadtest.inputs import shared_memory

    elsewhere = tmp_path / "shm"
    elsewhere.mkdir()
    monkeypatch.setattr(shared_memory, "_FOLDER", elsewhere)  # the server looks into /dev/shm and finds nothing
    with pytest.raises(ServerRefusedError, match="shared memory") as caught:
        run_load_test(options("http", shared_memory="system"))
    assert "--ipc=host" in caught.value.hint
    assert list(elsewhere.iterdir()) == []
    assert np.isfinite(run_load_test(options("http")).points[0].throughput_per_s)


def test_a_search_for_saturation_and_the_regression_gate_from_the_shell(target, pictures, tmp_path):
    base, better = tmp_path / "base.json", tmp_path / "better.json"
    common = command("loadtest", "gray", "--url", target.http_url, "--input-data", pictures, "--warmup", "0.1")
    searched = subprocess.run(
        [*common, "--until", "saturation", "--duration", "0.4", "--report", str(base), "--json", "-q"],
        capture_output=True,
        text=True,
        check=True,
    )
    points = json.loads(searched.stdout)["points"]
    assert [point["level"] for point in points] == [float(2**place) for place in range(len(points))]
    assert points[-1]["throughput_per_s"] < 1.05 * points[-2]["throughput_per_s"]
    document = json.loads(base.read_text())
    for point in document["points"]:
        point["throughput_per_s"] *= 1000  # more than any change of the load on this machine
        point["intervals"]["throughput_per_s"] = None
    better.write_text(json.dumps(document))
    again = [*common, "-c", "1,2", "--duration", "0.5", "-q", "--tolerance"]
    outcomes = [
        subprocess.run([*again, tolerance, "--baseline", str(file)], capture_output=True, text=True, check=False)
        for tolerance, file in (("1000000", base), ("5", better))
    ]
    assert [ended.returncode for ended in outcomes] == [0, 4], [ended.stdout for ended in outcomes]
    assert "throughput against the baseline, at most 5% worse" in outcomes[1].stdout
    # One document, the failed gate in it, and the gate in the report for the job's summary.
    summary = tmp_path / "summary.xml"
    both = [*again, "5", "--baseline", str(better), "--slo", "errors<50%", "--report", str(summary), "--json"]
    failed = subprocess.run(both, capture_output=True, text=True, check=False)
    assert failed.returncode == 4
    verdict = json.loads(failed.stdout)["verdict"]
    assert verdict["outcome"] == "fail"
    assert {result["gate"].split()[0] for result in verdict["results"]} == {"errors<50%", "throughput", "p50", "p99"}
    assert "throughput against the baseline" in summary.read_text()


def test_a_search_for_the_largest_load_has_an_exit_code_for_each_answer(target, pictures, tmp_path):
    common = command("loadtest", "gray", "--url", target.http_url, "--input-data", pictures, "--warmup", "0.1")
    short = [*common, "--duration", "0.6", "--window", "0.2", "-q", "--until"]
    junit = tmp_path / "search.xml"
    outcomes = [
        subprocess.run([*short, *words], capture_output=True, text=True, check=False)
        for words in (["p99<30s", "-c", "1,2"], ["p99<1ns", "--report", str(junit)], ["errors<0.0000001%", "-c", "1,2"])
    ]
    assert [ended.returncode for ended in outcomes] == [0, 4, 6], [ended.stdout + ended.stderr for ended in outcomes]
    assert "concurrency 2 holds, the largest load to be tried" in " ".join(outcomes[0].stdout.split())
    assert "no load holds: concurrency 1 already fails" in junit.read_text()
    refused = subprocess.run([*short, "p99<1s", "--baseline", "x.json"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
