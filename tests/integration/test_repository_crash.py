"""The repository's operations killed at every file-system call, and 64 writers at once. No server, but minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SCRIPTS = Path(__file__).parents[1] / "unit" / "repository"


def run(script: str, *arguments: object) -> Any:
    memory = Path("/dev/shm")  # What a killed process leaves does not depend on the disk, and fsync takes its time.
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        (Path(folder) / "tests_conftest.py").write_text((SCRIPTS / "conftest.py").read_text())
        (Path(folder) / "work").mkdir()
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / script), str(Path(folder) / "work"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
            check=False,
            timeout=580,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_every_call() -> None:
    points = run("crash_points.py", 1)
    assert sum(points.values()) >= 1000, points


def test_64_writers_of_20_versions_with_gc_and_verify() -> None:
    result = run("many_writers.py", 64, 20)
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > 1250] == list(range(1251, 1281))
