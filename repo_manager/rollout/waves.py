"""The same act on many servers, so many at a time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["in_waves"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_waves(items: Sequence[Item], size: int, act: Callable[[Item], Result]) -> list[Result]:
    """Act on items, `size` at a time, and return the results in the items' order.

    A wave begins when the one before it has ended. When an act raises, the rest of its wave is waited for,
    no other wave begins, and the first error is raised. An interruption does not wait.

    Args:
        items: what to act on.
        size: of a wave; one at a time runs in the calling thread.
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
