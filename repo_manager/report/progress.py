"""How far something is: a bar or a live view on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich import progress as rich_progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from repo_manager.report.load_tables import format_ms
from repo_manager.report.plain import plain
from repo_manager.report.tables import format_bytes
from repo_manager.report.terminal import Terminal

if TYPE_CHECKING:
    from repo_manager.loadtest.compare import CompareProgress
    from repo_manager.loadtest.result import LoadPoint, Progress
    from repo_manager.tuning.result import TuneProgress

__all__ = ["build_bar", "compare_progress", "load_progress", "share_bar", "transfer_progress", "tune_progress"]


# Build progress: a bar on a terminal, a line every few seconds elsewhere.

_LINE_EVERY_S = 10.0
_LEAST_SHARE = 0.01  # share done before the remaining time is estimated

StepReport = Callable[[str, int, int], None]
"""Told (phase, steps done, steps in all). Phases nest, the first one is the whole."""


@contextlib.contextmanager
def build_bar(terminal: Terminal) -> Iterator[StepReport]:
    """Give a function to show a build's steps as long as the block lasts.

    It is called from the building thread. On a terminal the outermost phase is the bar, and the inner one its text.

    Args:
        terminal: its stderr is written to. Nothing is when it is quiet.
    """
    if terminal.quiet:
        yield lambda _phase, _done, _steps: None
    elif terminal.is_live:
        with rich_progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=terminal.console,
            transient=True,
        ) as bar:
            yield _Bars(bar)
    else:
        yield _Lines(terminal.progress)


class _Bars:
    """One bar per phase under way. Phases nest, so there are few at a time."""

    def __init__(self, progress: rich_progress.Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, steps: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=max(steps, 1))
        self._progress.update(self._tasks[phase], completed=done)
        if done >= steps:
            self._progress.remove_task(self._tasks.pop(phase))


class _Lines:
    """For logs: a line now and then, so a long build is known from a dead one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._next = time.monotonic() + _LINE_EVERY_S

    def __call__(self, phase: str, done: int, steps: int) -> None:
        with self._lock:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _LINE_EVERY_S
        self._say(f"{phase}: {done} of {steps}")


@contextlib.contextmanager
def share_bar(terminal: Terminal, title: str) -> Iterator[Callable[[float, str], None]]:
    """Give a function of the share done, 0 to 1, and the present step. It shows the time left.

    Args:
        terminal: its stderr is written to. Nothing is when it is quiet.
        title: text before the bar. Without a terminal, each line begins with it.
    """
    if terminal.quiet:
        yield lambda _share, _now: None
    elif terminal.is_live:
        with rich_progress.Progress(
            TextColumn(title),
            BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=terminal.console,
            transient=True,
        ) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda share, now: bar.update(task, completed=share, description=plain(now))
    else:
        began = last = time.monotonic()

        def told(share: float, now: str) -> None:
            nonlocal last
            at = time.monotonic()
            if at - last >= _LINE_EVERY_S:
                last = at
                left = f", about {(at - began) * (1 / share - 1):.0f} s left" if share >= _LEAST_SHARE else ""
                terminal.progress(f"{title}: {share:.0%}{left}: {now}")

        yield told


# Transfer progress, as an occasional line.


def transfer_progress(
    report: Callable[[str], None],
    total_bytes: int,
    *,
    every_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[int], None]:
    """Return a function of the number of new bytes. It reports the sum, once `every_s` at most.

    A shorter transfer is not reported.

    Args:
        report: called with one line per step.
        total_bytes: size of the whole transfer. 0 when it is not known.
        every_s: the shortest time between two lines.
        clock: returns the time in seconds.
    """
    lock = threading.Lock()
    done, began = 0, clock()
    last = began

    def told(count: int) -> None:
        nonlocal done, last
        with lock:
            done += count
            now = clock()
            if now - last < every_s:
                return
            last = now
            rate = format_bytes(int(done / (now - began)))
            of = f" of {format_bytes(total_bytes)} ({min(1.0, done / total_bytes):.0%})" if total_bytes else ""
            report(f"Transferred {format_bytes(done)}{of}, {rate}/s")

    return told


