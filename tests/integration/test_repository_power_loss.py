"""Power cuts: every operation recorded, and replayed with what was not synced lost. No server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SCRIPTS = Path(__file__).parents[1] / "unit" / "repository"


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    memory = Path("/dev/shm")  # Durability is modelled, so the real disk's plays no part.
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for name in ("conftest", "crash_points"):
            (Path(folder) / f"tests_{name}.py").write_text((SCRIPTS / f"{name}.py").read_text())
        work = Path(folder) / "work"
        work.mkdir()
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "power_loss.py"), str(work), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
            check=False,
            timeout=280,
        )


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
