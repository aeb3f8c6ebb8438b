"""Settings of all tests: no time limit on generated examples, and a count of skipped tests by reason."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_needs_a_tool(number):
    pytest.skip("no such tool: apt-get install it\\nand more of what it printed")

@pytest.mark.skipif(True, reason="no GPU here")
def test_needs_a_gpu():
    raise AssertionError

def test_runs():
    pass
"""
WHOLE_MODULE = 'import pytest\npytest.importorskip("a_package_that_nobody_has")\n'


def test_generated_examples_have_no_deadline() -> None:
    assert hypothesis.settings().deadline is None
    assert hypothesis.HealthCheck.too_slow in hypothesis.settings().suppress_health_check


def test_skipped_tests_are_counted_by_reason(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(WHOLE_MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    start = next(index for index, line in enumerate(lines) if "5 skipped, by reason" in line)
    counted = [line.split(maxsplit=1) for line in lines[start + 1 : -1]]
    assert counted == [
        ["3", "no such tool: apt-get install it"],
        ["1", "could not import 'a_package_that_nobody_has': No module named 'a_package_that_nobody_has'"],
        ["1", "no GPU here"],
    ]
    assert re.search(r"^1 passed, 5 skipped in [\d.]+s", lines[-1].strip("= "))


def test_every_file_has_the_marker_of_what_it_needs() -> None:
    """`-m "not integration"`, `-m gpu` and `-m container` select by need; CONTRIBUTING.md has the table."""
    tests = CONFTEST.parent
    for folder, marker in (("integration", "integration"), ("gpu", "gpu")):
        for path in (tests / folder).glob("test_*.py"):
            assert re.search(rf"^pytestmark = [^=]*pytest\.mark\.{marker}\b", path.read_text(), re.MULTILINE), path.name
    for path in (tests / "integration").glob("test_*.py"):
        text = path.read_text()
        assert ("support.podman" in text) == ("pytest.mark.container" in text), path.name


def test_the_longest_tests_are_begun_first(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: x\n  timeout: y\n")
    (tmp_path / "test_order.py").write_text(
        "import pytest\n\ndef test_quick(): pass\n\n@pytest.mark.slow\ndef test_slow(): pass\n\n"
        "@pytest.mark.slow\n@pytest.mark.timeout(900)\ndef test_slowest(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert re.findall(r"::(test_\w+)", done.stdout) == ["test_slowest", "test_slow", "test_quick"]
