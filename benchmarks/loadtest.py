"""Our load client side by side with perf_analyzer, h2load and wrk, on one tritonserver, in interleaved rounds.

    python benchmarks/loadtest.py [PART ...] [--rounds 7] [--runs 20]

| part | what it holds against its bar | about |
| --- | --- | --- |
| throughput | requests a second and CPU a request on a tiny model; perf_analyzer, h2load, wrk | 3 min |
| large | requests a second with 602 kB inputs; perf_analyzer | 2 min |
| schedule | sends within 0.5 ms of an open loop's schedule at 2,000/s | 1 min |
| agreement | p50 and p99 at 200/s on a CNN of 1 ms; perf_analyzer | 1 min a round |
| memory | client memory for 1,000,000 requests in one run | 2 min |
| compare | A against itself, and against a model 10 % slower; `--runs` of each, 17 s a run | 12 min |

Prints the table that docs/loadtest.md quotes: medians of the rounds, their range, the bar and the verdict; the exit
code is 1 when a bar was missed. Every round runs each client once, in random order, so that what else happens on the
machine meets all of them. The tiny model answers from the server's response cache, which is the fastest answer a
tritonserver can give: the clients are what is compared. On a machine that others use as well, wall-clock rates mean
little; requests per CPU second of client and server, which is what rates become when both saturate the CPUs, are
shown beside them. h2load and wrk (Debian: nghttp2-client, wrk) are left out when they are not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loadtest_bench import RATE, Bar, Bench, Table, costed, load_slower, serving

from repo_manager.errors import RepoManagerError
from repo_manager.loadtest.compare import ComparePlan, compare
from repo_manager.loadtest.perf_analyzer.install import install_perf_analyzer


def rounds(count: int, clients: dict[str, Callable[[], object]]) -> dict[str, list[object]]:
    """Run every client once a round, in random order."""
    found: dict[str, list[object]] = {name: [] for name in clients}
    for number in range(count):
        names = list(clients)
        random.Random(number).shuffle(names)
        for name in names:
            try:
                found[name].append(clients[name]())
            except RepoManagerError as exc:  # perf_analyzer hangs now and then; a second hang is a finding
                print(f"{name}: {exc.message}; once more", file=sys.stderr)
                found[name].append(clients[name]())
    return found


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """Return ratios round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def throughput(bench: Bench) -> None:
    """Requests a second, and client CPU a request, on a tiny model."""
    for protocol, tool, bars in (("grpc", "h2load", (1.8, 1.0)), ("http", "wrk", (1.5, 1.0))):
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
            bench.table.row(f"{protocol}, tiny, c=16: {name}", [run.rate for run in runs], unit="/s")
            bar = Bar(high=20) if name == "ours" else None
            bench.table.row(f"{protocol}: {name}, client CPU a request", [run.client_us for run in runs], bar, " us")
        for name, bar in zip(("perf_analyzer", tool), bars, strict=True):
            if name in found:
                pairs = list(zip(found["ours"], found[name], strict=True))
                bench.table.row(f"{protocol}: ours / {name}", [a.rate / b.rate for a, b in pairs], Bar(bar))
                title = f"{protocol}: ours / {name}, by CPU time of client and server"
                bench.table.row(title, [b.total_us / a.total_us for a, b in pairs])
        if tool == "wrk" and tool in found:
            shares = [a.client_us / b.client_us for a, b in zip(found["ours"], found[tool], strict=True)]
            bench.table.row("http: client CPU a request, ours / wrk", shares, Bar(high=1.2))


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
        bench.table.row(f"{protocol}, 602 kB inputs, c=4: ours", found["ours"], unit="/s")
        ratios = ratio(found["ours"], found["perf_analyzer"])
        bench.table.row(f"{protocol}, 602 kB: ours / perf_analyzer", ratios, Bar(1.0))


