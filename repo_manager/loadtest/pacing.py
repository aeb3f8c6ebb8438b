"""Waits of an open loop: until an answer comes, or the next request is due, to the microsecond.

An idle CPU takes its time to wake up: 0.1 to 0.2 ms late is usual in a virtual machine, and that would be part of every
latency, which counts from the moment a request is due. So a sleep ends earlier by the median of what the last ones
were late; where that was too early, the rest passes awake. Only there, and a tenth of the time at most: a server on the
same machine needs the CPU, too, and a client that never sleeps sees better latencies than one that does.
"""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path

__all__ = ["Pacer", "fine_timers"]

_MAX_LEAD_NS = 400_000
_STEP_NS = 4_000  # up after a sleep that ended late, else down: the lead settles at the median
_AWAKE_SHARE = 0.1
_TIMER_SLACK = Path("/proc/self/timerslack_ns")


class Pacer:
    """Sleeps on an epoll that becomes ready, or until shortly before a moment.

    Args:
        epoll: what to wait for. It waits in whole milliseconds itself; `select` takes microseconds, and an epoll can
            be selected.
        longest_ns: no sleep is longer.
    """

    def __init__(self, epoll: select.epoll, longest_ns: int) -> None:
        self._watched = [epoll]
        self._longest_ns = longest_ns
        self._lead_ns = 0
        self._is_awake = False  # since the last call
        self._slept_for_ns: int | None = None  # the moment for which the last sleep ended
        self._allowance_ns = 0.0
        self._before_ns = time.monotonic_ns()

    def wait(self, until_ns: int | None) -> None:
        """Return when the epoll is ready, the longest sleep is over, or `until_ns` is so near that a sleep ends late.

        In that last case it returns at once, so that a loop around it is awake when the moment comes.
        """
        now_ns = time.monotonic_ns()
        left_ns = self._longest_ns if until_ns is None else until_ns - now_ns
        elapsed_ns, self._before_ns = now_ns - self._before_ns, now_ns
        allowance_ns = self._allowance_ns + (_AWAKE_SHARE - self._is_awake) * elapsed_ns
        self._allowance_ns = min(allowance_ns, 2 * _MAX_LEAD_NS)
        lead_ns = self._lead_ns if allowance_ns > 0 else 0
        self._is_awake = 0 < left_ns <= lead_ns or (until_ns == self._slept_for_ns and allowance_ns > 0)
        if self._is_awake or left_ns <= 0:
            return
        asleep_ns = min(left_ns - lead_ns, self._longest_ns)
        ready, _, _ = select.select(self._watched, [], [], asleep_ns / 1e9)
        if not ready and asleep_ns < self._longest_ns:
            self._slept_for_ns = until_ns
            self._learn(time.monotonic_ns() - now_ns - asleep_ns)

    def _learn(self, late_ns: int) -> None:
        step_ns = _STEP_NS if late_ns > self._lead_ns else -_STEP_NS
        self._lead_ns = min(max(self._lead_ns + step_ns, 0), _MAX_LEAD_NS)


def fine_timers() -> None:
    """Ask the kernel for timers that are not rounded (50 us by default), where it lets a process do so."""
    with contextlib.suppress(OSError):
        _TIMER_SLACK.write_text("1", encoding="ascii")
