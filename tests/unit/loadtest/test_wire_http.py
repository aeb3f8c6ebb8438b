from __future__ import annotations

import gzip
import itertools
import time
import zlib

import pytest

from repo_manager.loadtest.wire.http import _problem_of
from repo_manager.loadtest.worker.schedule import Schedule

ANSWER = b'{"model_name":"m","model_version":"1","outputs":[]}'


def test_good_answers_are_counted_and_bodies_rotate(http_server, load):
    server = http_server(lambda n: "ok")
    result = load("http", server.port, (b"one", b"two", b"three")).run(0.2, ended=15)
    assert result.errors == 0
    assert result.latencies.count == server.requests > 10
    assert server.bodies[:4] == [b"one", b"two", b"three", b"one"]
    assert server.connections == 1


def test_the_servers_own_message_is_reported(http_server, load):
    server = http_server(lambda n: "error" if n % 2 else "ok")
    result = load("http", server.port).run(0.2, ended=12)
    assert dict(result.messages) == {"HTTP 500: the model is on fire": result.errors}
    assert result.errors + result.latencies.count == server.requests
    assert result.errors >= 5
    assert server.connections == 1


@pytest.mark.parametrize("action", ["split", "goodbye"])
def test_answers_in_pieces_and_closed_connections_are_no_errors(http_server, load, action):
    server = http_server(lambda n: action)
    result = load("http", server.port).run(0.4, ended=5)
    assert result.errors == 0
    assert result.latencies.count == server.requests >= 3
    assert (server.connections == 1) == (action == "split")


def test_answers_in_chunks_are_answers(http_server, load):
    server = http_server(lambda n: "chunked error" if n % 3 == 2 else "chunked")
    result = load("http", server.port).run(0.3, ended=9)
    assert dict(result.messages) == {"HTTP 500: the model is on fire": result.errors}
    assert result.errors >= 2
    assert result.errors + result.latencies.count == server.requests
    assert server.connections == 1


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("close", "closed the connection"),
        ("untold", "no Content-Length and no chunks"),
        ("bad chunk", "a chunk is longer than its size"),
    ],
)
def test_a_broken_answer_is_an_error_and_the_load_goes_on(http_server, load, action, words):
    server = http_server(lambda n: action if n == 3 else "ok")
    result = load("http", server.port).run(0.3, ended=10)
    assert result.errors == 1
    assert words in result.messages[0][0]
    assert result.latencies.count > 5
    assert server.connections == 2


@pytest.mark.parametrize("action", ["empty", "page", "error at 200", "as long as an answer"])
def test_a_body_that_is_no_answer_is_an_error_whatever_the_status(http_server, load, action):
    server = http_server(lambda n: action if n in (3, 4, 9) else "ok")
    result = load("http", server.port).run(0.3, ended=15)
    ((message, count),) = result.messages
    assert (count, message.startswith("HTTP 200 with a body that is no inference answer")) == (3, True)
    assert result.latencies.count == server.requests - 3 > 5
    assert server.connections == 1


def test_compressed_answers_are_answers(http_server, load):
    for pack in (zlib.compress, gzip.compress):
        assert _problem_of(200, pack(ANSWER)) is None
        assert _problem_of(200, pack(b"<html>"))


def test_a_silent_server_is_a_timeout(http_server, load):
    server = http_server(lambda n: "ignore" if n == 2 else "ok")
    result = load("http", server.port, timeout_s=2.0).run(0.1, ended=10)
    assert dict(result.messages) == {"no answer within 2 s": 1}
    assert result.latencies.count > 5


def test_large_bodies_arrive_whole(http_server, load):
    body = bytes(range(256)) * 8192  # 2 MiB
    server = http_server(lambda n: "ok")
    result = load("http", server.port, (body,)).run(0.3, slots=2, ended=5)
    assert result.errors == 0
    assert result.latencies.count >= 4
    assert all(seen == body for seen in server.bodies)


def test_an_open_loop_does_not_forget_a_stall(http_server, load):
    """Requests due every 10 ms; the server stalls 0.5 s once, on one connection of many that share one lock.

    A stall of S seconds makes the requests of that time wait S, S-10ms, S-20ms ...: their mean is S/2, and about
    S/10ms of them wait. A closed loop with one request in flight sees exactly one slow request.
    """
    server = http_server(lambda n: "stall:0.5" if n == 20 else "ok")
    closed = load("http", server.port).run(1.5)
    gaps_ns = [later - earlier for earlier, later in itertools.pairwise(server.answered_ns)]
    assert 1 <= _slower_than(closed, 0.1) <= sum(gap > 60e6 for gap in gaps_ns) + 3

    server = http_server(lambda n: "stall:0.5" if n == 20 else "ok")
    client = load("http", server.port)
    opened = _run_with_one_connection(client, Schedule("constant", 100.0))
    assert _slower_than(opened, 0.1) >= 36  # those due in the first 0.4 s of the stall
    assert _slower_than(opened, 0.3) >= 16
    assert opened.latencies.quantile_ns(0.99) > 400e6
    # A busy machine delays answers, too. Nothing else does: no request waits longer than the server says.
    due_ns = [client.start_ns + number * 10_000_000 for number in range(len(server.answered_ns))]
    waits_ns = [answered - due for answered, due in zip(server.answered_ns, due_ns, strict=True)]
    assert opened.latencies.count == len(waits_ns)
    for seconds in (0.1, 0.3):
        told = sum(wait > seconds * 1e9 for wait in waits_ns)
        assert told - 1 <= _slower_than(opened, seconds) <= sum(wait > (seconds - 0.06) * 1e9 for wait in waits_ns) + 8


def _slower_than(result, seconds):
    histogram = result.latencies
    return round(histogram.share_above(int(seconds * 1e9)) * histogram.count)


def _run_with_one_connection(generator, schedule):
    """Make the stall hold up everything behind it, as one server instance does."""
    from repo_manager.loadtest.worker import generator as module

    limit, module._MAX_CONNECTIONS = module._MAX_CONNECTIONS, 1
    try:
        return generator.run(1.5, schedule=schedule)
    finally:
        module._MAX_CONNECTIONS = limit


def test_slices_are_handed_on_between_the_requests_of_an_open_loop(http_server, load):
    """Counting a slice takes the CPU for most of a millisecond; the schedule puts a request on each slice's end."""
    server = http_server(lambda number: "stall:0.002")
    early = []

    def look(running):
        """A busy machine may have no quiet moment in a slice. The slice is then kept for as long as it was."""
        recorder = running._recorder
        kept_ns = time.monotonic_ns() - (recorder.kept_since_ns or recorder.boundary_ns)
        early.append(running._in_flight and kept_ns <= recorder.slice_ns)

    whole = load("http", server.port).run(1.0, slots=4, schedule=Schedule("constant", 100.0), watch=look)
    assert whole.latencies.count > 50
    assert len(early) > 15
    assert not any(early)
