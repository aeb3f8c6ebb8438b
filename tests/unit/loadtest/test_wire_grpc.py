from __future__ import annotations

import time

import pytest
from support.waiting import eventually

from repo_manager.errors import ServerUnreachableError
from repo_manager.loadtest.worker.schedule import Schedule


def test_good_answers_are_counted_on_one_connection(grpc_server, load):
    server = grpc_server(lambda n: "ok")
    result = load("grpc", server.port, (b"one", b"two")).run(0.3, slots=4, ended=25)
    assert result.errors == 0
    assert result.latencies.count == server.requests > 20
    assert server.connections == 1
    assert server.bodies[:3] == [b"one", b"two", b"one"]
    assert server.pongs == [b"pingpong"]


@pytest.mark.parametrize("table", [0, 64, 4096, 65536])
def test_every_request_carries_the_same_headers_whatever_the_peers_table(grpc_server, load, table):
    server = grpc_server(lambda n: "ok", {1: table})
    result = load("grpc", server.port).run(0.15, ended=10)
    assert result.latencies.count > 5
    assert server.headers[0][":path"] == "/p"
    assert server.headers[0][":method"] == "POST"
    assert server.headers[0]["te"] == "trailers"
    assert server.headers[0]["content-type"] == "application/grpc"
    assert all(fields == server.headers[0] for fields in server.headers)


def test_a_trailers_only_error_is_reported_with_its_message(grpc_server, load):
    server = grpc_server(lambda n: "error" if n % 2 else "ok")
    result = load("grpc", server.port).run(0.2, ended=10)
    assert dict(result.messages) == {'UNAVAILABLE: the model is "down"': result.errors}
    assert result.errors >= 5
    assert result.errors + result.latencies.count == server.requests


def test_an_answer_of_a_proxy_is_no_success(grpc_server, load):
    server = grpc_server(lambda n: "proxy")
    result = load("grpc", server.port).run(0.1)
    assert result.latencies.count == 0
    assert "HTTP 502" in result.messages[0][0]


def test_a_reset_stream_fails_alone(grpc_server, load):
    server = grpc_server(lambda n: "reset" if n == 5 else "ok")
    result = load("grpc", server.port).run(0.2, slots=3, ended=15)
    assert dict(result.messages) == {"the server reset the stream: REFUSED_STREAM": 1}
    assert result.latencies.count == server.requests - 1 > 10
    assert server.connections == 1


def test_a_graceful_goaway_loses_nothing(grpc_server, load):
    server = grpc_server(lambda n: "goaway" if n % 10 == 0 else "ok")
    result = load("grpc", server.port).run(0.4, ended=25)
    assert result.errors == 0
    assert result.latencies.count == server.requests > 20
    assert server.connections >= server.requests // 10 >= 2


def test_streams_above_the_goaway_are_sent_again_elsewhere(grpc_server, load):
    server = grpc_server(lambda n: "refuse" if n == 6 else "ok")
    result = load("grpc", server.port).run(0.3, slots=2, ended=15)
    assert result.errors <= 1  # the request before it, with its answer cut off, is no longer certain
    assert all("closed" in message or "broke" in message for message, _ in result.messages)
    assert result.latencies.count > 10
    assert server.connections in (2, 3)  # each of the two slots may open the next connection


def test_a_closed_connection_fails_its_streams_and_the_load_goes_on(grpc_server, load):
    server = grpc_server(lambda n: "close" if n == 8 else "ok")
    result = load("grpc", server.port).run(0.3, slots=4, ended=20)
    assert 1 <= result.errors <= 4
    assert result.latencies.count > 10
    assert server.connections == 2


def test_a_silent_server_is_a_timeout_and_the_stream_is_cancelled(grpc_server, load):
    server = grpc_server(lambda n: "ignore" if n == 3 else "ok")
    result = load("grpc", server.port, timeout_s=2.0).run(0.1, ended=10)
    assert dict(result.messages) == {"no answer within 2 s": 1}
    assert eventually(lambda: len(server.resets) == 1)
    assert result.latencies.count > 5


@pytest.mark.parametrize(
    ("settings", "credit_bytes"),
    [({}, 65535), ({4: 10_000}, 7_000), ({4: 1 << 24, 5: 1 << 20}, 65535), ({3: 1}, 65535)],
)
def test_large_messages_keep_to_the_windows_and_arrive_whole(grpc_server, load, settings, credit_bytes):
    body = bytes(range(256)) * 1200  # 300 KiB
    server = grpc_server(lambda n: "ok", settings, credit_bytes)
    result = load("grpc", server.port, (body, b"small")).run(0.4, slots=3, ended=6)
    assert result.errors == 0
    assert result.latencies.count == server.requests >= 4
    assert server.protocol_errors == []
    assert server.largest_frame <= settings.get(5, 16_384)
    assert {bytes(seen) for seen in server.bodies} == {body, b"small"}


def test_an_open_loop_keeps_its_schedule(grpc_server, load):
    server = grpc_server(lambda n: "ok")
    began = time.monotonic()
    result = load("grpc", server.port).run(1.0, schedule=Schedule("constant", 200.0))
    # The run may last longer than asked where others use the CPUs. The schedule goes on as long.
    assert 190 <= result.latencies.count <= 205 + 200 * (time.monotonic() - began - 1.0)
    assert result.sent == result.latencies.count
    # How many come late depends on other users of the CPUs (benchmarks/ measure it). All late ones are counted.
    assert (result.late > 0) == (result.max_late_ns > 500_000)


def test_something_else_on_the_port_is_said_so(http_server, load):
    server = http_server(lambda n: "ok")
    server.close()
    with pytest.raises(ServerUnreachableError, match="cannot be reached"):
        load("grpc", server.port).run(0.1)
