"""Worker processes, as the parent sees them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import repo_manager
from repo_manager.errors import ServerError, ServerUnreachableError
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.loadtest.worker.schedule import Job

__all__ = ["WorkerPool", "default_workers"]

_START_DELAY_NS = 5_000_000
_EXIT_TIMEOUT_S = 5.0
# `-m` would let a file in the current folder replace any module imported by the worker.
_START = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    f"sys.path.append({str(Path(repo_manager.__file__).parents[1])!r}); "
    "from repo_manager.loadtest.worker.process import main; sys.exit(main())"
)


def default_workers() -> int:
    """Return how many workers suit this machine: a quarter of its CPUs, at least 1, at most 8."""
    return min(max(len(os.sched_getaffinity(0)) // 4, 1), 8)


class WorkerPool:
    """Starts worker processes once and runs any number of load levels on them."""

    def __init__(self, workers: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._running: set[int] = set()
        for _ in range(workers):
            self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        self._processes.append(process)
        self._pipes.append(multiprocessing.connection.Connection(ours.detach()))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._pipes)

    def begin(self, jobs: list[Job]) -> int:
        """Give each worker its job and start them all at one moment.

        Returns:
            The beginning of the load, in nanoseconds of the monotonic clock.

        Raises:
            ServerUnreachableError: a worker could not connect.
        """
        for pipe, job in zip(self._pipes, jobs, strict=True):
            pipe.send(job)
        problems = [answer for pipe in self._pipes if (answer := _received(pipe))[0] == "error"]
        if problems:
            raise ServerUnreachableError(problems[0][1], hint=problems[0][2])
        start_ns = time.monotonic_ns() + _START_DELAY_NS
        for pipe in self._pipes:
            pipe.send(("start", start_ns))
        self._running = set(range(len(self._pipes)))
        return start_ns

    def slices(self) -> Iterator[Slice]:
        """Yield merged slices in order, until every worker is done.

        The last slice is a partial one: the time between the last full slice and the last answer.
        """
        columns: list[list[Slice]] = [[] for _ in self._pipes]
        following = 0
        while self._running:
            pipes = {id(self._pipes[number]): number for number in self._running}
            for pipe in multiprocessing.connection.wait([self._pipes[number] for number in self._running], timeout=60):
                number = pipes[id(pipe)]
                message = _received(self._pipes[number])
                if isinstance(message, Slice):
                    columns[number].append(message)
                else:
                    self._running.discard(number)
            while all(len(column) > following for column in columns):
                yield Slice.merge([column[following] for column in columns])
                following += 1
        rest = [part for column in columns for part in column[following:]]
        if rest:
            yield Slice.merge(rest)

    def stop(self) -> None:
        """Tell the running workers to send nothing more and to finish."""
        for number in self._running:
            with contextlib.suppress(OSError):
                self._pipes[number].send(("stop",))

    def restart(self) -> None:
        """Replace all workers by new ones, after one of them failed."""
        workers = len(self._processes)
        self.close()
        for _ in range(workers):
            self._spawn()

    def close(self) -> None:
        """End the workers. Never leaves one behind."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            try:
                process.wait(_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._pipes, self._processes, self._running = [], [], set()


def _received(pipe: multiprocessing.connection.Connection) -> Any:
    """Receive one message of a worker.

    Raises:
        ServerError: the worker died.
    """
    try:
        message = pipe.recv()
    except (EOFError, OSError) as exc:
        raise ServerError(
            f"a load worker died: {exc or 'its pipe closed'}",
            hint="Its own message is on stderr; it may have been killed.",
        ) from exc
    return message
