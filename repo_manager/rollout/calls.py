"""Calls to servers within a deadline: asked again when one is out of reach for a moment, and many at a time."""

from __future__ import annotations

import concurrent.futures
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from repo_manager.errors import ServerError, ServerRefusedError, ServerUnreachableError

__all__ = ["Deadline", "OutOfTimeError", "Result", "in_waves", "retried"]

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
# Triton's full queue (triton-inference-server/core, scheduler_utils.cc), or a gateway's answer for it. Failed loads are
# not retried: each failed TensorRT load may leak GPU memory (server#8969).
_BUSY = re.compile(
    r"exceeds maximum queue size|too many requests|bad gateway|gateway time-?out|RESOURCE_EXHAUSTED", re.I
)
_TOO_LARGE = "message larger than max"  # gRPC's own RESOURCE_EXHAUSTED: a retry changes nothing


class OutOfTimeError(ServerUnreachableError):
    """No time is left for another call."""

    def waiting_for(self, what: str, hint: str = "") -> OutOfTimeError:
        """Return the same error with the last thing waited for, and one more thing to do."""
        return OutOfTimeError(f"{self.message}: {what}", hint=f"{self.hint} {hint}".rstrip())


class Deadline:
    """The moment by which everything together must be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """How many seconds are left. Below 0 when it has passed."""
        return self._end - time.monotonic()

    def allow(self, seconds: float) -> None:
        """Give it at least so long from now: a roll-out with progress is not cut off."""
        self._end = max(self._end, time.monotonic() + seconds)

    def remaining_s(self, most_s: float) -> float:
        """Return how long the next call may take.

        Raises:
            OutOfTimeError: no time is left.
        """
        if self.left_s <= 0:
            raise OutOfTimeError(
                f"it was not done within the {self.seconds:g} s of --timeout", hint="Give it longer with --timeout."
            )
        return min(self.left_s, most_s)


def retried(
    call: Callable[[], Result], *, retries: int, report: Callable[[str], None], deadline: Deadline | None = None
) -> Result:
    """Call. When the server cannot be reached or is busy, pause and call again, each pause twice the last.

    Only for calls safe to make twice: reading, loading and the smoke inference.

    Args:
        call: makes the request. A ServerError it raises may lead to another try.
        retries: how many more calls after the first.
        report: called with one line per pause.
        deadline: end of the last pause. `None`: no deadline.

    Raises:
        ServerError: the last call's.
    """
    told = ""
    for tried in range(retries + 1):
        try:
            return call()
        except ServerError as exc:
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**tried) * random.uniform(0.8, 1.2)
            late = deadline is not None and deadline.left_s <= pause_s
            if tried == retries or late or not _is_transient(exc):
                raise
            why = exc.message.splitlines()[0]
            report(f"{'' if why == told else f'{why}; '}asking again in {pause_s:.1f} s ({tried + 1} of {retries})")
            told = why
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _is_transient(exc: ServerError) -> bool:
    if isinstance(exc, ServerUnreachableError):
        return "did not answer within" not in exc.message  # a time-out: it has waited long enough already
    is_refused = isinstance(exc, ServerRefusedError) and _TOO_LARGE not in exc.message
    return is_refused and _BUSY.search(exc.message) is not None


Item = TypeVar("Item")


def in_waves(items: Sequence[Item], size: int, act: Callable[[Item], Result]) -> list[Result]:
    """Act on items, `size` at a time, and return the results in the items' order.

    A wave begins when the one before it has ended. When an act raises, the rest of its wave is waited for,
    no other wave begins, and the first error is raised. An interruption does not wait.

    Args:
        items: the servers, pods or other parts to act on, in this order.
        size: of a wave. One at a time runs in the calling thread.
        act: runs in several threads at once when `size` is more than 1.
    """
    if size <= 1:
        return [act(item) for item in items]
    results: list[Result] = []
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=min(size, max(1, len(items))))
    try:
        for start in range(0, len(items), size):
            wave = [pool.submit(act, item) for item in items[start : start + size]]
            concurrent.futures.wait(wave)
            results += [future.result() for future in wave]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return results
