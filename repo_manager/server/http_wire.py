"""HTTP requests to one server over kept connections, one a thread, by the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.server.answers import out_of_reach
from repo_manager.server.transport import ClientOptions, ServerUrl
from repo_manager.sockets import AnswerTooLargeError, TimedSocket, Timer, connect
from repo_manager.tls import tls_context

__all__ = ["HttpWire", "fetch_text"]

_CONNECT_S = 10.0
_HEADER_BYTES = 256 << 10
_FRAMING_BYTES = 1 << 20
"""Of a body: sizes of chunks and trailers, beside the content."""
_PIECE_BYTES = 1 << 20


class HttpWire:
    """Sends requests. Safe to share between threads.

    A request has one deadline, from the look-up of the host's name to the last byte of the answer, and its answer one
    limit on its size. No redirect is followed: only the named model server is asked.

    Args:
        endpoint: of the server. Its path, if it has one, comes before the path of each request.
        options: TLS, headers and deadlines of clients.

    Raises:
        UsageError: a certificate cannot be read.
    """

    def __init__(self, endpoint: ServerUrl, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._host, self._port = endpoint.host_and_port
        self._path = endpoint.path
        self._headers = options.all_headers("http")
        self._context = tls_context(options.tls) if endpoint.tls else None
        self._server_name = options.server_name or self._host
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        limit_bytes: int,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body of the answer.

        Args:
            method: HTTP method, such as `GET`.
            path: path and query of the request, from `/`. The endpoint's own path comes before it.
            body: body of the request. `None` for nothing.
            timeout_s: deadline of the call in seconds.
            headers: headers of this request, besides those of every request. `None`: no others.
            limit_bytes: largest accepted body in bytes.

        Raises:
            ServerUnreachableError: no answer within `timeout_s`, or no connection.
            ServerRefusedError: the answer is larger than `limit_bytes`.
        """
        timer = Timer(timeout_s)
        message = (method, path, body, {**self._headers, **(headers or {})})
        try:
            connection, kept = self._connection(timer)
            try:
                return self._exchange(connection, message, timer, limit_bytes)
            except (ConnectionError, http.client.BadStatusLine):
                # The server may have closed an idle connection, before it read this request.
                connection.close()
                if not kept:
                    raise
                connection, _ = self._connection(timer)
                return self._exchange(connection, message, timer, limit_bytes)
        except TimeoutError as exc:
            self._drop()
            raise ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:.3g} s: {path}") from exc
        except AnswerTooLargeError as exc:
            self._drop()
            raise ServerRefusedError(
                f"{self._endpoint} answers {path} with more than the {limit_bytes >> 20} MiB that are read of it",
                hint="Is it a Triton server?",
            ) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            self._drop()
            reason = str(exc)[:200] or type(exc).__name__
            raise out_of_reach(self._endpoint, path, reason) from exc
        except BaseException:
            self._drop()  # interrupted: later bytes do not answer the next request
            raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        message: tuple[str, str, bytes | None, Mapping[str, str]],
        timer: Timer,
        limit_bytes: int,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        method, path, body, headers = message
        sock = _socket_of(connection)
        if sock is None:
            raise ConnectionError("the connection is closed")
        sock.begin(timer)
        connection.request(method, self._path + path, body=body, headers=dict(headers))
        sock.allow(_HEADER_BYTES)
        answer = connection.getresponse()
        sock.allow(limit_bytes + _FRAMING_BYTES)
        return answer.status, answer.headers, _body(answer, limit_bytes)

    def _connection(self, timer: Timer) -> tuple[http.client.HTTPConnection, bool]:
        """Return this thread's connection, open, and whether it was open before."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(self._host, self._port)
            if self._context is not None:
                connection.default_port = 443  # the port left out of `Host`
            self._own.connection = connection
            with self._lock:
                self._all.append(connection)
        kept = _socket_of(connection) is not None
        if not kept:
            connection.sock = self._open(Timer(min(timer.left_s(), _CONNECT_S)))
        return connection, kept

    def _open(self, timer: Timer) -> TimedSocket:
        """Connect, and check the server's certificate."""
        sock = connect(self._host, self._port, timer)
        if self._context is None:
            return TimedSocket(sock)
        try:
            sock.settimeout(timer.left_s())
            return TimedSocket(self._context.wrap_socket(sock, server_hostname=self._server_name))
        except BaseException:
            sock.close()
            raise

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            for connection in self._all:
                with contextlib.suppress(OSError):
                    connection.close()
            self._all.clear()


def fetch_text(url: str, *, timeout_s: float, limit_bytes: int = 64 << 20) -> str:
    """Return the text of a page, asked for without a proxy: a model server's metrics.

    Args:
        url: whole URL of the page, for instance `http://host:port/metrics`.
        timeout_s: deadline of the call in seconds.
        limit_bytes: largest accepted size in bytes.

    Raises:
        ServerUnreachableError: no answer within `timeout_s`, or no connection.
        ServerRefusedError: a status other than 200, or more than `limit_bytes`.
        UsageError: the URL is not understood.
    """
    parts = urllib.parse.urlsplit(url)
    endpoint = ServerUrl.parse(urllib.parse.urlunsplit((parts.scheme, parts.netloc, "", "", "")))
    wire = HttpWire(endpoint, ClientOptions())
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    with contextlib.closing(wire):
        status, _, body = wire.request("GET", path, None, timeout_s, limit_bytes=limit_bytes)
    if status != 200:
        raise ServerRefusedError(f"{url} answers with HTTP status {status}")
    return body.decode("utf-8", "replace")


def _body(answer: http.client.HTTPResponse, limit_bytes: int) -> bytes:
    """Read a body in pieces, so no memory is taken for announced bytes that never come.

    Raises:
        AnswerTooLargeError: it is larger than `limit_bytes`.
        http.client.IncompleteRead: it ends before its announced length.
    """
    if answer.length is not None and answer.length > limit_bytes:
        raise AnswerTooLargeError
    pieces: list[bytes] = []
    size = 0
    while piece := answer.read(_PIECE_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > limit_bytes:
            raise AnswerTooLargeError
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(pieces)


def _socket_of(connection: http.client.HTTPConnection) -> TimedSocket | None:
    """Return the connection's socket. The type stubs know only the library's own."""
    found: Any = connection.sock
    return found if isinstance(found, TimedSocket) else None
