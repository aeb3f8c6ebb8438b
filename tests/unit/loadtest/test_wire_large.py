"""Large answers, read by nobody, and the moment of opening connections."""

from __future__ import annotations

import socket
import time

import pytest

from repo_manager.loadtest.wire.connection import open_sockets
from repo_manager.loadtest.worker import generator as generator_module
from repo_manager.loadtest.worker.generator import Generator
from repo_manager.loadtest.worker.recorder import Recorder
from repo_manager.loadtest.worker.schedule import Job


def test_large_answers_over_http_end_where_they_say(http_server, load):
    server = http_server(lambda number: "large" if number % 2 else "ok")
    whole = load("http", server.port).run(0.5, slots=2)
    assert whole.errors == 0
    assert whole.latencies.count > 4


def test_a_large_answer_that_breaks_off_is_an_error(http_server, load):
    server = http_server(lambda number: "cut" if number == 3 else "large")
    whole = load("http", server.port).run(0.5)
    assert whole.errors == 1
    assert "closed the connection" in whole.messages[0][0]
    assert whole.latencies.count > 2


def test_large_answers_over_grpc_are_skipped_wherever_they_are_cut(grpc_server, load):
    server = grpc_server(lambda number: "large" if number % 3 else "ok")
    whole = load("grpc", server.port).run(0.5, slots=3)
    assert whole.errors == 0
    assert whole.latencies.count > 6


@pytest.mark.parametrize(("slots", "opened"), [(1, [1]), (6, [1, 2, 2, 1])])
def test_http_connections_beyond_the_first_are_opened_in_pairs_when_the_load_runs(
    http_server, load, slots, opened, monkeypatch
):
    counts = []

    def counted(endpoint, count):
        counts.append(count)
        return open_sockets(endpoint, count)

    monkeypatch.setattr(generator_module, "open_sockets", counted)
    monkeypatch.setattr(generator_module, "_OPENING_NS", 60_000_000_000)  # on a slow machine, too
    server = http_server(lambda number: "ok")
    job = Job("http", load("http", server.port).endpoint, slots, 1, None, 0, 1, 50_000_000, 100)
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def stop() -> None:
            theirs.recv(1)
            generator.stopping = True

        generator = Generator(job, Recorder(50_000_000, lambda piece: None), (theirs.fileno(), stop))
        generator.open()
        deadline = time.monotonic() + 5
        while server.connections < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert server.connections == 1
        told = []

        def answer(number: int) -> str:
            if server.connections == sum(opened) and not told:
                told.append(ours.send(b"x"))
            return "ok"

        server.action = answer
        generator.run(time.monotonic_ns())
    assert counts == opened
    assert server.connections == sum(opened)
