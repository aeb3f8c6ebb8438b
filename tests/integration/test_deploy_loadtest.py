"""deploy/loadtest against a real server: the Job's pods as processes, their reports merged; Locust where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.manifests import load_objects, of_kind
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LOADTEST = Path(__file__).parents[2] / "deploy" / "loadtest"
AUTO_COMPLETE = False


@pytest.fixture
def served(server: EmbeddedServer, repository: Path, client: TritonClient) -> EmbeddedServer:
    write_model(repository, "scale", SCALING_CONFIG, {1: scaling_model()})
    client.load("scale")
    return server


def container(name: str) -> dict[str, object]:
    jobs = of_kind(load_objects((LOADTEST / name).read_text(encoding="utf-8")), "Job")
    return dict(jobs[0]["spec"]["template"]["spec"]["containers"][0])


def test_the_pods_reports_are_joined(served: EmbeddedServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "repo_manager.cli"]
    pods = []
    # Both must have started by then, even on a busy machine: five times as long as one takes now.
    began = time.monotonic()
    facts = [*command, "loadtest", "scale", "--url", served.grpc_url, "-c", "1", "--duration", "0.1", "--warmup", "0"]
    subprocess.run(facts, check=True, capture_output=True, timeout=90)
    start_at = f"{time.time() + max(5.0, 5 * (time.monotonic() - began)):.0f}"
    for index in ("0", "1"):
        values = {"$(MODEL)": "scale", "$(SERVER)": served.grpc_url, "$(START_AT)": start_at, "$(INDEX)": index}
        args = [str(arg) for arg in container("job.yaml")["args"]]  # type: ignore[attr-defined]
        for key, value in values.items():
            args = [arg.replace(key, value) for arg in args]
        args = [arg.replace("/results", str(tmp_path)).replace("=60", "=2").replace("=16", "=2") for arg in args]
        pods.append(subprocess.Popen([*command, *args]))
    assert [pod.wait(timeout=300) for pod in pods] == [0, 0]
    (script,) = container("merge.yaml")["args"]  # type: ignore[misc]
    here = str(script).replace("/results", str(tmp_path)).replace("p99<50ms", "p99<30s")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", here], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("part-0", "part-1", "merged")]
    counts = [report["points"][0]["requests"] for report in reports]
    assert counts[2] == counts[0] + counts[1]
    assert (tmp_path / "merged.html").is_file()


def test_locust(served: EmbeddedServer) -> None:
    python = os.environ.get("REPO_MANAGER_LOCUST_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("locust") is None:
        pytest.skip("Locust is not installed (REPO_MANAGER_LOCUST_PYTHON names a Python that has it)")
    options = ["--headless", "-u", "2", "-r", "2", "-t", "5s", "--only-summary", "--json"]
    command = [python, "-m", "locust", "-f", str(LOADTEST / "locustfile.py"), "--host", served.http_url, *options]
    done = subprocess.run(
        command, env={**os.environ, "MODEL": "scale"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["infer scale"]["num_requests"] > 50
    assert rows["infer scale"]["num_failures"] == 0
