"""Power cuts: every operation recorded, and replayed with what was not synced lost. No server."""

from __future__ import annotations

import json
import subprocess

import pytest
from support.repository_suites.run import run_suite

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_suite("power_loss", "WORK", *arguments, timeout_s=280)


def test_no_power_cut_breaks_or_loses_anything() -> None:
    done = replay()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 19
    assert sum(calls for calls, _ in found.values()) >= 700
    assert sum(trees for _, trees in found.values()) >= 900


@pytest.mark.parametrize(
    ("forgotten", "operation"),
    [("files", "add to a model"), ("folders", "add to a model"), ("files", "config set"), ("folders", "sign")],
)
def test_it_would_notice_a_missing_sync(forgotten: str, operation: str) -> None:
    done = replay("--forget", forgotten, operation)
    assert done.returncode == 1
    assert any(name in done.stderr for name in ("AssertionError", "RepositoryError", "ConfigError")), done.stderr[
        -2000:
    ]
