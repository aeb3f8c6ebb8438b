"""Connections with one deadline over everything done on them, and a limit on their answers.

A socket's own time limit restarts with each arriving piece, so a peer with a byte a second never exceeds it. Here
every wait gets the time left.
"""

from __future__ import annotations

import io
import ipaddress
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    import ssl

__all__ = ["AnswerTooLargeError", "Deputies", "TimedSocket", "Timer", "connect", "resolve", "without_number"]

Result = TypeVar("Result")
Address = tuple[int, Any]
"""Family, and the address as `socket.connect` takes it."""

_SEND_BYTES = 1 << 20
_NUMBER = re.compile(r"\[Errno -?\d+\] ")


class AnswerTooLargeError(OSError):
    """A peer sends more than is read of it."""


def without_number(reason: str) -> str:
    """Return the words of a system error without its number: `[Errno 111] Connection refused`."""
    return _NUMBER.sub("", reason)


class Timer:
    """The moment by which everything together must be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Return how many seconds are left, more than 0.

        Raises:
            TimeoutError: none is.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class Deputies:
    """Threads for calls without a deadline of their own. One that is late is left behind.

    The look-up of a name takes no deadline, and gRPC keeps none while a peer floods it with frames. Waiting for a
    thread costs about 20 µs a call.
    """

    def __init__(self) -> None:
        self._idle: list[_Deputy] = []

    def call(self, act: Callable[[], Result], timeout_s: float) -> Result:
        """Call, and return the call's result.

        Raises:
            TimeoutError: it did not return in time. Its thread goes on, and nobody hears of it any more.
            Exception: any exception of the call.
        """
        try:
            deputy = self._idle.pop()
        except IndexError:
            deputy = _Deputy()
        result: Result = deputy.call(act, timeout_s)
        self._idle.append(deputy)
        return result

    def close(self) -> None:
        """End the waiting threads."""
        while self._idle:
            self._idle.pop().end()

    def __del__(self) -> None:
        self.close()


class _Deputy:
    """One thread, and the call it makes."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._asked, self._told), daemon=True).start()

    def call(self, act: Callable[[], Any], timeout_s: float) -> Any:
        self._asked.put(act)
        try:
            value, error = self._told.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        self._asked.put(None)


def _serve(
    asked: queue.SimpleQueue[Callable[[], Any] | None], told: queue.SimpleQueue[tuple[Any, Exception | None]]
) -> None:
    while (act := asked.get()) is not None:
        try:
            told.put((act(), None))
        except Exception as exc:  # noqa: BLE001 - the caller raises it
            told.put((None, exc))
        del act


_DEPUTIES = Deputies()


def resolve(host: str, port: int, timer: Timer) -> list[Address]:
    """Return the addresses of a host.

    The system's resolver takes no deadline, so names are looked up in a thread, left behind when it is late.

    Args:
        host: name or address of the server.
        port: TCP port, 1 to 65535.
        timer: deadline of the whole exchange.

    Raises:
        OSError: it has none. TimeoutError: not in time.
    """

    def look_up() -> list[Address]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]

    return look_up() if _is_address(host) else _DEPUTIES.call(look_up, timer.left_s())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def connect(host: str, port: int, timer: Timer) -> socket.socket:
    """Connect to the first address of a host to take a connection.

    Args:
        host: name or address of the server.
        port: TCP port, 1 to 65535.
        timer: deadline of the whole exchange.

    Raises:
        OSError: none does. TimeoutError: not in time.
    """
    last: OSError | None = None
    for family, address in resolve(host, port, timer):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timer.left_s())
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as exc:
            sock.close()
            last = exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last if last is not None else OSError(f"{host} has no address")


class TimedSocket:
    """A connected socket as `http.client` uses one, with one deadline and one limit for each exchange.

    Args:
        sock: a connected socket, plain or TLS. Each wait sets its time limit.
    """

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        self._sock = sock
        self._timer = Timer(0.0)
        self._room = 0

    def begin(self, timer: Timer) -> None:
        """Begin an exchange. Nothing is read before `allow` says how much."""
        self._timer, self._room = timer, 0

    def allow(self, size_bytes: int) -> None:
        """Let so many more bytes be read."""
        self._room = size_bytes

    def sendall(self, data: Any) -> None:
        """Send everything.

        Raises:
            TimeoutError: not in time.
            OSError: the peer is gone.
        """
        view = memoryview(data).cast("B")
        while len(view):
            self._sock.settimeout(self._timer.left_s())
            view = view[self._sock.send(view[:_SEND_BYTES]) :]

    def makefile(self, mode: str) -> BinaryIO:
        """Return a file reading from it."""
        return io.BufferedReader(_TimedFile(self, self._sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        """Close it. A file reading from it reads on."""
        self._sock.close()

    def before_read(self) -> None:
        """Give the next read the time left.

        Raises:
            TimeoutError: none is.
            AnswerTooLargeError: more was sent than is read.
        """
        if self._room <= 0:
            raise AnswerTooLargeError("the answer is too large")
        self._sock.settimeout(self._timer.left_s())

    def after_read(self, size_bytes: int) -> None:
        """Count the bytes received."""
        self._room -= size_bytes


class _TimedFile(io.RawIOBase):
    """The file `http.client` reads answers from."""

    def __init__(self, owner: TimedSocket, raw: Any) -> None:
        self._owner, self._raw = owner, raw

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the bytes present, at least one unless it has ended."""
        self._owner.before_read()
        count: int = self._raw.readinto(buffer) or 0
        self._owner.after_read(count)
        return count

    def close(self) -> None:
        """Let the socket go."""
        if not self.closed:
            self._raw.close()
        super().close()
