"""Settings and hooks for all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter

import hypothesis
import pytest

from repo_manager import errors

_SHOWN_CHARACTERS = 160

# Each process that imports NumPy starts a thread per core for OpenBLAS: a third of the CPU time of loading a small
# model, of which the tests load thousands. This one has not imported it yet, and those it starts take it along.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A busy machine is slow, so generated examples have no time limit of their own.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token used by one test is redacted in later messages of the same process, in other tests too."""
    monkeypatch.setattr(errors, "_SECRETS", set())


def pytest_configure() -> None:
    """Let Ctrl-C and a hang-up have their usual meaning in a terminal.

    A shell starts a background job with SIGINT ignored, and `nohup` with SIGHUP. The programs that the tests start and
    interrupt would inherit both.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run one worker more than there are CPUs: half of the tests' time is waiting for servers."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of several minutes: at the end they would run alone while the other workers wait."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, -_limit_of(item)))


def _limit_of(item: pytest.Item) -> float:
    """Return a slow test's own time limit: the longest tests begin first."""
    limit = item.get_closest_marker("timeout")
    is_slow = item.get_closest_marker("slow") is not None
    return float(limit.args[0]) if is_slow and limit is not None and limit.args else 0.0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by reason; CONTRIBUTING.md says what each group needs."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(_reason_of(report) for report in skipped)
    if counts:
        terminalreporter.section(f"{len(skipped)} skipped, by reason")
    for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        terminalreporter.write_line(f"{count:5}  {reason}")


def _reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of why a test, or a whole module, was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    lines = text.removeprefix("Skipped: ").strip().splitlines() or ["no reason given"]
    return lines[0][:_SHOWN_CHARACTERS]
