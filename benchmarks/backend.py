"""Measure the Python-based onnxruntime backend against its floor, or against a native backend.

    python benchmarks/backend.py                       ours against a stub that computes nothing (the floor)
    python benchmarks/backend.py --against DIRECTORY   ours against another backend directory, for instance the
                                                       official image's /opt/tritonserver/backends

Both servers run the same tritonserver on the same repository (a CNN of about 1 ms on 3x224x224 and a tiny MLP). The
load goes to one and the other in turn, in an order that is reversed every round, so that what else the machine does
meets both. Two figures come out per case: the ratio of the rates of each round (median and range), and the CPU time
that the server and its stubs spend per request, which on a busy machine is the steadier one: at saturation the rate is
cores divided by CPU time per request.

Against the stub the MLP has a bar, the median of the rounds at least 0.97 of its rate; the exit code is 1 when it was
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from onnx import helper
from onnx_bench import convolutions, save

from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.server import embedded
from repo_manager.server.backend_directory import backend_directory
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

BAR = 0.97
CASES = (("cnn", 8), ("cnn", 1), ("mlp", 16), ("mlp", 1))
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NO_OP = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.y = np.zeros((1, json.loads(args["model_config"])["output"][0]["dims"][0]), np.float32)

    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", self.y)]) for _ in requests]
"""
CONFIG = """
backend: "onnxruntime"
max_batch_size: {batch}
input {{ name: "x" data_type: TYPE_FP32 dims: {dims} }}
output {{ name: "y" data_type: TYPE_FP32 dims: {classes} }}
dynamic_batching {{}}
instance_group {{ count: {instances} kind: KIND_CPU }}
"""


def write_repository(root: Path, instances: int) -> None:
    """Write the two models."""
    generator = np.random.default_rng(0)
    nodes, weights = convolutions(generator, (24, 48, 64, 64), stride=2)
    weights["head"] = generator.standard_normal((64, 10))
    save(
        root / "cnn/1/model.onnx",
        [*nodes, helper.make_node("MatMul", ["f", "head"], ["y"])],
        weights,
        [3, 224, 224],
        10,
    )
    layers = {"a": generator.standard_normal((16, 32)), "b": generator.standard_normal((32, 4))}
    steps = [("MatMul", ["x", "a"], ["h"]), ("Relu", ["h"], ["r"]), ("MatMul", ["r", "b"], ["y"])]
    save(root / "mlp/1/model.onnx", [helper.make_node(*step) for step in steps], layers, [16], 4)
    sizes = {"cnn": (8, "[3, 224, 224]", 10), "mlp": (64, "16", 4)}
    for name, (batch, dims, classes) in sizes.items():
        text = CONFIG.format(batch=batch, dims=dims, classes=classes, instances=instances)
        (root / name / "config.pbtxt").write_text(text, encoding="utf-8")


def start(repository: Path, backends: Path | None) -> EmbeddedServer:
    """Start a server, with another backend directory than ours when one is given."""
    ours = embedded.assemble
    if backends is not None:
        embedded.assemble = lambda triton: dataclasses.replace(ours(triton), path=backends)
    try:
        server = EmbeddedServer(ServerOptions(repository=str(repository), load=("cnn", "mlp"), record=False))
        server.start()
        server.wait_ready()
    finally:
        embedded.assemble = ours
    return server


def cpu_s(pid: int) -> float:
    """Return the CPU time of a server and its stubs so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(path.parent.name) == pid or int(fields[1]) == pid:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def measure(server: EmbeddedServer, model: str, concurrency: int, seconds: float) -> tuple[float, float]:
    """Return (requests per second, CPU microseconds per request)."""
    with TritonClient.connect(server.grpc_url) as client:
        before, cpu = client.statistics(model)[0].success_count, cpu_s(server.pid)
        options = LoadTestOptions(
            url=server.grpc_url, model=model, concurrency=(concurrency,), duration_s=seconds, warmup_s=0.3
        )
        point = run_load_test(options).points[0]
        answered = client.statistics(model)[0].success_count - before
        return point.throughput_per_s or 0.0, (cpu_s(server.pid) - cpu) / max(1, answered) * 1e6


def main() -> int:
    """Run the benchmark, print its table, and return how many bars were missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="a backend directory; default: ours with a stub that does nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--instances", type=int, default=1)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_repository(work / "repository", arguments.instances)
        other = arguments.against
        if other is None:
            other = work / "no-op"
            (other / "onnxruntime").mkdir(parents=True)
            (other / "python").symlink_to(backend_directory() / "python")
            (other / "onnxruntime" / "model.py").write_text(NO_OP, encoding="utf-8")
        servers, missed = [], 0
        for backends in (None, other):
            servers.append(start(work / "repository", backends))
            stack.callback(servers[-1].stop, deadline_s=2.0)
        for model, concurrency in CASES:
            rows: list[list[tuple[float, float]]] = [[], []]
            for number in range(arguments.rounds):
                for index in (0, 1) if number % 2 == 0 else (1, 0):
                    rows[index].append(measure(servers[index], model, concurrency, arguments.seconds))
            ratios = [ours[0] / theirs[0] for ours, theirs in zip(*rows, strict=True) if theirs[0]]
            cpu = [statistics.median(each[1] for each in row) for row in rows]
            rates = [statistics.median(each[0] for each in row) for row in rows]
            verdict = ""
            if model == "mlp" and arguments.against is None:
                is_met = statistics.median(ratios) >= BAR
                missed += not is_met
                verdict = f"; bar: at least {BAR}, {'met' if is_met else 'MISSED'}"
            print(
                f"{model} concurrency {concurrency:2d}: ours {rates[0]:7.0f}/s, other {rates[1]:7.0f}/s, "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
                f"CPU a request: ours {cpu[0]:5.0f} µs, other {cpu[1]:5.0f} µs{verdict}",
                flush=True,
            )
    return missed


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
