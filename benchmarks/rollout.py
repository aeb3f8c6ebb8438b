"""Measure deploys and roll-backs under load, what a switch costs, and what deploying the deployed costs.

    python benchmarks/rollout.py [--switches 50] [--share 0.8] [--rounds 15] [--json FILE]

1. Capacity: the rate that this script's own client reaches in a closed loop with 8 requests in flight (a faster client
   would give a rate that this one cannot send). Then requests are sent at `--share` of it, open loop, and each latency
   counts from the moment at which the request was due. `--switches` deploys and roll-backs
   follow each other; p99 of the requests that were due during a switch is held against the p99 of those due in the
   pauses between them. Bar: no request fails.
2. Cost of a switch without load: a deploy against a bare load of the same model with the same change of its policy,
   in turn, round by round. Bar: the difference of the medians is at most 200 ms.
3. Deploying what is deployed: in this process, and as a command. Bar: under 1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from repo_manager import samples
from repo_manager.repository import set_served_versions
from repo_manager.rollout import deploy, rollback
from repo_manager.server import EmbeddedServer, ServerOptions, TritonClient

NAME, PROBE = "digits", "probe"
COST_BAR_S, AGAIN_BAR_S = 0.2, 1.0


class OpenLoop:
    """Sends one request every `1 / rate` seconds, whatever the answers do."""

    def __init__(self, url: str, rate_per_s: float) -> None:
        self.samples: list[tuple[float, float]] = []  # due, latency; in seconds
        self.errors: list[str] = []
        self.sent = 0
        self._rate = rate_per_s
        self._client = triton.InferenceServerClient(url.removeprefix("grpc://"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._input = sample_input()

    def __enter__(self) -> OpenLoop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + 10.0
        while len(self.samples) + len(self.errors) < self.sent and time.monotonic() < deadline:
            time.sleep(0.01)
        self.errors += ["no answer"] * (self.sent - len(self.samples) - len(self.errors))
        self._client.close()

    def _run(self) -> None:
        began = time.perf_counter()
        number = 0
        while not self._stop.is_set():
            due = began + number / self._rate
            pause = due - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            self._client.async_infer(NAME, [self._input], callback=self._answered(due), client_timeout=30.0)
            number += 1
            self.sent = number

    def _answered(self, due: float) -> Any:
        def take(result: object, error: object) -> None:
            if error is None:
                self.samples.append((due, time.perf_counter() - due))
            else:
                self.errors.append(str(error))

        return take


def closed_loop_rate(url: str, *, in_flight: int, seconds: float) -> float:
    """Return the rate of answers when a new request follows each answer."""
    free = threading.Semaphore(in_flight)
    answered: list[float] = []

    def take(_result: object, error: object) -> None:
        if error is None:
            answered.append(time.perf_counter())
        free.release()

    client = triton.InferenceServerClient(url.removeprefix("grpc://"))
    image = sample_input()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        free.acquire()
        client.async_infer(NAME, [image], callback=take, client_timeout=30.0)
    for _ in range(in_flight):
        free.acquire()
    client.close()
    return len(answered) / seconds


def sample_input() -> triton.InferInput:
    """Return one request's input."""
    image = np.zeros((1, 1, 8, 8), np.float32)
    made = triton.InferInput("image", list(image.shape), "FP32")
    made.set_data_from_numpy(image)
    return made


def p99_ms(latencies: list[float]) -> float:
    """Return the 99th percentile in milliseconds."""
    return float(np.percentile(latencies, 99)) * 1e3 if latencies else float("nan")


