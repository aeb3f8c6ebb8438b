"""The tools of the load test's benchmark: the server and its models, our client and the others, verdicts."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import statistics
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from onnx_bench import convolutions, save

from repo_manager.loadtest.inputs.samples import make_samples
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadPoint
from repo_manager.loadtest.run import run_load_test
from repo_manager.loadtest.served_model import connect
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.installation import find_triton

SECONDS = 2.0
RATE: dict[str, Any] = {"concurrency": (), "rate": (200.0,)}
MODEL = """
import time
import triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        time.sleep({sleep} * len(requests))
        inputs = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb.InferenceResponse([pb.Tensor("y", x[..., :16])]) for x in inputs]
"""
CONFIG = """
backend: "python"
max_batch_size: 0
input [{{ name: "x" data_type: TYPE_FP32 dims: [{size}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [16] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
response_cache {{ enable: {cache} }}
"""
MODELS = {
    "tiny": (16, 0.0, "true"),
    "large": (150_528, 0.0, "true"),
    "millisecond": (16, 0.001, "false"),
}
CNN_CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [3, 32, 32] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [32] }]
instance_group [{ kind: KIND_CPU count: 1 }]
"""


@dataclasses.dataclass(frozen=True)
class Costed:
    """One run: requests a second, and the CPU microseconds of a request (the client's; client and server together)."""

    rate: float
    client_us: float
    total_us: float


@dataclasses.dataclass
class Bench:
    """The server, how many rounds, and where the rows go."""

    server: EmbeddedServer
    rounds: int
    runs: int
    folder: Path
    table: Table

    def options(self, protocol: str, model: str, **changes: object) -> LoadTestOptions:
        """Return options for one of the benchmark's models."""
        url = self.server.grpc_url if protocol == "grpc" else self.server.http_url
        values = {"concurrency": (16,), "duration_s": SECONDS, "warmup_s": 0.5, "distinct": 1, **changes}
        return LoadTestOptions(url, model, metrics_url=self.server.metrics_url, **values)

    def point(self, protocol: str, model: str, **changes: object) -> LoadPoint:
        """Measure with our client."""
        (point,) = run_load_test(self.options(protocol, model, **changes)).points
        if point.outcome == "failed":
            raise SystemExit(f"{model}: {point.reason}")
        return point

    def perf(self, protocol: str, model: str, **changes: object) -> LoadPoint:
        """Measure with perf_analyzer."""
        for _ in range(3):  # perf_analyzer gives no numbers when it calls itself unstable
            (point,) = run_load_test(
                self.options(
                    protocol,
                    model,
                    **{"client": "perf_analyzer", "duration_s": None, "window_s": 1.0, "stability": 0.5, **changes},
                )
            ).points
            if point.throughput_per_s:
                return point
        raise SystemExit(f"perf_analyzer: {point.reason}")

    def h2load(self, model: str) -> float:
        """Return requests a second by h2load, with our own request's bytes."""
        options = self.options("grpc", model)
        with connect(options) as served_model:
            facts = served_model.facts()
        endpoint = build_endpoint(facts, make_samples(facts, options), options)
        message = endpoint.messages[0]
        body = self.folder / "h2.bin"
        body.write_bytes(struct.pack(">BI", 0, len(message)) + message)
        # A number, not a time: tritonserver 2.51 was seen to die after calls were cut off.
        command = ["h2load", f"-n{round(SECONDS * 25_000)}", "-c1", "-m16", "-t1", "-d", str(body)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        text = run([*command, f"http://{endpoint.authority}{endpoint.path}"])
        return float(re.search(r"([\d.]+) req/s", text).group(1))

    def wrk(self, model: str) -> float:
        """Return requests a second by wrk, with our own request's bytes."""
        options = self.options("http", model)
        with connect(options) as served_model:
            facts = served_model.facts()
        endpoint = build_endpoint(facts, make_samples(facts, options), options)
        escaped = "".join(f"\\{byte:03d}" for byte in endpoint.messages[0])
        script = self.folder / "wrk.lua"
        script.write_text(
            f'wrk.method="POST"\nwrk.body="{escaped}"\nwrk.headers["Content-Type"]="application/octet-stream"\n'
            f'wrk.headers["Inference-Header-Content-Length"]="{endpoint.json_bytes[0]}"\n'
        )
        text = run(
            [
                "wrk",
                "-t1",
                "-c16",
                f"-d{round(SECONDS)}",
                "-s",
                str(script),
                f"http://{endpoint.authority}{endpoint.path}",
            ]
        )
        if "Non-2xx" in text:
            raise SystemExit(text)
        return float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))


@contextmanager
def serving(folder: Path) -> Iterator[EmbeddedServer]:
    """Serve the benchmark's models, with a response cache."""
    for name, (size, sleep, cache) in MODELS.items():
        write_model(folder / "repository", name, size=size, sleep=sleep, cache=cache)
    write_cnn(folder / "repository")
    extra = (f"--cache-directory={find_triton().caches}", "--cache-config=local,size=268435456")
    options = ServerOptions(repository=str(folder / "repository"), load=(*MODELS, "cnn"), extra_args=extra)
    with EmbeddedServer(options) as server:
        yield server


def write_model(repository: Path, name: str, *, size: int, sleep: float, cache: str) -> None:
    """Write a model with `sleep` seconds for each request."""
    (repository / name / "1").mkdir(parents=True, exist_ok=True)
    (repository / name / "1" / "model.py").write_text(MODEL.format(sleep=sleep))
    (repository / name / "config.pbtxt").write_text(CONFIG.format(size=size, cache=cache))


def write_cnn(repository: Path) -> None:
    """Write three convolutions of 32 channels on 32 x 32 pixels: about 1 ms a request on one CPU of 2023."""
    nodes, weights = convolutions(np.random.default_rng(0), (32, 32, 32), stride=1)
    nodes.append(helper.make_node("Identity", ["f"], ["y"]))
    save(repository / "cnn" / "1" / "model.onnx", nodes, weights, [3, 32, 32], 32)
    (repository / "cnn" / "config.pbtxt").write_text(CNN_CONFIG)


def load_slower(bench: Bench) -> float:
    """Load a copy of the 1 ms model with a 10 % longer service time. Return the longer sleep in seconds.

    The service time is measured (throughput at concurrency 2, where requests queue for the one instance): 10 % of the
    sleep alone would be less than 10 % of a client's view.
    """
    size, sleep, cache = MODELS["millisecond"]
    rates = [bench.point("grpc", "millisecond", concurrency=(2,)).throughput_per_s for _ in range(3)]
    longer = sleep + 0.1 / statistics.median(rates)
    write_model(bench.folder / "repository", "slower", size=size, sleep=longer, cache=cache)
    with TritonClient.connect(bench.server.grpc_url) as client:
        client.load("slower")
    return longer


def run(command: list[str]) -> str:
    """Run a tool. Return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its living children (the server's stubs)."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(folder.name) == pid or int(fields[1]) == pid:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def costed(bench: Bench, client: Callable[[], object]) -> Costed:
    """Run a client once. A request's CPU time is the server's and the client's together."""
    served_model = connect(bench.options("grpc", "tiny"))
    before = served_model.statistics().requests
    server, children = cpu_seconds(bench.server.pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = client()
    requests = served_model.statistics().requests - before
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    client_us = own / requests * 1e6
    if isinstance(result, LoadPoint) and result.client.cpu_us_per_request is not None:
        client_us = result.client.cpu_us_per_request  # without the worker's start, since no request waits for it
    rate = result.throughput_per_s if isinstance(result, LoadPoint) else float(result)
    return Costed(rate, client_us, client_us + (cpu_seconds(bench.server.pid) - server) / requests * 1e6)


@dataclasses.dataclass(frozen=True)
class Bar:
    """The range of a passing median, both ends included."""

    low: float = float("-inf")
    high: float = float("inf")

    def __str__(self) -> str:
        if self.low == float("-inf"):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == float("inf") else f"{self.low:g} to {self.high:g}"


class Table:
    """Prints rows as they come, and counts the missed bars."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        print("| what | median | range | bar | verdict |\n| --- | --- | --- | --- | --- |", flush=True)

    def row(self, title: str, values: list[float], bar: Bar | None = None, unit: str = "") -> None:
        """Print a median and the range, and hold the median against the bar."""
        median = statistics.median(values)
        verdict = "" if bar is None else "met" if bar.low <= median <= bar.high else "**missed**"
        if verdict == "**missed**":
            self.missed.append(title)
        spread = f"{min(values):.3g} to {max(values):.3g}, {len(values)} rounds"
        print(f"| {title} | {median:.3g}{unit} | {spread} | {bar or ''} | {verdict} |", flush=True)

    def counted(self, title: str, right: int, runs: int, bar: float) -> None:
        """Print a share of runs, and hold it against the bar."""
        verdict = "met" if right >= bar * runs else "**missed**"
        if verdict == "**missed**":
            self.missed.append(title)
        print(f"| {title} | {right} of {runs} | | at least {bar:.0%} | {verdict} |", flush=True)
