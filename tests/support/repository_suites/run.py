"""Run a suite in a process of its own, on a file system in memory: thousands of fsyncs would only make it slow."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[2]


def run_suite(name: str, *arguments: object, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `support.repository_suites.NAME`; `WORK` among the arguments stands for a new folder."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        given = [str(Path(folder) / "work") if argument == "WORK" else str(argument) for argument in arguments]
        return subprocess.run(
            [sys.executable, "-m", f"support.repository_suites.{name}", *given],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            check=False,
            timeout=timeout_s,
        )