Told = TypeVar("Told", contravariant=True)


class _View(Protocol[Told]):
    """A live view: of a load test, or of a comparison."""

    def update(self, progress: Told) -> None:
        """Take new values. The view redraws itself."""

    def __rich__(self) -> RenderableType: ...


_BARS = "▁▂▃▄▅▆▇█"
_KEPT = 60
_TUNE_LINES = 6
_OUTCOME_STYLES = {"stable": "green", "failed": "red"}


@contextlib.contextmanager
def load_progress(console: Console, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Give a function to show a load test's progress, as long as the context lasts.

    Args:
        console: console on stderr. If it is no terminal, a line is printed for each finished level.
        quiet: show nothing. The function given can still be called.
    """
    with _shown(console, _line, _LoadView(), quiet=quiet, refreshes_per_s=8) as told:
        yield told


@contextlib.contextmanager
def _shown(
    console: Console,
    line: Callable[[Console, Told], None],
    view: _View[Told],
    *,
    quiet: bool,
    refreshes_per_s: int,
) -> Iterator[Callable[[Told], None]]:
    """Give a function to show progress: as a live view in a terminal, else a line at a time. Nothing if quiet."""
    if quiet:
        yield lambda _progress: None
    elif not console.is_terminal:
        yield lambda progress: line(console, progress)
    else:
        with Live(view, console=console, refresh_per_second=refreshes_per_s, transient=True):
            yield view.update


def _line(console: Console, progress: Progress) -> None:
    """Print a line for each finished level."""
    if progress.point is not None:
        console.print(_finished(progress.point, progress.decision), highlight=False)


def _finished(point: LoadPoint, decision: str = "") -> Text:
    """Describe the end of a level, and a search's decision on it."""
    style = _OUTCOME_STYLES.get(point.outcome, "yellow")
    rest = f", {point.throughput_per_s:,.1f} inf/s, p99 {_ms(point.latency.p99_ns)}"
    if decision:
        return Text(f"{point.label}: {decision} ({point.duration_s:.1f} s{rest})")
    return Text.assemble(f"{point.label}: ", (point.outcome, style), rest)


class _LoadView:
    """Contents of the live view: finished levels, and the running one."""

    def __init__(self) -> None:
        self._done: list[Text] = []
        self._now: Progress | None = None
        self._p99: collections.deque[int] = collections.deque(maxlen=_KEPT)

    def update(self, progress: Progress) -> None:
        """Take new values. The view redraws itself."""
        if progress.point is not None:
            self._done.append(_finished(progress.point, progress.decision))
            self._now = None
            self._p99.clear()
            return
        self._now = progress
        if progress.p99_ns is not None:
            self._p99.append(progress.p99_ns)

    def __rich__(self) -> RenderableType:
        lines: list[RenderableType] = [*self._done]
        if self._now is not None:
            lines.append(_running(self._now, self._p99))
        return Group(*lines)


def _running(now: Progress, p99: collections.deque[int]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    errors = Text(f"{now.errors} errors", style="red" if now.errors else "")
    table.add_row(
        Text(f"{now.label}: {now.phase}", style="bold"),
        f"{now.throughput_per_s:,.0f} inf/s",
        f"p50 {_ms(now.p50_ns)}",
        f"p99 {_ms(now.p99_ns)}",
        errors,
    )
    more = Table.grid(padding=(0, 2))
    share = None if now.remaining_s is None else now.elapsed_s / max(now.elapsed_s + now.remaining_s, 1e-9)
    bar = ProgressBar(total=1.0, completed=share or 0.0, width=24, pulse=share is None)
    left = f"{now.elapsed_s:.0f} s" if now.remaining_s is None else f"at most {now.remaining_s:.0f} s left"
    more.add_row(bar, left, _stability(now), Text(f"p99 {_spark(p99)}", style="dim"))
    return Group(table, more)


def _stability(now: Progress) -> Text:
    """Say how far the windows are from agreeing."""
    if now.spread is None or now.allowed is None:
        return Text(f"{now.windows} window{'' if now.windows == 1 else 's'}", style="dim")
    style = "green" if now.spread <= now.allowed else "yellow"
    return Text(f"last windows ±{now.spread:.1%} of ±{now.allowed:.0%}", style=style)


def _spark(values: collections.deque[int]) -> str:
    """Return a line of bars from 0 to the largest value."""
    largest = max(values, default=0)
    return "".join(_BARS[min(int(value / largest * len(_BARS)), len(_BARS) - 1)] for value in values if largest)


def _ms(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else f"{format_ms(nanoseconds)} ms"


@contextlib.contextmanager
def compare_progress(console: Console, *, quiet: bool) -> Iterator[Callable[[CompareProgress], None]]:
    """Give a function to show a comparison's progress: a live bar, or a line for each batch size.

    Args:
        console: console on stderr. If it is no terminal, a line is printed for each finished batch size.
        quiet: show nothing. The function given can still be called.
    """
    with _shown(console, _compare_line, _CompareView(), quiet=quiet, refreshes_per_s=4) as told:
        yield told


def _compare_line(console: Console, progress: CompareProgress) -> None:
    if progress.pairs_done == progress.pairs:
        console.print(
            Text(f"{progress.label}: {progress.pairs} pairs, {progress.remaining_s:.0f} s left for the others"),
            highlight=False,
        )


class _CompareView:
    """The live view of a comparison."""

    def __init__(self) -> None:
        self._now: CompareProgress | None = None

    def update(self, progress: CompareProgress) -> None:
        """Take new values. The view redraws itself."""
        self._now = progress

    def __rich__(self) -> RenderableType:
        now = self._now
        if now is None:
            return Text("the first pair of blocks runs", style="dim")
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=now.pairs, completed=now.pairs_done, width=24)
        table.add_row(
            Text(now.label, style="bold"),
            bar,
            f"{now.pairs_done} of {now.pairs} pairs",
            f"about {now.remaining_s:.0f} s left",
        )
        return table


@contextlib.contextmanager
def tune_progress(console: Console, budget_s: float, *, quiet: bool) -> Iterator[Callable[[TuneProgress], None]]:
    """Give a function to show a tuning's progress: the latest measurement, the best so far, the budget left.

    Args:
        console: console on stderr. If it is no terminal, a line is printed for each measurement.
        budget_s: budget of the whole search in seconds.
        quiet: show nothing. The function given can still be called.
    """
    with _shown(console, _tune_line, _TuneView(budget_s), quiet=quiet, refreshes_per_s=4) as told:
        yield told


def _tune_line(console: Console, progress: TuneProgress) -> None:
    text = f"{plain(progress.text)} ({progress.remaining_s:.0f} s of the budget left)"
    console.print(Text(text), highlight=False, soft_wrap=True)


class _TuneView:
    """The live view of a tuning. Its clock runs on between two measurements."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s, self._ends = budget_s, time.monotonic() + budget_s
        self._latest: collections.deque[str] = collections.deque(maxlen=_TUNE_LINES)
        self._best = ""

    def update(self, progress: TuneProgress) -> None:
        """Take new values. The view redraws itself."""
        self._ends = time.monotonic() + progress.remaining_s
        self._latest.append(plain(progress.text))
        self._best = plain(progress.best) or self._best

    def __rich__(self) -> RenderableType:
        left_s = max(self._ends - time.monotonic(), 0.0)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=self._budget_s, completed=min(self._budget_s - left_s, self._budget_s), width=24),
            f"{left_s // 60:.0f}:{left_s % 60:02.0f} of the budget left",
        )
        lines: list[RenderableType] = [
            Text(text, style="dim", no_wrap=True, overflow="ellipsis") for text in self._latest
        ]
        if self._best:
            lines.append(Text(f"best so far: {self._best}", style="bold", no_wrap=True, overflow="ellipsis"))
        return Group(*lines, bar)
