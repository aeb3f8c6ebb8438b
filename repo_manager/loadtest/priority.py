"""Real-time priority for an open loop's worker: a send that waits for a CPU is late.

Only where the system allows it (root, or CAP_SYS_NICE), and only while the worker needs little: above half a CPU it
would take from a server on the same machine what it is there to measure, so it goes back to the ordinary scheduler.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType

__all__ = ["SendPriority", "fine_timers"]

_LOWEST_REAL_TIME = 1
_MAX_SHARE = 0.5
_CHECK_NS = 50_000_000
_TIMER_SLACK = Path("/proc/self/timerslack_ns")


class SendPriority:
    """Holds the priority from entry to exit, or until the process needs too much CPU."""

    def __init__(self) -> None:
        self.is_held = False
        self._checked_ns = 0
        self._cpu_ns = 0

    def __enter__(self) -> SendPriority:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_LOWEST_REAL_TIME))
            self.is_held = True
        self._checked_ns, self._cpu_ns = time.monotonic_ns(), time.process_time_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def check(self, now_ns: int) -> None:
        """Give the priority back when the process used more than half a CPU since the last check."""
        elapsed_ns = now_ns - self._checked_ns
        if not self.is_held or elapsed_ns < _CHECK_NS:
            return
        cpu_ns = time.process_time_ns()
        if cpu_ns - self._cpu_ns > _MAX_SHARE * elapsed_ns:
            self._give_back()
        self._checked_ns, self._cpu_ns = now_ns, cpu_ns

    def _give_back(self) -> None:
        if self.is_held:
            self.is_held = False
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def fine_timers() -> None:
    """Ask the kernel for timers that are not rounded (50 us by default), where it lets a process do so."""
    with contextlib.suppress(OSError):
        _TIMER_SLACK.write_text("1", encoding="ascii")
