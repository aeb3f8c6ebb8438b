"""HTTP requests to one server over kept connections, one a thread, by the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from repo_manager.errors import ServerUnreachableError
from repo_manager.server.transport import ClientOptions, Endpoint, out_of_reach
from repo_manager.tls import tls_context

__all__ = ["HttpWire"]

_CONNECT_S = 10.0


class HttpWire:
    """Sends requests; safe to share between threads.

    Args:
        endpoint: of the server; its path, if it has one, comes before that of each request.
        options: TLS and headers.

    Raises:
        UsageError: a certificate cannot be read.
    """

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        parts = urlsplit(f"//{endpoint.address}")
        self._endpoint = endpoint
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._headers = options.all_headers("http")
        self._context = tls_context(options.tls) if endpoint.tls else None
        self._server_name = options.server_name
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body of the answer.

        Raises:
            ServerUnreachableError: no answer within `timeout_s`, or no connection.
        """
        deadline = time.monotonic() + timeout_s
        try:
            connection, kept = self._connection(timeout_s)
            try:
                return self._exchange(connection, (method, path, body, headers), deadline)
            except (ConnectionError, http.client.BadStatusLine):
                # The server may have closed a connection that lay idle: that is no answer to this request.
                connection.close()
                if not kept:
                    raise
                connection, _ = self._connection(timeout_s)
                return self._exchange(connection, (method, path, body, headers), deadline)
        except TimeoutError as exc:
            self._drop()
            raise ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:.3g} s: {path}") from exc
        except (OSError, http.client.HTTPException) as exc:
            self._drop()
            reason = str(exc) or type(exc).__name__
            raise out_of_reach(self._endpoint, path, reason) from exc
        except BaseException:
            self._drop()  # interrupted: what comes over this connection next is not an answer to the next request
            raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        message: tuple[str, str, bytes | None, Mapping[str, str] | None],
        deadline: float,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        method, path, body, headers = message
        connection.request(method, self._path + path, body=body, headers={**self._headers, **(headers or {})})
        _limit(connection, deadline - time.monotonic())
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def _connection(self, timeout_s: float) -> tuple[http.client.HTTPConnection, bool]:
        """Return this thread's connection, open, and whether it was open before."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._new()
            self._own.connection = connection
            with self._lock:
                self._all.append(connection)
        kept = _socket_of(connection) is not None
        if not kept:
            connection.timeout = min(timeout_s, _CONNECT_S)
            connection.connect()
        _limit(connection, timeout_s)
        return connection, kept

    def _new(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port)
        return _NamedConnection(self._host, self._port, self._context, self._server_name)

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


def _socket_of(connection: http.client.HTTPConnection) -> socket.socket | None:
    """Return the connection's socket; the type stubs do not know that there may be none."""
    found: socket.socket | None = connection.sock
    return found


def _limit(connection: http.client.HTTPConnection, seconds: float) -> None:
    found = _socket_of(connection)
    if found is not None:
        found.settimeout(max(0.001, seconds))


class _NamedConnection(http.client.HTTPSConnection):
    """A TLS connection whose certificate is checked against a name that may be another than the URL's host."""

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext, server_name: str | None) -> None:
        super().__init__(host, port, context=context)
        self._tls, self._server_name = context, server_name

    def connect(self) -> None:
        """Connect, and check the server's certificate."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name or self.host)
