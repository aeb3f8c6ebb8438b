"""Waiting for another process: Triton, for instance, counts an inference after it has answered it."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE_S = 0.002
"""Between two requests of a thread that asks all the time: without it, a test takes the cores from all others."""


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Return whether a condition comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
