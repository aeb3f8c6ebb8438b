"""Measure the time of commands with little to do, against `repo-manager --help` and the bare tritonserver.

    python benchmarks/start.py [--rounds 9] [--json FILE]

The package's bytecode is kept for the time of the run, as an installed package has it. Every round runs `--help` and
each command once, in a new random order, so other load on the machine affects all of them. The repository holds the
sample model, served by a running `serve`. Shown are medians and their ratio to that of `--help`, and the ratio of the
fastest runs, which the rest of the machine disturbs least.

    list, show, config, verify, status, inspect    at most 2 times `--help`
    deploy of what is deployed                     at most 2.5 times `--help`
    serve until it is ready                        at most 2 times the bare tritonserver
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import serve as serving

from repo_manager import samples

COMMANDS: dict[str, tuple[list[str], float]] = {
    "list": (["list"], 2.0),
    "show": (["show", "digits"], 2.0),
    "config": (["config", "digits"], 2.0),
    "verify": (["verify"], 2.0),
    "status": (["status"], 2.0),
    "inspect": (["inspect", str(samples.sample_model())], 2.0),
    "deploy": (["deploy", "digits"], 2.5),
}
SERVE_BAR = 2.0
PROGRAM = [str(Path(sys.executable).with_name("repo-manager"))]


def run(arguments: list[str], environment: dict[str, str]) -> float:
    """Run a command; return its seconds."""
    began = time.perf_counter()
    ended = subprocess.run([*PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {ended.returncode}:\n{ended.stderr}")
    return seconds


def measure(ways: dict[str, list[str]], rounds: int, environment: dict[str, str]) -> dict[str, list[float]]:
    """Return the seconds of each way, after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, draw = list(ways), random.Random(0)
    for round_ in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            took = run(ways[name], environment)
            if round_:
                seconds[name].append(took)
    return seconds


def row(name: str, seconds: list[float], base: list[float], bar: float) -> dict[str, object]:
    """Return a line of the table, and print it."""
    median, least = statistics.median(seconds), min(seconds)
    ratio, fastest = median / statistics.median(base), least / min(base)
    held = "held" if ratio <= bar else "MISSED"
    print(
        f"{name:9} {median * 1e3:6.0f} ms  {least * 1e3:5.0f} to {max(seconds) * 1e3:5.0f}   "
        f"{ratio:5.2f} (fastest {fastest:.2f})   bar {bar:g} {held}"
    )
    return {
        "name": name,
        "seconds": seconds,
        "ratio": ratio,
        "fastest_ratio": fastest,
        "bar": bar,
        "held": held == "held",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "XDG_CONFIG_HOME": folder}
        environment["PYTHONPYCACHEPREFIX"] = f"{folder}/bytecode"
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.update(environment)
        root = serving.published(Path(folder))
        environment["REPO_MANAGER_REPOSITORY"] = str(root)
        run(["serve", "--detach", "--quiet"], environment)
        try:
            run(["deploy", "digits", "--quiet"], environment)
            ways = {"--help": ["--help"], **{name: arguments for name, (arguments, _) in COMMANDS.items()}}
            seconds = measure(ways, chosen.rounds, environment)
        finally:
            run(["serve", "--stop", "--quiet"], environment)
        help_ = seconds.pop("--help")
        print(f"--help    {statistics.median(help_) * 1e3:6.0f} ms  {min(help_) * 1e3:5.0f} to {max(help_) * 1e3:5.0f}")
        rows = [row(name, seconds[name], help_, COMMANDS[name][1]) for name in COMMANDS]
        starts: dict[str, list[float]] = {"bare": [], "serve": []}
        for round_ in range(chosen.rounds):
            for name in ("bare", "serve") if round_ % 2 else ("serve", "bare"):
                starts[name].append(serving.bare(root) if name == "bare" else serving.serve(root))
        print(f"bare      {statistics.median(starts['bare']) * 1e3:6.0f} ms")
        rows.append(row("serve", starts["serve"], starts["bare"], SERVE_BAR))
        if chosen.json is not None:
            chosen.json.write_text(json.dumps({"help": help_, "bare": starts["bare"], "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
