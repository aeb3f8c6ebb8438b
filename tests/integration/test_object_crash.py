"""A command on object storage that is killed at any of its requests: support/object_crash_points.py does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import object_crash_points

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("operation", object_crash_points.OPERATIONS)
def test_a_death_at_any_request(operation: str, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "support.object_crash_points", operation, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": tests}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 5
