"""The common parts of the two wire clients (gRPC over HTTP/2, HTTP/1.1): address, messages and sink.

Both write frames built once, on non-blocking sockets driven by one `epoll` loop. No request object, no future and no
coroutine exists per request: this keeps the client below 20 µs of CPU a request.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from repo_manager.errors import RepoManagerError, ServerUnreachableError
from repo_manager.loadtest.wire.sequences import SequencePlan
from repo_manager.sockets import Timer, resolve
from repo_manager.tls import TlsFiles, tls_context

__all__ = ["Connection", "Endpoint", "Sink", "Socket", "TcpStream", "TlsSocket", "WantWrite", "open_sockets", "wrap"]


# A TLS socket with the interface of a plain non-blocking socket, for the wire clients.

_JOINED_BYTES = 65_536
_context = functools.lru_cache(maxsize=8)(tls_context)  # a worker's connections share it


def wrap(sock: socket.socket, host: str, files: TlsFiles, protocol: str, timer: Timer) -> TlsSocket:
    """Shake hands on a connected socket.

    Args:
        sock: socket connected to the server.
        host: name or address of the server.
        files: trusted authorities, and the client's certificate.
        protocol: application protocol for ALPN, such as `h2`.
        timer: deadline of the whole exchange.

    Raises:
        UsageError: as `tls_context`.
        ServerUnreachableError: the certificate is not trusted, the server wants one, or speaks no TLS.
    """
    context = _context(files, protocol)
    try:
        sock.settimeout(timer.left_s())
        wrapped = context.wrap_socket(sock, server_hostname=files.server_name or host)
    except (ssl.SSLError, OSError) as exc:
        sock.close()
        raise ServerUnreachableError(
            f"{host} refused or failed the TLS handshake: {exc}",
            hint="Check the authorities (--tls-ca), the client's certificate, the name, and the port.",
        ) from exc
    return TlsSocket(wrapped)


class TlsSocket:
    """A TLS socket in the manner of a plain non-blocking one: `BlockingIOError` when it would have to wait.

    Bytes already decrypted do not wake an `epoll` (Python, `ssl`, "Notes on non-blocking sockets"): `recv` leaves none.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket without waiting for the peer's farewell."""
        self._sock.close()

    def recv(self, size_bytes: int) -> bytes:
        """Return the bytes received, at least `size_bytes` if so many are there. Empty at the end.

        Raises:
            BlockingIOError: nothing came.
            OSError: the peer is gone.
        """
        parts: list[bytes] = []
        got = 0
        while got < size_bytes or self._sock.pending():
            try:
                part = self._sock.recv(size_bytes)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not parts:
                    raise BlockingIOError from None
                break
            except ssl.SSLError as exc:
                if parts:
                    break
                if isinstance(exc, ssl.SSLEOFError):
                    return b""
                raise
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def send(self, data: bytes | memoryview) -> int:
        """Send from the start of `data`. Returns how much went.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the peer is gone.
        """
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Send from the start of the buffers. Small ones share a record.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the peer is gone.
        """
        if len(buffers[0]) >= _JOINED_BYTES:
            return self.send(buffers[0])
        joined: list[bytes | memoryview] = []
        size = 0
        for buffer in buffers:
            joined.append(buffer)
            size += len(buffer)
            if size >= _JOINED_BYTES:
                break
        return self.send(b"".join(joined))


_CONNECT_S = 5.0
_JOIN_BELOW_BYTES = 65_536
_MAX_VECTORS = 512

Socket = socket.socket | TlsSocket
WantWrite = Callable[[bool], None]
"""Tells the loop whether this connection waits for its socket to take more bytes."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server's address and the prebuilt requests for one model.

    Attributes:
        host: name or address, IPv6 without brackets. TLS expects this name unless `tls` gives another.
        port: TCP port, 1 to 65535.
        authority: value of the `:authority` or `Host` header.
        path: `:path` of the gRPC method or the HTTP request target.
        headers: further headers (lower-case names), such as the key of a restricted API.
        messages: serialised requests, sent in rotation. gRPC: the protobuf message without its 5-byte prefix.
            HTTP: the body alone.
        json_bytes: HTTP only: the length of the JSON part of each body (`Inference-Header-Content-Length`).
        timeout_ns: a request without an answer for this long is an error.
        protocol: `grpc` or `http`. Decides the protocol TLS negotiates.
        sequences: the requests belong to sequences, and `messages` lack their parameters. `None`: they do not.
        decoupled: gRPC: a request has any number of responses.
        keeps_streams: gRPC: calls of `ModelStreamInfer` stay open and carry one request after another. Without it, a
            request to a decoupled model is a call of its own.
        is_compressed: gRPC: the messages are, as the header `grpc-encoding` says.
        tls: encrypt the connection. `None` does not.
    """

    host: str
    port: int
    authority: str
    path: str
    headers: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    messages: tuple[bytes, ...] = dataclasses.field(repr=False)
    json_bytes: tuple[int, ...]
    timeout_ns: int
    protocol: str = "grpc"
    tls: TlsFiles | None = None
    sequences: SequencePlan | None = None
    decoupled: bool = False
    keeps_streams: bool = False
    is_compressed: bool = False


class Sink(Protocol):
    """Is called with every answer."""

    def completed(self, connection: Connection, latencies_ns: list[int], now_ns: int) -> int:
        """Requests ended well. Latency counts from each one's start stamp.

        Args:
            connection: the connection the requests used.
            latencies_ns: latency of each request in nanoseconds.
            now_ns: when the answers were read, by `time.monotonic_ns`.

        Returns:
            How many new requests the connection must send at once, without being told again.
        """

    def failed(self, connection: Connection, count: int, message: str, now_ns: int) -> int:
        """Requests ended in an error. Returns the same as `completed`.

        Args:
            connection: the connection the requests used.
            count: number of requests that ended.
            message: the one reason for all `count` of them, as the report shows it.
            now_ns: when the errors were noticed, by `time.monotonic_ns`.
        """

    def noted(self, name: str, values_ns: list[int], now_ns: int) -> None:
        """More was measured than whole requests: of sequences, or of single responses. See `Slice.details`."""

    def returned(self, starts_ns: list[int]) -> None:
        """Requests the server certainly did not begin must be sent elsewhere. Their start stamps."""

    def lost(self, connection: Connection, message: str, now_ns: int) -> None:
        """The connection is gone. Its open requests have been reported as failed before.

        Args:
            connection: the connection the requests used.
            message: the error's text, or the reason of the end.
            now_ns: when the loss was noticed, by `time.monotonic_ns`.
        """


class Connection(Protocol):
    """One TCP connection for requests."""

    in_flight: int
    usable: bool
    ready: bool

    def fileno(self) -> int:
        """Return the socket's file descriptor."""

    def free_slots(self) -> int:
        """Return how many more requests it can carry now."""

    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Put requests on the wire. Latency counts from `starts_ns`, or from the write when `None`."""

    def flush(self) -> None:
        """Write the submitted requests."""

    def on_readable(self) -> None:
        """Read and handle the server's bytes."""

    def expire(self, now_ns: int) -> None:
        """Fail the requests older than the time-out."""

    def close(self) -> None:
        """Close the socket. Tells nobody."""


