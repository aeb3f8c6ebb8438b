"""A server closes the connection of a call on its way: the call is sent again, and not without end."""

from __future__ import annotations

import concurrent.futures
import socket
from collections.abc import Iterator

import grpc
import pytest
from support.bad_peers import GRPC_MANNERS, BadPeer, Line

from repo_manager.errors import ServerUnreachableError
from repo_manager.server.client import TritonClient

_LIVE = b"\x08\x01"  # ServerLiveResponse(live=True)


class _Live(grpc.GenericRpcHandler):
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: _LIVE)


@pytest.fixture
def good_port() -> Iterator[int]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=[_Live()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


def test_a_call_that_was_not_taken_is_sent_again(good_port: int) -> None:
    left = [1]

    def manner(line: Line) -> None:
        if left:
            left.pop()
            GRPC_MANNERS["goes-away"](line)
            return
        to_server = socket.create_connection(("127.0.0.1", good_port))
        with to_server as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(_pump, server, line.sock)
            _pump(line.sock, server)

    with BadPeer(manner) as peer, TritonClient.connect(f"grpc://127.0.0.1:{peer.port}") as client:
        assert client.live(timeout_s=30.0)
        assert peer.connections >= 2


def test_a_server_that_closes_every_connection_is_given_up() -> None:
    """gRPC itself goes on until the deadline, and takes 200 MB more each second."""
    with (
        BadPeer(GRPC_MANNERS["goes-away"]) as peer,
        TritonClient.connect(f"grpc://127.0.0.1:{peer.port}") as client,
        pytest.raises(ServerUnreachableError, match=r"cannot be reached: metadata: .*GOAWAY"),  # not: no answer in time
    ):
        client.metadata(timeout_s=20.0)


def _pump(source: socket.socket, target: socket.socket) -> None:
    while piece := source.recv(65_536):
        target.sendall(piece)
    target.shutdown(socket.SHUT_WR)
