"""Measure deploys and roll-backs under load, the cost of a switch, and of deploying a deployed version again.

    python benchmarks/rollout.py [--switches 50] [--share 0.8] [--rounds 15] [--clients 1]
                                [--json FILE]

1. Cost of a switch without load: a deploy against a bare load of a twin model with the same change of its policy,
   in turn, round by round. Bar: the rounds' differences are at most 200 ms.
2. Deploying a deployed version again: in this process, and as a command. The command's CPU time is shown too, as a busy
   machine disturbs it less. Bar: under 1 s.
3. Under load: capacity is the highest rate at which the client (benchmarks/open_loop.py: processes of their own, open
   loop, latency counted from when a request was due) sees a p99 of at most 20 ms; it is lowered where the pauses
   between two switches do not hold that, too (a switch takes CPU from the same cores). Then `--switches` deploys and
   roll-backs follow each other at `--share` of it. The p99 of requests due during a switch, and in the second after it,
   stand beside the steady state. Bar: no request fails.

A bar over rounds is held when three rounds of four hold it, missed when three of four miss it, else the machine was
too busy to tell.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from open_loop import OpenLoop

from repo_manager import samples
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.tags import model_states
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

NAME, PROBE = "digits", "probe"
COST_BAR_S, AGAIN_BAR_S = 0.2, 1.0
SUSTAINED_P99_MS = 20.0
PROBE_S, PAUSE_S, SETTLE_S = 2.5, 2.0, 1.0


def sustains(url: str, rate_per_s: float, clients: int) -> bool:
    """Say whether this rate is answered without a queue: every request, 99 of 100 within the limit."""
    with OpenLoop(url, NAME, rate_per_s, clients=clients) as load:
        time.sleep(PROBE_S)
    settled = load.seen.due_s > load.seen.due_s.max(initial=0.0) - PROBE_S * 2 / 3
    return not load.seen.errors and load.seen.p99_ms(settled) <= SUSTAINED_P99_MS


def capacity_of(url: str, clients: int) -> float:
    """Return the highest sustained rate: doubled until one fails, then halved in between, to 5 %."""
    low, high = 0.0, 50.0
    while sustains(url, high, clients):
        low, high = high, 2 * high
    while high - low > 0.05 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if sustains(url, middle, clients) else (low, middle)
    if not low:
        raise SystemExit("the machine is too busy to sustain anything: try again")
    return low


def under_load(root: Path, url: str, switches: int, rate_per_s: float, clients: int) -> dict[str, Any]:
    """Switch back and forth under load. Return the clients' answers."""
    intervals, seconds = [], []
    with TritonClient.connect(url) as client, OpenLoop(url, NAME, rate_per_s, clients=clients) as load:
        time.sleep(PAUSE_S)
        for _ in range(switches):
            began = time.monotonic()
            served = deployed_version(root)
            done = deploy(root, NAME, 2, client) if served == 1 else rollback(root, NAME, client)
            intervals.append((began, time.monotonic()))
            seconds.append(done.seconds)
            time.sleep(PAUSE_S)
    seen = load.seen
    during, settling = np.zeros(seen.due_s.shape, bool), np.zeros(seen.due_s.shape, bool)
    for begin, end in intervals:
        during |= (seen.due_s >= begin) & (seen.due_s <= end)
        settling |= (seen.due_s > end) & (seen.due_s < end + SETTLE_S)
    phases = {"steady": ~during & ~settling, "during": during, "settling": settling}
    return {
        "rate_per_s": rate_per_s,
        "requests": seen.sent,
        "failed": len(seen.errors),
        "errors": sorted(set(seen.errors))[:5],
        "switches": switches,
        "switch_s": {"median": statistics.median(seconds), "max": max(seconds)},
        "p99_ms": {name: seen.p99_ms(chosen) for name, chosen in phases.items()},
        "p50_ms": {name: float(np.median(seen.latency_s[chosen])) * 1e3 for name, chosen in phases.items()},
        "worst_ms": {name: seen.worst_ms(chosen) for name, chosen in phases.items()},
    }


def deployed_version(root: Path) -> int:
    """Return the version deployed last."""
    return model_states(root)[NAME].deployments[-1].version


