"""Our load client side by side with perf_analyzer, h2load and wrk, on one tritonserver, in interleaved rounds.

    python benchmarks/loadtest.py [throughput] [large] [schedule] [agreement] [memory] [compare] [--rounds 7]

Prints the table that docs/loadtest.md quotes: medians of the rounds' ratios, and their range. Every round runs each
client once, in random order, so that what else happens on the machine meets all of them. The tiny model answers from
the server's response cache, which is the fastest answer a tritonserver can give: the clients are what is compared.
On a machine that others use as well, wall-clock rates mean little; requests per CPU second of client and server,
which is what rates become when both saturate the CPUs, are shown beside them.
h2load and wrk (Debian: nghttp2-client, wrk) are left out when they are not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repo_manager.loadtest import (
    ComparePlan,
    LoadPoint,
    LoadTestOptions,
    compare,
    install_perf_analyzer,
    run_load_test,
)
from repo_manager.loadtest.inputs import make_samples
from repo_manager.loadtest.payload import build_endpoint
from repo_manager.loadtest.target import connect
from repo_manager.server import EmbeddedServer, ServerOptions
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
    "slower": (16, 0.0011, "false"),
}


@dataclasses.dataclass(frozen=True)
class Costed:
    """One run: requests a second, and the CPU microseconds of a request (the client's; client and server together)."""

    rate: float
    client_us: float
    total_us: float


@dataclasses.dataclass
class Bench:
    """The server, and how many rounds."""

    server: EmbeddedServer
    rounds: int
    folder: Path

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
        for _ in range(3):  # it gives no numbers when it calls itself unstable
            (point,) = run_load_test(
                self.options(
                    protocol, model, client="perf_analyzer", duration_s=None, window_s=1.0, stability=0.5, **changes
                )
            ).points
            if point.throughput_per_s:
                return point
        raise SystemExit(f"perf_analyzer: {point.reason}")

    def h2load(self, model: str) -> float:
        """Return requests a second by h2load, with our own request's bytes."""
        options = self.options("grpc", model)
        target = connect(options)
        endpoint = build_endpoint(target.facts(), make_samples(target.facts(), options), options)
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
        target = connect(options)
        endpoint = build_endpoint(target.facts(), make_samples(target.facts(), options), options)
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


def run(command: list[str]) -> str:
    """Run a tool and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def rounds(count: int, clients: dict[str, Callable[[], object]]) -> dict[str, list[object]]:
    """Run every client once a round, in random order."""
    found: dict[str, list[object]] = {name: [] for name in clients}
    for number in range(count):
        names = list(clients)
        random.Random(number).shuffle(names)
        for name in names:
            found[name].append(clients[name]())
    return found


def show(title: str, values: list[float], bar: str, unit: str = "") -> None:
    """Print one row: median and range."""
    print(
        f"| {title} | {statistics.median(values):.3g}{unit} | {min(values):.3g} to {max(values):.3g} | {bar} |",
        flush=True,
    )


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """Return ratios round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


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
    """Run a client once; a request's CPU time is that of the server and of the client together."""
    target = connect(bench.options("grpc", "tiny"))
    before = target.statistics().requests
    server, children = cpu_seconds(bench.server.pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = client()
    requests = target.statistics().requests - before
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    client_us = own / requests * 1e6
    if isinstance(result, LoadPoint) and result.client.cpu_us_per_request is not None:
        client_us = result.client.cpu_us_per_request  # without the start of the worker, which is no request's
    rate = result.throughput_per_s if isinstance(result, LoadPoint) else float(result)
    return Costed(rate, client_us, client_us + (cpu_seconds(bench.server.pid) - server) / requests * 1e6)


def throughput(bench: Bench) -> None:
    """Requests a second on a tiny model."""
    for protocol, tool, bars in (("grpc", "h2load", (1.8, 0.95)), ("http", "wrk", (1.5, 0.9))):
        clients: dict[str, Callable[[], object]] = {
            "ours": lambda protocol=protocol: bench.point(protocol, "tiny"),
            "perf_analyzer": lambda protocol=protocol: bench.perf(protocol, "tiny").throughput_per_s,
        }
        if shutil.which(tool):
            clients[tool] = lambda tool=tool: getattr(bench, tool)("tiny")
        found = rounds(
            bench.rounds, {name: functools.partial(costed, bench, client) for name, client in clients.items()}
        )
        for name, runs in found.items():
            show(f"{protocol}, tiny, c=16: {name}", [run.rate for run in runs], "", "/s")
            show(f"{protocol}: {name}, client CPU a request", [run.client_us for run in runs], "at most 20", " us")
        for name, bar in zip(("perf_analyzer", tool), bars, strict=True):
            if name in found:
                pairs = list(zip(found["ours"], found[name], strict=True))
                show(f"{protocol}: ours / {name}", [a.rate / b.rate for a, b in pairs], f"at least {bar}")
                title = f"{protocol}: ours / {name}, by CPU time of client and server"
                show(title, [b.total_us / a.total_us for a, b in pairs], f"at least {bar}")


def large(bench: Bench) -> None:
    """Requests a second with 602 kB inputs."""
    for protocol in ("grpc", "http"):
        found = rounds(
            bench.rounds,
            {
                "ours": lambda protocol=protocol: bench.point(protocol, "large", concurrency=(4,)).throughput_per_s,
                "perf_analyzer": lambda protocol=protocol: (
                    bench.perf(protocol, "large", concurrency=(4,)).throughput_per_s
                ),
            },
        )
        show(f"{protocol}, 602 kB inputs, c=4: ours", found["ours"], "", "/s")
        show(f"{protocol}, 602 kB: ours / perf_analyzer", ratio(found["ours"], found["perf_analyzer"]), "at least 1")


def schedule(bench: Bench) -> None:
    """How many sends of an open loop are on time."""
    for protocol in ("grpc", "http"):
        points = [bench.point(protocol, "tiny", concurrency=(), rate=(2000.0,)) for _ in range(bench.rounds)]
        on_time = [100 * (1 - point.client.late_share) for point in points]
        show(f"{protocol}, 2000/s: sends within 0.5 ms of schedule", on_time, "99, or said to be late", " %")
        said = sum(point.client.bottleneck for point in points if point.client.late_share > 0.01)
        print(f"|   of {sum(point.client.late_share > 0.01 for point in points)} late runs, said so | {said} | | all |")


def agreement(bench: Bench) -> None:
    """Latencies of an open loop, against perf_analyzer's."""
    for protocol in ("grpc", "http"):
        found = rounds(
            bench.rounds,
            {
                "ours": lambda protocol=protocol: bench.point(protocol, "millisecond", **RATE, duration_s=3.0),
                "perf_analyzer": lambda protocol=protocol: bench.perf(protocol, "millisecond", **RATE),
            },
        )
        for name, bar in (("p50_ns", "0.97 to 1.03"), ("p99_ns", "0.9 to 1.1")):
            values = [[getattr(point.latency, name) for point in found[client]] for client in ("ours", "perf_analyzer")]
            show(f"{protocol}, 200/s on a 1 ms model: {name[:3]}, ours / perf_analyzer", ratio(*values), bar)


def memory(bench: Bench) -> None:
    """A million requests, in a process of its own; VmHWM is the peak of each process since its own start."""
    script = f"""
import json, os, pathlib
from repo_manager.loadtest import LoadTestOptions, run_load_test
def peak_kb(pid):
    lines = pathlib.Path("/proc", str(pid), "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
worker = []
def note(event):
    children = pathlib.Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    worker[:] = [sum(map(peak_kb, children))] if children else worker
options = LoadTestOptions({bench.server.grpc_url!r}, "tiny", concurrency=(32,), request_count=1_000_000, warmup_s=0.0)
r = run_load_test(options, progress=note)
print(json.dumps([r.points[0].requests, peak_kb("self") / 1024, worker[0] / 1024]))
"""
    requests, own, worker = json.loads(run_slow([sys.executable, "-c", script]))
    row = f"{own + worker:.0f} MB ({own:.0f} + {worker:.0f})"
    print(f"| memory for {requests} requests: parent + worker | {row} | | at most 150 |", flush=True)


def run_slow(command: list[str]) -> str:
    """Run a long command and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def comparisons(bench: Bench) -> None:
    """How often a comparison is right about no difference, and about 10 %."""
    plan = ComparePlan(pairs=12, block_s=0.3, settle_s=0.05)
    same = bench.options("grpc", "millisecond", concurrency=(2,))
    slower = dataclasses.replace(same, model="slower")
    for title, other, wanted in (
        ("A against itself: no difference shown", same, False),
        ("10 % slower: found", slower, True),
    ):
        runs = max(bench.rounds, 10)
        found = [
            compare(same, other, plan=dataclasses.replace(plan, seed=seed)).is_different is wanted
            for seed in range(runs)
        ]
        print(f"| {title} | {sum(found)} of {runs} | | {'90' if wanted else '95'} of 100 |", flush=True)


PARTS = {
    "throughput": throughput,
    "large": large,
    "schedule": schedule,
    "agreement": agreement,
    "memory": memory,
    "compare": comparisons,
}


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    install_perf_analyzer()
    with tempfile.TemporaryDirectory() as temporary:
        repository = Path(temporary) / "repository"
        for name, (size, sleep, cache) in MODELS.items():
            (repository / name / "1").mkdir(parents=True)
            (repository / name / "1" / "model.py").write_text(MODEL.format(sleep=sleep))
            (repository / name / "config.pbtxt").write_text(CONFIG.format(size=size, cache=cache))
        caches = find_triton().caches
        extra = (f"--cache-directory={caches}", "--cache-config=local,size=268435456")
        options = ServerOptions(repository=str(repository), load=tuple(MODELS), extra_args=extra)
        with EmbeddedServer(options) as server:
            print("| what | median | range | bar |\n| --- | --- | --- | --- |", flush=True)
            for part in arguments.parts or PARTS:
                PARTS[part](Bench(server, arguments.rounds, Path(temporary)))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nLargest child process: {peak:.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
