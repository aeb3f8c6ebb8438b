from __future__ import annotations

import json
from typing import Any

from support.repository_suites.operations import OPERATIONS
from support.repository_suites.run import run_suite


def run(suite: str, *arguments: object) -> Any:
    done = run_suite(suite, *arguments, timeout_s=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_calls_spread_over_every_operation() -> None:
    """Every call, and every request to an object store, is in tests/integration/test_repository_crash.py."""
    points = run("crash_points", "disk", "WORK", 41)
    assert points.keys() == OPERATIONS.keys()
    assert all(count >= 1 for count in points.values()), points


def test_writers_at_once_lose_and_double_no_version() -> None:
    result = run("many_writers", "disk", "WORK", 8, 5)
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > 10] == list(range(11, 41))
    assert 1 in result["left"]  # Served, so never cleaned up.