def sustainable_load(root: Path, url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Find the capacity, and lower it until the steady state between switches holds the limit, too; then measure."""
    capacity = found = capacity_of(url, arguments.clients)
    for _ in range(8):
        trial = under_load(root, url, 2, arguments.share * capacity, arguments.clients)
        if not trial["errors"] and trial["p99_ms"]["steady"] <= SUSTAINED_P99_MS:
            break
        capacity *= 0.85
    rate = arguments.share * capacity
    print(f"capacity {found:,.0f} requests/s, {capacity:,.0f} with switches; sending {rate:,.0f}", flush=True)
    load = under_load(root, url, arguments.switches, rate, arguments.clients)
    return {"capacity_per_s": found, "capacity_with_switches_per_s": capacity, **load}


def cost_of_a_switch(root: Path, client: TritonClient, rounds: int) -> dict[str, Any]:
    """Compare a deploy with a bare load of a twin model after the same change of its policy, in turn."""
    deploys, loads = [], []
    for number in range(rounds):
        version = 2 - number % 2

        def switch(version: int = version) -> None:
            began = time.perf_counter()
            deploy(root, NAME, version, client)
            deploys.append(time.perf_counter() - began)

        def load(version: int = version) -> None:
            set_served_versions(root, PROBE, [version])
            began = time.perf_counter()
            client.load(PROBE)
            loads.append(time.perf_counter() - began)

        for step in (switch, load) if number % 4 < 2 else (load, switch):
            step()
    added = [one - other for one, other in zip(deploys, loads, strict=True)]
    return {
        "deploy_s": statistics.median(deploys),
        "load_s": statistics.median(loads),
        "added_s": added,
    }


def deploying_again(root: Path, client: TritonClient, rounds: int) -> dict[str, Any]:
    """Deploy a deployed version again, from Python and from the shell."""
    version = deploy(root, NAME, 2, client).version
    inside = [deploy(root, NAME, version, client).seconds for _ in range(rounds)]
    command = [sys.executable, "-m", "repo_manager", "deploy", f"{NAME}:{version}", "-r", str(root)]
    command += ["--to", client.url, "--quiet"]
    outside, cpu = [], []
    for _ in range(rounds):
        used, began = cpu_of_children(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        outside.append(time.perf_counter() - began)
        cpu.append(cpu_of_children() - used)
    return {"python_s": inside, "command_s": outside, "command_cpu_s": cpu}


def cpu_of_children() -> float:
    """Return the CPU seconds of the ended commands."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    parser.add_argument("--clients", type=int, default=1, help="processes that send together")
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
            f"switch: deploy {cost['deploy_s']:.3f} s, bare load {cost['load_s']:.3f} s, "
            f"added {spread(cost['added_s'])}"
        )
        print(f"bar: added <= {COST_BAR_S} s: {verdict(cost['added_s'], COST_BAR_S)}", flush=True)
        again = deploying_again(root, client, arguments.rounds)
        print(
            f"deployed already: {spread(again['python_s'])} in Python, as a command {spread(again['command_s'])}, "
            f"of which CPU {spread(again['command_cpu_s'])}"
        )
        print(f"bar: < {AGAIN_BAR_S} s: {verdict(again['command_s'], AGAIN_BAR_S)}", flush=True)
        client.unload(PROBE)
        deploy(root, NAME, 1, client)
        load = sustainable_load(root, server.grpc_url, arguments)
        print(f"{load['switches']} switches, {load['requests']:,} requests, {load['failed']} failed {load['errors']}")
        for phase in ("steady", "during", "settling"):
            print(
                f"{phase:9} p50 {load['p50_ms'][phase]:.1f} ms, p99 {load['p99_ms'][phase]:.1f} ms, "
                f"worst {load['worst_ms'][phase]:.1f} ms"
            )
        print(f"bar: 0 failed: {'held' if load['failed'] == 0 else 'MISSED'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cost": cost, "again": again, "load": load}, indent=2) + "\n")


def spread(seconds: list[float]) -> str:
    """Return the median with the range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def verdict(seconds: list[float], bar_s: float) -> str:
    """Judge the middle half of the rounds, not their outliers."""
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    said = "held" if upper <= bar_s else "MISSED" if lower > bar_s else "inconclusive"
    return f"{said} (load of the machine {os.getloadavg()[0]:.1f})"


if __name__ == "__main__":
    main()