def open_sockets(endpoint: Endpoint, count: int) -> list[Socket]:
    """Connect, all at the same moment, without Nagle's delay. The sockets are non-blocking.

    All of it, from the look-up of the name to the last TLS handshake, takes no longer than a request may, and at most
    `_CONNECT_S`.

    They start together because a server with several network threads gives a connection to an idle one. Connections
    made one after the other can all end up on its first thread.

    Raises:
        InputError: a TLS file cannot be used.
        ServerUnreachableError: refused, unknown host, or no answer in time.
    """
    opened: list[socket.socket] = []
    timer = Timer(min(_CONNECT_S, endpoint.timeout_ns / 1e9))
    try:
        family, address = _resolved(endpoint, timer)
        for _ in range(count):
            opened.append(socket.socket(family, socket.SOCK_STREAM))
            opened[-1].setblocking(False)
        for sock in opened:
            sock.connect_ex(address)
        for sock in opened:
            _finish_connecting(sock, timer)
    except OSError as exc:
        for sock in opened:
            sock.close()
        raise ServerUnreachableError(
            f"{endpoint.host}:{endpoint.port} cannot be reached: {exc.strerror or exc}",
            hint="Check the address and the port, and whether the server is running.",
        ) from exc
    if endpoint.tls is None:
        return list(opened)
    return _encrypted(opened, endpoint, endpoint.tls, timer)


