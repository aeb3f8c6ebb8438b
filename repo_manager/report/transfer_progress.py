"""How far a transfer is, as a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from repo_manager.report.tables import format_bytes

__all__ = ["transfer_progress"]


def transfer_progress(
    report: Callable[[str], None],
    total_bytes: int,
    *,
    every_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[int], None]:
    """Return a function that is told the bytes as they arrive and reports the sum, once `every_s` at most.

    A transfer that takes less than that is not spoken of.

    Args:
        report: takes one line.
        total_bytes: what there is to transfer; 0 when it is not known.
        every_s: the shortest time between two lines.
        clock: seconds.
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
