"""Requests of the store's library under a deadline and a limit on memory, neither of which it has.

The library's own time limits do not cover its look-ups of credentials, and it reads a listing whole before it looks at
it. A request run as a coroutine can be called off at any moment: its connection is closed and its memory is free. It
also takes the memory an answer announces at once, and aborts the process where there is not as much. It is separate
from `client.py` because it knows nothing of stores.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextvars
import ctypes
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from repo_manager.errors import StoreUnreachableError
from repo_manager.repository.stores.objects.retry import TransientError

__all__ = ["outlive_aborts", "run_within"]

R = TypeVar("R")

_MOST_GROWTH_BYTES = 256 << 20
"""How much this process may grow while one request of a listing or a record runs. A page of a listing has 1 MiB."""
_LOOK_S = 0.05
_STATM = Path("/proc/self/statm")
_LIBRARY_THREADS = "tokio"


class _AnswerLoop(asyncio.SelectorEventLoop):
    """Knows the threads of the library busy handing over an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.handing_over: set[int] = set()

    def call_soon_threadsafe(  # type: ignore[override]  # its type needs TypeVarTuple (Python 3.11)
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
    """The event loop for requests, in a thread of its own, made when first used. A fork makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: _AnswerLoop | None = None
        atexit.register(self._wait_for_answers)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock, self._loop = threading.Lock(), None

    def _wait_for_answers(self) -> None:
        """Wait for threads busy handing over an answer, a second at most.

        Such a thread gives the interpreter's lock away in between. Where Python ends at this moment the thread cannot
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


class _AbortGuard:
    """Stops an aborting thread of the library, where the whole process would end otherwise.

    A handler in Python comes too late: the process is gone before the interpreter runs it. This one runs on the thread
    itself and does not return. Aborts of other threads end the process as ever.

    Attributes:
        stopped: a thread was stopped, so the library is of no use any more.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._handler: Any = None
        self._before: Any = None

    def install(self) -> None:
        if self._handler is None:
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._stop)
            self._before = self._set(ctypes.cast(self._handler, ctypes.c_void_p))

    def _stop(self, _: int) -> None:
        thread = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        if not thread.read_text(encoding="ascii", errors="replace").startswith(_LIBRARY_THREADS):
            self._set(self._before)
            return
        self.stopped.set()
        while True:
            threading.Event().wait()

    @staticmethod
    def _set(handler: Any) -> Any:
        change = ctypes.CDLL(None).signal
        change.restype, change.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        return change(signal.SIGABRT, handler)


_ABORTS = _AbortGuard()


def outlive_aborts() -> None:
    """From now on an answer the library aborts for is an error of its request, and of all later ones."""
    _ABORTS.install()


def run_within(request: Coroutine[Any, Any, R], timeout_s: float | None) -> R:
    """Make a request, and call it off when it takes too long or too much memory.

    Args:
        request: the library's coroutine, not begun.
        timeout_s: for all of it; `None`: neither its time nor its memory is limited.

    Raises:
        TransientError: no answer in time.
        StoreUnreachableError: its answer has no end.
        Exception: any exception of the request.
    """
    future = _LOOP.submit(_watched(request, timeout_s))
    try:
        return future.result()
    finally:
        future.cancel()  # after an interrupt, nothing waits for the result


async def _watched(request: Coroutine[Any, Any, R], timeout_s: float | None) -> R:
    task = asyncio.ensure_future(request)
    end, before = time.monotonic() + (math.inf if timeout_s is None else timeout_s), _resident_bytes()
    try:
        while True:
            await asyncio.wait({task}, timeout=max(0.0, min(_LOOK_S, end - time.monotonic())))
            if task.done():
                return task.result()
            if _ABORTS.stopped.is_set():
                raise StoreUnreachableError(
                    "the store announces an answer larger than the memory of this machine",
                    hint="Check the endpoint: a store answers a listing in pages of 1,000 names.",
                )
            if time.monotonic() >= end:
                raise TransientError(f"no answer within {timeout_s:.3g} s")
            if timeout_s is not None and _resident_bytes() - before > _MOST_GROWTH_BYTES:
                raise StoreUnreachableError(
                    f"the store's answer takes more than {_MOST_GROWTH_BYTES >> 20} MiB and was called off",
                    hint="Check the endpoint: a store answers a listing in pages of 1,000 names.",
                )
    finally:
        task.cancel()


def _resident_bytes() -> int:
    """Return how much memory this process uses now."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