def schedule(bench: Bench) -> None:
    """How many sends of an open loop are on time, and whether late ones are said to be."""
    for protocol in ("grpc", "http"):
        points = [bench.point(protocol, "tiny", concurrency=(), rate=(2000.0,)) for _ in range(bench.rounds)]
        on_time = [100 * (1 - point.client.late_share) for point in points]
        late = [point for point in points if point.client.late_share > 0.01]
        said = sum(point.client.bottleneck for point in late)
        bar = None if late and said == len(late) else Bar(99)
        bench.table.row(f"{protocol}, 2000/s: sends within 0.5 ms of schedule", on_time, bar, " %")
        if late:
            bench.table.counted(
                f"{protocol}, 2000/s: late runs that said so (the bar's other half)", said, len(late), 1
            )


def agreement(bench: Bench) -> None:
    """Latencies of an open loop, against perf_analyzer's.

    The difference in microseconds, on the CNN and on a model without work, separates a client's own time (equal on
    both) from a proportional error.
    """
    for protocol in ("grpc", "http"):
        for model, seconds in (("cnn", 12.0), ("tiny", 6.0)):
            found = rounds(
                bench.rounds,
                {
                    "ours": functools.partial(bench.point, protocol, model, **RATE, duration_s=seconds),
                    "perf_analyzer": functools.partial(bench.perf, protocol, model, **RATE, window_s=seconds / 3),
                },
            )
            for name, bar in (("p50_ns", Bar(0.97, 1.03)), ("p99_ns", Bar(0.9, 1.1))):
                ours, theirs = ([getattr(point.latency, name) for point in found[client]] for client in found)
                title = f"{protocol}, 200/s, {model}: {name[:3]}, ours"
                if model == "cnn":
                    bench.table.row(f"{title} / perf_analyzer", ratio(ours, theirs), bar)
                differences = [(a - b) / 1e3 for a, b in zip(ours, theirs, strict=True)]
                bench.table.row(f"{title} less perf_analyzer", differences, unit=" µs")


def memory(bench: Bench) -> None:
    """A million requests, in a process of its own; VmHWM is the peak of each process since its own start."""
    script = f"""
import json, os, pathlib
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
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
    title = f"memory for {requests} requests: parent ({own:.0f}) and worker ({worker:.0f})"
    bench.table.row(title, [own + worker], Bar(high=150), " MB")


def run_slow(command: list[str]) -> str:
    """Run a long command. Return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def comparisons(bench: Bench) -> None:
    """How often a comparison is right about no difference, and about 10 %."""
    longer = load_slower(bench)
    print(f"| (the slower model sleeps {longer * 1e3:.3f} ms) | | | | |", flush=True)
    plan = ComparePlan(pairs=20, block_s=0.3, settle_s=0.05)
    same = bench.options("grpc", "millisecond", concurrency=(2,))
    slower = dataclasses.replace(same, model="slower")
    took = []
    right = {True: 0, False: 0}
    for seed in range(bench.runs):
        for wanted, other in ((False, same), (True, slower)):
            begin = time.monotonic()
            found = compare(same, other, plan=dataclasses.replace(plan, seed=seed))
            took.append(time.monotonic() - begin)
            right[wanted] += found.is_different is wanted
    bench.table.counted("compare A A: no difference shown", right[False], bench.runs, 0.95)
    bench.table.counted("compare with a model 10 % slower: found", right[True], bench.runs, 0.9)
    bench.table.row("compare: seconds a run", took, Bar(high=120), " s")


PARTS = {
    "throughput": throughput,
    "large": large,
    "schedule": schedule,
    "agreement": agreement,
    "memory": memory,
    "compare": comparisons,
}


def main() -> int:
    """Measure the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for a verdict")
    parser.add_argument("--runs", type=int, default=20, help="comparisons of each kind")
    arguments = parser.parse_args()
    install_perf_analyzer()
    table = Table()
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary)) as server:
        for part in arguments.parts or PARTS:
            PARTS[part](Bench(server, arguments.rounds, arguments.runs, Path(temporary), table))
    print(f"\n{len(table.missed)} bars missed{': ' if table.missed else ''}{'; '.join(table.missed)}", file=sys.stderr)
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
