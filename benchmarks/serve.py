"""Measure how long the embedded server takes from its start to being ready, against the bare tritonserver binary.

    python benchmarks/serve.py [--rounds 15] [--json FILE]

Three ways to serve the sample model, one after the other in every round, in an order that rotates each round, so other
load on the machine affects all of them:

    bare    tritonserver itself, with the same backends, model and settings, ready by its own /v2/health/ready
    ours    EmbeddedServer in this process: start and wait_ready
    serve   `repo-manager serve` from the shell, until it prints where it listens

The bar is 1.5 for ours/bare; serve adds the start of a Python interpreter and its imports and is shown beside it.
A ratio is taken within each round; shown are their median, the middle half and the range. The bar is held when three
rounds of four are below it, missed when three of four are above, else the machine was too busy to tell. The ratio of
the fastest starts, which the rest of the machine disturbs least, stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from repo_manager import samples
from repo_manager.server.backend_directory import assemble
from repo_manager.server.command import ServerOptions, command_of, environment_of, free_ports
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.installation import find_triton
from repo_manager.server.process import shared_memory_prefix

BAR = 1.5
WAYS = ("bare", "ours", "serve")


def published(folder: Path) -> Path:
    """Return a repository with the sample model in it."""
    root = folder / "models"
    command = [
        sys.executable,
        "-m",
        "repo_manager",
        "add",
        str(samples.sample_model()),
        "-n",
        "digits",
        "-r",
        str(root),
    ]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return root


def bare(root: Path) -> float:
    """Start the binary as one would by hand; return seconds until it is ready with the model."""
    triton = find_triton()
    backends = assemble(triton)
    options = ServerOptions(str(root), auto_complete=False, extra_args=("--load-model=digits",))
    ports = free_ports("127.0.0.1", 3)
    command = command_of(options, (ports[0], ports[1], ports[2]), "bare", triton, backends.path, shared_memory_prefix())
    environment = environment_of({}, triton, backends)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(ports[0]):
            if process.poll() is not None:
                raise SystemExit(f"tritonserver ended with code {process.returncode}")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    """Ask whether the model is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/v2/models/digits/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def ours(root: Path) -> float:
    """Start the embedded server in this process."""
    began = time.perf_counter()
    with EmbeddedServer(ServerOptions(str(root), load=("digits",), auto_complete=False, record=False)):
        return time.perf_counter() - began


def serve(root: Path) -> float:
    """Run the command until it says where it listens."""
    command = [sys.executable, "-m", "repo_manager", "serve", "-r", str(root), "--load", "digits", "--json", "--quiet"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        took = time.perf_counter() - began
        process.terminate()
    return took


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Return the spread of the rounds' ratios, and the ratio of the fastest starts."""
    ratios = [each / beside for each, beside in zip(one, other, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median": median,
        "lower": lower,
        "upper": upper,
        "low": min(ratios),
        "high": max(ratios),
        "fastest": min(one) / min(other),
    }


def verdict(found: dict[str, float]) -> str:
    """Judge the middle half of the rounds, not their outliers."""
    if found["upper"] < BAR:
        return "held"
    return "MISSED" if found["lower"] >= BAR else "inconclusive"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        root = published(Path(folder))
        ways = {"bare": bare, "ours": ours, "serve": serve}
        for way in WAYS:  # caches are warm for everyone
            ways[way](root)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                seconds[way].append(ways[way](root))
    for way in WAYS:
        values = seconds[way]
        print(f"{way:6} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    verdicts = {way: ratio(seconds[way], seconds["bare"]) for way in ("ours", "serve")}
    for way, found in verdicts.items():
        print(
            f"{way}/bare {found['median']:.2f}, middle half {found['lower']:.2f} to {found['upper']:.2f}, "
            f"range {found['low']:.2f} to {found['high']:.2f}; fastest {found['fastest']:.2f}; "
            f"{arguments.rounds} rounds"
        )
    print(f"bar: ours/bare < {BAR}: {verdict(verdicts['ours'])} (load of the machine {os.getloadavg()[0]:.1f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "ratios": verdicts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
