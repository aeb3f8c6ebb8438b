"""Priority for an open loop's worker: a send kept waiting for a CPU is late.

It takes the highest priority among ordinary processes, and no real-time class. The kernel wakes a real-time process on
the CPU where it last ran. It takes the CPU from a server's thread even if another CPU is idle. Measured with client
and server on two CPUs, 200 requests a second to a CNN of 1 ms: p99 1.2 times perf_analyzer's with the real-time class,
1.0 times without, and as few sends late.

The system must allow it (root, or CAP_SYS_NICE), and the worker must need less than half a CPU. Above it would slow a
server on the same machine, so it returns to its own priority.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType

__all__ = ["SendPriority", "fine_timers"]

_HIGHEST = -20
_MAX_SHARE = 0.5
_CHECK_NS = 50_000_000
_TIMER_SLACK = Path("/proc/self/timerslack_ns")


class SendPriority:
    """Holds the priority from entry to exit, or until the process needs too much CPU."""

    def __init__(self) -> None:
        self.is_held = False
        self._own = 0
        self._checked_ns = 0
        self._cpu_ns = 0

    def __enter__(self) -> SendPriority:
        self._own = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _HIGHEST)
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
            os.setpriority(os.PRIO_PROCESS, 0, self._own)


def fine_timers() -> None:
    """Ask the kernel for exact timers, not rounded by 50 µs (`PR_SET_TIMERSLACK` of prctl(2)), where it may."""
    with contextlib.suppress(OSError):
        _TIMER_SLACK.write_text("1", encoding="ascii")
