"""The repository's operations killed at every file-system call, and 64 writers at once. No server, but minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

SCRIPTS = Path(__file__).parents[1] / "unit" / "repository"


def run(tmp_path: Path, script: str, *arguments: object) -> Any:
    (tmp_path / "tests_conftest.py").write_text((SCRIPTS / "conftest.py").read_text())
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), str(tmp_path / "work"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        check=False,
        timeout=390,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_every_call(tmp_path: Path) -> None:
    points = run(tmp_path, "crash_points.py", 1)
    assert sum(points.values()) >= 1000, points


def test_64_writers_of_20_versions_with_gc_and_verify(tmp_path: Path) -> None:
    result = run(tmp_path, "many_writers.py", 64, 20)
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > 1250] == list(range(1251, 1281))
