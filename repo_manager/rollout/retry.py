"""Calls that are asked again when a server was out of reach, or too busy, for a moment."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from repo_manager.errors import ServerError, ServerRefusedError, ServerUnreachableError

__all__ = ["Deadline", "retried"]

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
# Triton's full queue, and what gateways answer in its place. A load that failed is not among them: each failed
# TensorRT load may leak GPU memory (server#8969).
_BUSY = re.compile(
    r"exceeds maximum queue size|too many requests|bad gateway|gateway time-?out|RESOURCE_EXHAUSTED", re.I
)


class Deadline:
    """The moment until which everything together has to be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """How many seconds are left; below 0 when it has passed."""
        return self._end - time.monotonic()

    def remaining_s(self, most_s: float) -> float:
        """Return how long the next call may take.

        Raises:
            ServerUnreachableError: no time is left.
        """
        if self.left_s <= 0:
            raise ServerUnreachableError(
                f"it was not done within the {self.seconds:g} s of --timeout", hint="Give it longer with --timeout."
            )
        return min(self.left_s, most_s)


def retried(
    call: Callable[[], Result], *, retries: int, report: Callable[[str], None], deadline: Deadline | None = None
) -> Result:
    """Call; when the server cannot be reached or is busy, pause and call again, each pause twice the last.

    Only for calls that may be made twice: reading, loading and the smoke inference.

    Args:
        call: raises ServerError.
        retries: how many more calls after the first.
        report: told of each.
        deadline: no pause goes past it.

    Raises:
        ServerError: the last call's.
    """
    for tried in range(retries + 1):
        try:
            return call()
        except ServerError as exc:
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**tried) * random.uniform(0.8, 1.2)
            late = deadline is not None and deadline.left_s <= pause_s
            if tried == retries or late or not _is_transient(exc):
                raise
            report(f"{exc.message.splitlines()[0]}; asking again in {pause_s:.1f} s ({tried + 1} of {retries})")
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _is_transient(exc: ServerError) -> bool:
    if isinstance(exc, ServerUnreachableError):
        return "did not answer within" not in exc.message  # that one has waited long enough already
    return isinstance(exc, ServerRefusedError) and _BUSY.search(exc.message) is not None
