"""Cuts a worker's answers into slices of time, by the arrival of each answer.

Ending a slice costs nothing. Counting it and handing it on costs almost a millisecond on an idle CPU. So the load loop
chooses when to do it (`hand_over`): a closed loop is always busy with a request, an open one is not.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping

from repo_manager.stats.histogram import Histogram

__all__ = ["Recorder", "Slice"]

LATE_NS = 500_000
_KEPT_MESSAGES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The record of one worker (or of all, merged) for one slice of time.

    Attributes:
        index: number of the slice. Slice `k` covers `[k, k+1) * slice_ns` after the start of the load.
        length_ns: how long it lasted. Less than the others only for the last one.
        latencies: of the successful requests of the slice.
        errors: how many requests ended in an error.
        messages: error message -> how often, at most 8 kinds.
        sent: requests due in the slice and sent (open loop only; 0 in a closed loop).
        late: how many of them were sent more than 0.5 ms after their scheduled moment.
        max_late_ns: longest delay of a send behind its scheduled moment, also below 0.5 ms.
        cpu_ns: CPU time the process used.
        run_queue_ns: time the process was ready to run and had no CPU.
        details: more than whole requests: `sequence` (from a sequence's first request to its last answer), `first`
            (to a request's first response), `between` (from one response to the next).
    """

    index: int
    length_ns: int
    latencies: Histogram
    errors: int = 0
    messages: tuple[tuple[str, int], ...] = ()
    sent: int = 0
    late: int = 0
    max_late_ns: int = 0
    cpu_ns: int = 0
    run_queue_ns: int = 0
    details: Mapping[str, Histogram] = dataclasses.field(default_factory=dict)

    @classmethod
    def merge(cls, parts: list[Slice]) -> Slice:
        """Add the same slice of several workers, or several slices, up."""
        if len(parts) == 1:
            return parts[0]
        messages: collections.Counter[str] = collections.Counter()
        for part in parts:
            messages.update(dict(part.messages))
        return cls(
            index=parts[0].index,
            length_ns=max(part.length_ns for part in parts),
            latencies=Histogram.merge(part.latencies for part in parts),
            errors=sum(part.errors for part in parts),
            messages=tuple(messages.most_common(_KEPT_MESSAGES)),
            sent=sum(part.sent for part in parts),
            late=sum(part.late for part in parts),
            max_late_ns=max(part.max_late_ns for part in parts),
            cpu_ns=sum(part.cpu_ns for part in parts),
            run_queue_ns=sum(part.run_queue_ns for part in parts),
            details={
                name: Histogram.merge(part.details[name] for part in parts if name in part.details)
                for name in dict.fromkeys(name for part in parts for name in part.details)
            },
        )


class Recorder:
    """Collects latencies and hands a `Slice` on whenever one is over and the loop has a moment for it.

    Args:
        slice_ns: length of each slice in nanoseconds, the last one excepted.
        emit: takes each finished slice, in order, none left out.
    """

    def __init__(self, slice_ns: int, emit: Callable[[Slice], None]) -> None:
        self.boundary_ns = 1 << 62
        self.slice_ns = slice_ns
        self._emit = emit
        self._index = 0
        self.latencies: list[int] = []  # of the current slice; the caller may append before `boundary_ns`
        self._errors = 0
        self._messages: collections.Counter[str] = collections.Counter()
        self._sent = self._late = self._max_late_ns = 0
        # Ended slices not counted yet: end time, known facts, latencies.
        self._ended: list[tuple[int, Slice, list[int], dict[str, list[int]]]] = []
        self._details: dict[str, list[int]] = {}
        self._cpu_ns, self._wait_ns = _process_times()

    def begin(self, start_ns: int) -> None:
        """Set the beginning of slice 0."""
        self.boundary_ns = start_ns + self.slice_ns
        self._cpu_ns, self._wait_ns = _process_times()

    def add(self, latencies_ns: list[int], now_ns: int) -> None:
        """Count answers received at `now_ns`."""
        if now_ns >= self.boundary_ns:
            self.roll(now_ns)
        self.latencies += latencies_ns

    def add_details(self, name: str, values_ns: list[int], now_ns: int) -> None:
        """Count numbers other than whole requests, at `now_ns`. See `Slice.details`."""
        if now_ns >= self.boundary_ns:
            self.roll(now_ns)
        self._details.setdefault(name, []).extend(values_ns)

    def add_errors(self, count: int, message: str, now_ns: int) -> None:
        """Count requests failed at `now_ns`.

        Args:
            count: number of requests that ended.
            message: reason of all of them. A ninth kind in a slice is counted without its text.
            now_ns: when they came (monotonic clock). Slices over by then are ended first.
        """
        if now_ns >= self.boundary_ns:
            self.roll(now_ns)
        self._errors += count
        if message in self._messages or len(self._messages) < _KEPT_MESSAGES:
            self._messages[message] += count

    def add_sends(self, sent: int, late: int, max_late_ns: int) -> None:
        """Count open-loop sends and how many of them missed their moment.

        Args:
            sent: number of sends in this round.
            late: how many of `sent` missed their moment by more than 0.5 ms.
            max_late_ns: delay of the latest send in nanoseconds.
        """
        self._sent += sent
        self._late += late
        self._max_late_ns = max(self._max_late_ns, max_late_ns)

    def roll(self, now_ns: int) -> None:
        """End every slice over at `now_ns`."""
        while now_ns >= self.boundary_ns:
            self.finish(self.boundary_ns)
            self.boundary_ns += self.slice_ns

    def finish(self, end_ns: int) -> None:
        """End the current slice at `end_ns`, and begin the next one."""
        piece = Slice(
            index=self._index,
            length_ns=max(end_ns - (self.boundary_ns - self.slice_ns), 0),
            latencies=Histogram.empty(),
            errors=self._errors,
            messages=tuple(self._messages.items()),
            sent=self._sent,
            late=self._late,
            max_late_ns=self._max_late_ns,
        )
        self._ended.append((end_ns, piece, self.latencies, self._details))
        self._index += 1
        self.latencies, self._details = [], {}
        self._errors = self._sent = self._late = self._max_late_ns = 0
        self._messages.clear()

    @property
    def kept_since_ns(self) -> int | None:
        """The end of the oldest slice not handed on. `None` when there is none."""
        return self._ended[0][0] if self._ended else None

    def hand_over(self) -> None:
        """Count the finished slices, and hand them on."""
        for _, piece, latencies_ns, details in self._ended:
            cpu_ns, wait_ns = _process_times()
            self._emit(
                dataclasses.replace(
                    piece,
                    latencies=Histogram.of(latencies_ns),
                    cpu_ns=cpu_ns - self._cpu_ns,
                    run_queue_ns=wait_ns - self._wait_ns,
                    details={name: Histogram.of(values) for name, values in details.items()},
                )
            )
            self._cpu_ns, self._wait_ns = cpu_ns, wait_ns
        self._ended.clear()


def _process_times() -> tuple[int, int]:
    """Return the CPU time of this process and the time it waited for a CPU, in nanoseconds.

    The wait is the second number of /proc/self/schedstat (kernel documentation, "Scheduler Statistics"). It is 0 where
    the kernel does not count it.
    """
    try:
        with open("/proc/self/schedstat", encoding="ascii") as file:  # noqa: PTH123  # a path object costs more than the read
            waited = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        waited = 0
    return time.process_time_ns(), waited
