from __future__ import annotations

import threading

import pytest

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.calls import in_waves


@pytest.mark.parametrize("size", [1, 3, 100])
def test_waves_keep_the_order_and_their_size(size: int) -> None:
    together, most, lock = 0, 0, threading.Lock()
    barrier = threading.Barrier(min(size, 10), timeout=5.0) if size in (1, 100) else None

    def act(item: int) -> int:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        if barrier is not None:
            barrier.wait()
        with lock:
            together -= 1
        return item * item

    assert in_waves(range(10), size, act) == [item * item for item in range(10)]
    assert most <= size
    assert most == 10 or size != 100


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_ends_its_wave_and_begins_no_other(size: int) -> None:
    seen: list[int] = []

    def act(item: int) -> None:
        seen.append(item)
        if item == 2:
            raise ServerRefusedError("2")

    with pytest.raises(ServerRefusedError, match="2"):
        in_waves(range(8), size, act)
    assert sorted(seen) == list(range(2 + size))
