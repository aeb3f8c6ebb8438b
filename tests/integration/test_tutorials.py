"""Every command of the tutorials, run in order. Its output is the documents', numbers apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_does_what_it_shows(path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/tutorial.py"), "--check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stderr


def test_a_tutorial_that_shows_something_else_fails(tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text("```console\n$ repo-manager list -r absent || echo no\nthis it never says\n```\n")
    command = [sys.executable, str(ROOT / "tools/tutorial.py"), "--check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "this it never says" in done.stderr


def test_progress_of_a_slow_machine_is_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "slow.md"
    path.write_text("```console\n$ echo 'Pruning: 65%, about 15 s left: measuring layers'; echo done\ndone\n```\n")
    command = [sys.executable, str(ROOT / "tools/tutorial.py"), "--check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
