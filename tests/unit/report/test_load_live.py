from __future__ import annotations

import io

import pytest
from rich.console import Console

from repo_manager.loadtest.compare import CompareProgress
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint, Progress
from repo_manager.report.progress import compare_progress, load_progress

POINT = LoadPoint("concurrency", 8, "unstable", "", 1, ClientUse("native"), throughput_per_s=1234.5,
                  latency=Latency(p99_ns=2_500_000))  # fmt: skip
RUNNING = Progress("concurrency 8", "measuring", 3.0, 900.0, 1_000_000, 4_000_000, 2, 2, 9.0, 0.125, 0.1)


def shown(tell, *, terminal, quiet=False, show=load_progress) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=110, color_system=None, legacy_windows=False)
    with show(console, quiet=quiet) as progress:
        tell(progress)
    return stream.getvalue()


def test_a_terminal_sees_rate_latencies_errors_stability_and_the_time_left():
    text = shown(lambda progress: progress(RUNNING), terminal=True)
    for words in ("concurrency 8", "900 inf/s", "p50 1 ms", "p99 4 ms", "2 errors", "±12.5% of ±10%", "9 s left", "█"):
        assert words in text


def test_finished_levels_stay_in_view_while_the_next_one_runs():
    def tell(progress):
        progress(Progress("concurrency 8", "done", 3.0, point=POINT))
        progress(Progress("concurrency 16", "warming up", 0.1))

    last = shown(tell, terminal=True)
    assert "unstable, 1,234.5 inf/s, p99 2.5 ms" in last
    assert "concurrency 16" in last
    assert "p99 -" in last


def test_elsewhere_there_is_one_line_a_level():
    def tell(progress):
        progress(RUNNING)
        progress(Progress("concurrency 8", "done", 3.0, point=POINT))

    assert shown(tell, terminal=False) == "concurrency 8: unstable, 1,234.5 inf/s, p99 2.5 ms\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("show", [load_progress, compare_progress])
def test_quiet_shows_nothing(terminal, show):
    assert shown(lambda progress: progress(RUNNING), terminal=terminal, quiet=True, show=show) == ""


def test_a_comparison_shows_its_pairs_and_the_time_left():
    def tell(progress):
        progress(CompareProgress("batch size 8", 3, 30, 61.0))

    text = shown(tell, terminal=True, show=compare_progress)
    assert "batch size 8" in text
    assert "3 of 30 pairs" in text
    assert "61 s left" in text
    assert shown(tell, terminal=False, show=compare_progress) == ""

    def finish(progress):
        progress(CompareProgress("batch size 8", 30, 30, 61.0))

    assert "30 pairs, 61 s left" in shown(finish, terminal=False, show=compare_progress)