def under_load(root: Path, server: EmbeddedServer, switches: int, share: float) -> dict[str, Any]:
    """Switch back and forth while requests come; return what they saw."""
    capacity = closed_loop_rate(server.grpc_url, in_flight=8, seconds=5.0)
    print(f"capacity {capacity:,.0f} inferences/s; sending at {share * capacity:,.0f}")
    intervals, seconds = [], []
    with TritonClient.connect(server.grpc_url) as client, OpenLoop(server.grpc_url, share * capacity) as load:
        time.sleep(3.0)
        for number in range(switches):
            began = time.perf_counter()
            done = deploy(root, NAME, 2, client) if number % 2 == 0 else rollback(root, NAME, client)
            intervals.append((began, time.perf_counter()))
            seconds.append(done.seconds)
            time.sleep(0.5)
    during = [latency for due, latency in load.samples if any(begin <= due <= end for begin, end in intervals)]
    steady = [latency for due, latency in load.samples if not any(b - 0.05 <= due <= e + 0.3 for b, e in intervals)]
    return {
        "capacity_per_s": capacity,
        "requests": load.sent,
        "failed": len(load.errors),
        "errors": sorted(set(load.errors))[:5],
        "switches": switches,
        "switch_s": {"median": statistics.median(seconds), "max": max(seconds)},
        "p99_ms": {"during": p99_ms(during), "steady": p99_ms(steady)},
        "worst_ms": {"during": max(during, default=0.0) * 1e3, "steady": max(steady, default=0.0) * 1e3},
    }


def cost_of_a_switch(root: Path, client: TritonClient, rounds: int) -> dict[str, float]:
    """Compare a deploy with a bare load of a twin model after the same change of its policy."""
    deploys, loads = [], []
    for number in range(rounds):
        version = 2 - number % 2
        began = time.perf_counter()
        deploy(root, NAME, version, client)
        deploys.append(time.perf_counter() - began)
        set_served_versions(root, PROBE, [version])
        began = time.perf_counter()
        client.load(PROBE)
        loads.append(time.perf_counter() - began)
    median, bare = statistics.median(deploys), statistics.median(loads)
    return {"deploy_s": median, "load_s": bare, "added_s": median - bare, "worst_deploy_s": max(deploys)}


def deploying_again(root: Path, client: TritonClient, rounds: int) -> dict[str, float]:
    """Deploy what is deployed, from Python and from the shell."""
    version = deploy(root, NAME, 2, client).version
    inside = [deploy(root, NAME, version, client).seconds for _ in range(rounds)]
    command = [sys.executable, "-m", "repo_manager", "deploy", f"{NAME}:{version}", "-r", str(root)]
    command += ["--to", client.url, "--quiet"]
    outside = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        outside.append(time.perf_counter() - began)
    return {"python_s": statistics.median(inside), "command_s": statistics.median(outside), "worst_s": max(outside)}


def published(folder: Path) -> Path:
    """Return a repository with two versions of the sample, under two names."""
    root = folder / "models"
    for name in (NAME, PROBE):
        for precision in ("fp32", "fp16"):
            command = [sys.executable, "-m", "repo_manager", "add", str(samples.sample_model()), "-n", name]
            command += ["-r", str(root), "-p", precision, "--quiet"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return root


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        root = published(folder)
        server = stack.enter_context(EmbeddedServer(ServerOptions(str(root), auto_complete=False)))
        client = stack.enter_context(TritonClient.connect(server.grpc_url))
        deploy(root, NAME, 1, client)
        client.load(PROBE)
        cost = cost_of_a_switch(root, client, arguments.rounds)
        print(
            f"switch: deploy {cost['deploy_s']:.3f} s, bare load {cost['load_s']:.3f} s, added {cost['added_s']:.3f} s"
        )
        print(f"bar: added <= {COST_BAR_S} s: {'held' if cost['added_s'] <= COST_BAR_S else 'MISSED'}")
        again = deploying_again(root, client, arguments.rounds)
        print(f"deployed already: {again['python_s']:.3f} s in Python, {again['command_s']:.3f} s as a command")
        print(f"bar: < {AGAIN_BAR_S} s: {'held' if again['worst_s'] < AGAIN_BAR_S else 'MISSED'}")
        client.unload(PROBE)
        deploy(root, NAME, 1, client)
        load = under_load(root, server, arguments.switches, arguments.share)
        print(f"{load['switches']} switches, {load['requests']:,} requests, {load['failed']} failed {load['errors']}")
        print(f"p99: {load['p99_ms']['during']:.1f} ms during a switch, {load['p99_ms']['steady']:.1f} ms between them")
        print(f"bar: 0 failed: {'held' if load['failed'] == 0 else 'MISSED'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cost": cost, "again": again, "load": load}, indent=2) + "\n")


if __name__ == "__main__":
    main()