def _resolved(endpoint: Endpoint, timer: Timer) -> tuple[int, Any]:
    """Return family and address of the server. Of several addresses, the first one to take a connection."""
    found = resolve(endpoint.host, endpoint.port, timer)
    for family, address in found[:-1]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(timer.left_s())
            if not probe.connect_ex(address):
                return family, address
    return found[-1]


def _finish_connecting(sock: socket.socket, timer: Timer) -> None:
    """Wait until a socket is connected.

    Raises:
        OSError: refused, or not in time.
    """
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    if not poller.poll(timer.left_s() * 1e3):
        raise TimeoutError("no answer in time")
    problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if problem:
        raise OSError(problem, os.strerror(problem))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _encrypted(opened: list[socket.socket], endpoint: Endpoint, files: TlsFiles, timer: Timer) -> list[Socket]:
    wrapped: list[Socket] = []
    for sock in opened:
        try:
            wrapped.append(wrap(sock, endpoint.host, files, endpoint.protocol, timer))
        except RepoManagerError:
            for other in (*wrapped, *opened[len(wrapped) :]):
                other.close()
            raise
    return wrapped


class TcpStream:
    """The sending half of a non-blocking socket: a queue of buffers, written without joining large ones."""

    def __init__(self, sock: Socket, want_write: WantWrite) -> None:
        self.sock = sock
        self._want_write = want_write
        self._waiting: list[bytes | memoryview] = []

    @property
    def blocked(self) -> bool:
        """Whether bytes wait for the socket to take more."""
        return bool(self._waiting)

    def write(self, buffers: list[bytes | memoryview], size_bytes: int) -> None:
        """Send the buffers now, or keep the rest the socket does not take.

        Raises:
            OSError: the peer is gone.
        """
        if self._waiting:
            self._waiting.extend(buffers)
            return
        if size_bytes < _JOIN_BELOW_BYTES:
            self.write_whole(b"".join(buffers))
            return
        self._waiting = buffers
        self._drain()
        if self._waiting:
            self._want_write(True)

    def write_whole(self, data: bytes) -> None:
        """Send one buffer now, or keep the rest the socket does not take.

        Raises:
            OSError: the peer is gone.
        """
        if self._waiting:
            self._waiting.append(data)
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._waiting = [memoryview(data)[sent:]]
            self._want_write(True)

    def on_writable(self) -> None:
        """Continue where the socket had been full.

        Raises:
            OSError: the peer is gone.
        """
        self._drain()
        if not self._waiting:
            self._want_write(False)

    def _drain(self) -> None:
        waiting, start = self._waiting, 0
        while start < len(waiting):
            try:
                sent = self.sock.sendmsg(waiting[start : start + _MAX_VECTORS])
            except BlockingIOError:
                break
            while sent > 0:
                size = len(waiting[start])
                if sent < size:
                    waiting[start] = memoryview(waiting[start])[sent:]
                    break
                sent -= size
                start += 1
        self._waiting = waiting[start:]
