from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(script: str, *arguments: object) -> Any:
    """Run a script of this folder; it forks, so it gets a process of its own without pytest's threads."""
    here = Path(__file__).parent
    memory = Path("/dev/shm")  # Thousands of fsyncs: a disk would only make them slow.
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        (Path(folder) / "tests_conftest.py").write_text((here / "conftest.py").read_text())
        (Path(folder) / "work").mkdir()
        done = subprocess.run(
            [sys.executable, str(here / script), str(Path(folder) / "work"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
            check=False,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stderr.write(done.stderr)  # what a failing child said is shown with the failing test
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_calls_spread_over_every_operation() -> None:
    """Every call is in tests/integration/test_repository_crash.py."""
    points = run("crash_points.py", 41)
    assert len(points) == 18
    assert all(count >= 1 for count in points.values()), points


def test_writers_at_once_lose_and_double_no_version() -> None:
    result = run("many_writers.py", 8, 5)
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > 10] == list(range(11, 41))
    assert 1 in result["left"]  # Served, so never cleaned up.
