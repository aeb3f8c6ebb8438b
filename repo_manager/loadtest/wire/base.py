"""The state of an open connection of either protocol: its socket, its sink, and its end."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence

from repo_manager.loadtest.wire.connection import Endpoint, Sink, Socket, TcpStream, WantWrite
from repo_manager.loadtest.wire.sequences import Lane

__all__ = ["RECEIVE_BYTES", "WireConnection"]

RECEIVE_BYTES = 262_144


class WireConnection(abc.ABC):
    """Base of the two clients: socket, sink, and the end of everything open on it.

    Args:
        sock: connected socket in non-blocking mode.
        endpoint: address, path, headers and messages of the requests.
        sink: receives results and errors of requests.
        want_write: called when the socket must become writable.
    """

    def __init__(self, sock: Socket, endpoint: Endpoint, sink: Sink, want_write: WantWrite) -> None:
        self.in_flight = 0
        self.usable = True
        self.ready = False
        self._sock = sock
        self._sink = sink
        self._endpoint = endpoint
        self._timeout_ns = endpoint.timeout_ns
        self._stream = TcpStream(sock, want_write)

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._sock.fileno()

    def on_writable(self) -> None:
        """Continue a write the socket had not taken."""
        try:
            self._stream.on_writable()
        except OSError as exc:
            self._fail_all(f"the connection broke while sending: {exc}")

    def close(self) -> None:
        """Close the socket. Tells nobody."""
        self.usable = False
        self._sock.close()

    def _received_now(self) -> bytes | None:
        """Return the bytes received, or `None` without any or after the connection's end. The end is then dealt
        with."""
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError as exc:
            self._fail_all(f"the connection broke: {exc}")
            return None
        if not data:
            self._fail_all("the server closed the connection")
            return None
        return data

    def _forget_open(self) -> None:
        """Forget the open requests. A subclass drops its own state of them."""
        self.in_flight = 0

    def _fail_all(self, message: str) -> None:
        """Fail every open request and give the connection up."""
        now_ns = time.monotonic_ns()
        self.usable = False
        count = self.in_flight
        self._forget_open()
        if count:
            self._sink.failed(self, count, message, now_ns)
        self._sink.lost(self, message, now_ns)

    @abc.abstractmethod
    def take_lanes(self, lanes: list[Lane]) -> None:
        """Send the requests of these live sequences, one at a time of each."""

    @abc.abstractmethod
    def end_sequences(self) -> int:
        """Send the last request of every open sequence. Return the number of requests."""

    def end_streams(self) -> int:
        """End the streams kept open between requests. Returns how many the server has not ended yet."""
        return 0

    @abc.abstractmethod
    def free_slots(self) -> int:
        """Return how many more requests it can carry now."""

    @abc.abstractmethod
    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Put requests on the wire. See `Connection.submit`."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Write the submitted requests."""

    @abc.abstractmethod
    def on_readable(self) -> None:
        """Read and handle the server's bytes."""

    @abc.abstractmethod
    def expire(self, now_ns: int) -> None:
        """Fail the requests older than the time-out."""
