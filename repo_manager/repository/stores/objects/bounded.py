"""Requests of the store's library under a deadline and a limit on memory, both of which it lacks.

The library's own time limits do not cover its look-ups of credentials, and it reads a listing whole before it looks at
it. A request that runs as a coroutine can be called off at any moment: its connection is closed and its memory is
free. It is separate from `client.py` because it knows nothing of stores.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import http.client
import os
import resource
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from repo_manager.errors import RepositoryError
from repo_manager.repository.stores.objects.retry import TransientError
from repo_manager.sockets import AnswerTooLargeError, TimedSocket, Timer, connect
from repo_manager.tls import TlsFiles, tls_context

__all__ = ["check_first_answer", "run_within"]

R = TypeVar("R")

_MOST_GROWTH_BYTES = 256 << 20
"""How much this process may grow while one request of a listing or a record runs. A page of a listing has 1 MiB."""
_HEADER_BYTES = 256 << 10
_LOOK_S = 0.05
_STATM = Path("/proc/self/statm")


class _AnswerLoop(asyncio.SelectorEventLoop):
    """Knows which threads of the library are handing over an answer at this moment."""

    def __init__(self) -> None:
        super().__init__()
        self.handing_over: set[int] = set()

    def call_soon_threadsafe(  # type: ignore[override]  # its type needs TypeVarTuple, of Python 3.11
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        thread = threading.get_ident()
        self.handing_over.add(thread)
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        finally:
            self.handing_over.discard(thread)


class _Loop:
    """The event loop that requests run on, in a thread of its own, made when first used. A fork makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: _AnswerLoop | None = None
        atexit.register(self._wait_for_answers)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock, self._loop = threading.Lock(), None

    def _wait_for_answers(self) -> None:
        """Wait for threads that hand over an answer, a second at most.

        Such a thread gives the interpreter's lock away in between. Where Python ends at that moment the thread cannot
        take it back, and aborts the process (SIGABRT) although the command has succeeded.
        """
        end = time.monotonic() + 1.0
        while self._loop is not None and self._loop.handing_over and time.monotonic() < end:
            time.sleep(0.001)

    def submit(self, request: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        with self._lock:
            if self._loop is None:
                self._loop = _AnswerLoop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(request, self._loop)


_LOOP = _Loop()


def run_within(request: Coroutine[Any, Any, R], timeout_s: float) -> R:
    """Make a request, and call it off when it takes too long or too much memory.

    Args:
        request: the library's coroutine, not begun.
        timeout_s: for all of it.

    Raises:
        TransientError: no answer in time.
        RepositoryError: its answer has no end.
        Exception: any exception of the request.
    """
    future = _LOOP.submit(_watched(request, timeout_s))
    try:
        return future.result()
    finally:
        future.cancel()  # interrupted: nobody waits for it any more


async def _watched(request: Coroutine[Any, Any, R], timeout_s: float) -> R:
    task = asyncio.ensure_future(request)
    end, before = time.monotonic() + timeout_s, _resident_bytes()
    try:
        while True:
            await asyncio.wait({task}, timeout=max(0.0, min(_LOOK_S, end - time.monotonic())))
            if task.done():
                return task.result()
            if time.monotonic() >= end:
                raise TransientError(f"no answer within {timeout_s:.3g} s")
            if _resident_bytes() - before > _MOST_GROWTH_BYTES:
                raise RepositoryError(
                    f"the store's answer takes more than {_MOST_GROWTH_BYTES >> 20} MiB and was called off",
                    hint="Check the endpoint: a store answers a listing in pages of 1,000 names.",
                )
    finally:
        task.cancel()


def check_first_answer(endpoint: str, bucket: str, timeout_s: float) -> None:
    """Check that what answers at a store's address announces no body that the library would end this process for.

    It takes the memory that the length of a listing announces at once, and aborts where there is not as much. So the
    first question to an address that is not the vendor's own is ours: it shows no credentials, and whatever a store
    says to it, "forbidden" above all, is good. What else can be wrong is left to the library's own request.

    Args:
        endpoint: `http://host:port`, a path after it at most.
        bucket: of which a listing is asked.
        timeout_s: for all of it.

    Raises:
        RepositoryError: the announced length, or the header, is larger than any answer.
        TransientError: no answer in time.
    """
    url = urlsplit(endpoint)
    if url.hostname is None or set(getproxies_environment()) - {"no"}:
        return
    timer, port = Timer(timeout_s), url.port or {"https": 443}.get(url.scheme, 80)
    connection = http.client.HTTPConnection(url.hostname, port)
    try:
        with contextlib.closing(connection):
            sock = connect(url.hostname, port, timer)
            connection.sock = sock
            if url.scheme == "https":
                sock.settimeout(timer.left_s())
                sock = tls_context(TlsFiles()).wrap_socket(sock, server_hostname=url.hostname)
            timed = TimedSocket(sock)
            connection.sock = timed
            timed.begin(timer)
            connection.request("GET", f"{url.path.rstrip('/')}/{bucket}?list-type=2&max-keys=1")
            timed.allow(_HEADER_BYTES)
            announced = connection.getresponse().length or 0
    except TimeoutError:
        raise TransientError(f"no answer within {timeout_s:.3g} s") from None
    except AnswerTooLargeError:
        announced = _MOST_GROWTH_BYTES + 1
    except (OSError, ValueError, http.client.HTTPException):
        return
    if announced > _MOST_GROWTH_BYTES:
        raise RepositoryError(
            f"{endpoint} begins an answer of more than {_MOST_GROWTH_BYTES >> 20} MiB to a question about one name",
            hint="Check the endpoint and its port: a store answers a listing in pages of 1,000 names.",
        )


def _resident_bytes() -> int:
    """Return how much memory this process uses now."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
