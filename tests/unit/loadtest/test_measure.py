"""How often the server is asked for its counters while a level is measured."""

from __future__ import annotations

import pytest

from repo_manager.errors import ServerUnreachableError
from repo_manager.loadtest.gpu import MetricsSource
from repo_manager.loadtest.measure import Level, Measurement
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ModelStatistics
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram

LEVEL = Level("concurrency", 1, "closed loop")


class Counters:
    """The counters of a server with 10 answered requests between two readings."""

    def __init__(self):
        self.readings = 0
        self.is_dead = False

    def statistics(self):
        if self.is_dead:
            raise ServerUnreachableError("gone")
        self.readings += 1
        count = 10 * self.readings
        times = dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 1000 * count)
        return ModelStatistics(count, count, count, 0, 0, times, {1: count})


def piece(index, requests=20):
    return Slice(index, 100_000_000, Histogram.of([1_000_000] * requests))


def measurement(counters, **options):
    made = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), warmup_s=0.1, **options)
    return Measurement(LEVEL, made, counters, MetricsSource("http://127.0.0.1:9/metrics"), None)


def test_a_fixed_time_needs_the_counters_at_its_ends_only():
    counters = Counters()
    made = measurement(counters, duration_s=5.0)
    for index in range(51):
        made.take(piece(index), 1)
    assert made.finished
    assert counters.readings == 2
    row = made.point()
    assert (row.requests, row.server.requests, len(row.windows)) == (1000, 10, 5)


def test_windows_that_have_to_agree_each_have_their_counters():
    counters = Counters()
    made = measurement(counters)
    for index in range(31):
        made.take(piece(index), 1)
    assert made.finished
    assert counters.readings == 4


def test_a_server_that_answers_nothing_is_asked_whether_it_lives():
    counters = Counters()
    made = measurement(counters, duration_s=5.0)
    for index in range(10):
        made.take(piece(index), 1)
    counters.is_dead = True
    for index in range(10, 20):
        made.take(piece(index, requests=0), 1)
    with pytest.raises(ServerUnreachableError):
        made.take(piece(20, requests=0), 1)


def test_an_interrupted_measurement_has_the_counters_until_then():
    counters = Counters()
    made = measurement(counters, duration_s=5.0)
    for index in range(25):
        made.take(piece(index), 1)
    made.stop()
    assert made.point().server.requests == 10
    counters.is_dead = True
    made.stop()  # the measured part is still shown


@pytest.mark.parametrize(
    ("arrival", "each", "said"), [("poisson", 9, False), ("constant", 9, True), ("poisson", 3, True)]
)
def test_fewer_arrivals_of_a_poisson_process_are_no_shortfall(arrival, each, said):
    options = LoadTestOptions("grpc://a:1", "m", rate=(100.0,), arrival=arrival, warmup_s=0.1, duration_s=1.0)
    level = Level("rate", 100.0, arrival)
    made = Measurement(level, options, Counters(), MetricsSource("http://127.0.0.1:9/metrics"), None)
    for index in range(11):
        made.take(piece(index, requests=each), 1)
    assert ("were answered" in made.point().reason) is said
