from __future__ import annotations

import os
import time

import pytest

from repo_manager.loadtest.worker import priority as module
from repo_manager.loadtest.worker.priority import SendPriority, fine_timers


def own_priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_the_priority_is_as_before_afterwards():
    before = own_priority()
    with SendPriority() as priority:
        assert own_priority() == (-20 if priority.is_held else before)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER  # a real-time process takes CPUs from the server
        time.sleep(0.1)
        held = priority.is_held
        priority.check(time.monotonic_ns())
        assert priority.is_held is held  # a sleeping process keeps its priority
    assert own_priority() == before


def test_a_process_that_needs_a_whole_cpu_gives_it_back():
    before = own_priority()
    with SendPriority() as priority:
        if not priority.is_held:
            pytest.skip("this process may not take a higher priority")
        began_ns, end = time.monotonic_ns(), time.process_time() + 0.06
        while time.process_time() < end:
            pass
        priority.check(began_ns + 60_000_000)  # as on a CPU of its own, whatever else this machine does
        assert not priority.is_held
        assert own_priority() == before


def test_timers_are_fine_where_the_system_lets_them_be():
    before = module._TIMER_SLACK.read_text() if module._TIMER_SLACK.exists() else None
    if before is None:
        pytest.skip("this system has no timer slack")
    try:
        fine_timers()
        assert module._TIMER_SLACK.read_text().strip() == "1"
    finally:
        module._TIMER_SLACK.write_text(before)
