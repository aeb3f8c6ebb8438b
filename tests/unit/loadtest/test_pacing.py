"""The waits of an open loop, on a clock whose sleeps end late by as much as a test says."""

from __future__ import annotations

import select
import socket
import time
from types import SimpleNamespace

import pytest

from repo_manager.loadtest import pacing
from repo_manager.loadtest.pacing import Pacer, fine_timers
from repo_manager.loadtest.recorder import Recorder

US, MS = 1_000, 1_000_000


class Machine:
    """A clock; a sleep on it ends `late_ns` late, and a turn of the loop takes 3 us."""

    def __init__(self, late_ns: int) -> None:
        self.now_ns = 0
        self.late_ns = late_ns
        self.slept_ns = 0

    def select(self, watched, _, __, timeout_s):
        took_ns = round(timeout_s * 1e9) + self.late_ns
        self.slept_ns += took_ns
        self.now_ns += took_ns
        return [], [], []

    def send_on_schedule(self, pacer: Pacer, gap_ns: int, count: int) -> list[int]:
        """Return how late each request is sent."""
        late = []
        for number in range(1, count + 1):
            due_ns = number * gap_ns
            while self.now_ns < due_ns:
                pacer.wait(due_ns)
                self.now_ns += 3 * US
            late.append(self.now_ns - due_ns)
        return late


@pytest.fixture
def machine(monkeypatch):
    def make(late_ns: int) -> Machine:
        made = Machine(late_ns)
        monkeypatch.setattr(pacing, "select", SimpleNamespace(select=made.select))
        monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic_ns=lambda: made.now_ns))
        return made

    return make


@pytest.mark.parametrize("late_ns", [0, 60 * US, 150 * US, 300 * US])
def test_sleeps_that_end_late_are_learned_and_begin_to_end_earlier(machine, late_ns):
    clock = machine(late_ns)
    late = clock.send_on_schedule(Pacer(None, 20 * MS), 5 * MS, 400)
    assert max(late[100:]) <= late_ns / 10 + 10 * US


def test_no_more_than_a_tenth_of_the_time_passes_awake(machine):
    clock = machine(390 * US)
    pacer = Pacer(None, 20 * MS)
    clock.send_on_schedule(pacer, 700 * US, 200)
    clock.late_ns, clock.slept_ns, begin_ns = 0, 0, clock.now_ns  # from now on every sleep ends too early
    gap_ns = 700 * US
    for number in range(1, 51):
        while clock.now_ns < begin_ns + number * gap_ns:
            pacer.wait(begin_ns + number * gap_ns)
            clock.now_ns += 3 * US
    awake = 1 - clock.slept_ns / (clock.now_ns - begin_ns)
    assert 0.05 < awake < 0.17  # the turns of the loop, and what was not used before, are in it, too


def test_one_late_sleep_changes_little(machine):
    clock = machine(20 * US)
    pacer = Pacer(None, 20 * MS)
    clock.send_on_schedule(pacer, 5 * MS, 100)
    clock.late_ns = 30 * MS
    pacer.wait(clock.now_ns + 5 * MS)
    clock.late_ns = 20 * US
    before_ns, begin_ns = clock.slept_ns, clock.now_ns
    pacer.wait(begin_ns + 5 * MS)
    assert clock.slept_ns - before_ns > 4.9 * MS


def test_an_answer_ends_the_wait():
    ours, theirs = socket.socketpair()
    with ours, theirs, select.epoll() as epoll:
        epoll.register(ours.fileno(), select.EPOLLIN)
        theirs.send(b"x")
        begin = time.monotonic()
        Pacer(epoll, 10_000 * MS).wait(time.monotonic_ns() + 5_000 * MS)
        assert time.monotonic() - begin < 2


def test_the_longest_sleep_is_kept(machine):
    clock = machine(0)
    Pacer(None, 20 * MS).wait(None)
    Pacer(None, 20 * MS).wait(clock.now_ns + 1_000 * MS)
    assert clock.now_ns == 40 * MS


def test_timers_are_fine_where_the_system_lets_them_be():
    before = pacing._TIMER_SLACK.read_text() if pacing._TIMER_SLACK.exists() else None
    if before is None:
        pytest.skip("this system has no timer slack")
    try:
        fine_timers()
        assert pacing._TIMER_SLACK.read_text().strip() == "1"
    finally:
        pacing._TIMER_SLACK.write_text(before)


def test_a_slice_ends_at_once_and_is_handed_on_when_asked():
    found = []
    recorder = Recorder(100, found.append)
    recorder.begin(0)
    recorder.add([5, 7], 50)
    recorder.add([9], 250)  # two slices ended before it
    assert found == []
    assert recorder.kept_since_ns == 100
    recorder.hand_over()
    assert [(piece.index, piece.latencies.count, piece.length_ns) for piece in found] == [(0, 2, 100), (1, 0, 100)]
    assert recorder.kept_since_ns is None
    recorder.finish(260)
    recorder.hand_over()
    assert (found[-1].index, found[-1].latencies.total_ns, found[-1].length_ns) == (2, 9, 60)
