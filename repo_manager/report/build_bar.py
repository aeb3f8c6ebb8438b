"""A build's progress: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from repo_manager.report.terminal import Terminal

__all__ = ["build_bar"]

_LINE_EVERY_S = 10.0

StepReport = Callable[[str, int, int], None]
"""Told (phase, steps done, steps in all); phases nest, the first one is the whole."""


@contextlib.contextmanager
def build_bar(terminal: Terminal) -> Iterator[StepReport]:
    """Give a function that shows a build's steps for as long as the block lasts.

    It is called from the building thread. On a terminal the outermost phase is the bar, and the inner one its text.

    Args:
        terminal: its stderr is written to; nothing is when it is quiet.
    """
    if terminal.quiet:
        yield lambda _phase, _done, _steps: None
    elif terminal.is_live:
        with Progress(
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
    """One bar per phase that is under way; phases nest, so there are few at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, steps: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=max(steps, 1))
        self._progress.update(self._tasks[phase], completed=done)
        if done >= steps:
            self._progress.remove_task(self._tasks.pop(phase))


class _Lines:
    """For logs: a line now and then, so that a long build can be told from a dead one."""

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
