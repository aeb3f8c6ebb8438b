"""A load worker: its own process, with orders over a pipe, and slices of time as answers.

Started by `WorkerPool` with the number of an inherited socket. Messages, all pickled: in: `Job`, then `("start",
monotonic ns)`, then `("stop",)`. Out: `("ready",)` or `("error", text, hint)`, then `Slice`s, then `("done",)`. The
end of the pipe ends the process, so no worker outlives its parent.
"""

from __future__ import annotations

import gc
import multiprocessing.connection
import signal
import sys

from repo_manager.errors import RepoManagerError
from repo_manager.loadtest.worker.generator import Generator
from repo_manager.loadtest.worker.priority import fine_timers
from repo_manager.loadtest.worker.recorder import Recorder
from repo_manager.loadtest.worker.schedule import Job

__all__ = ["main", "serve"]

Pipe = multiprocessing.connection.Connection


def serve(pipe: Pipe) -> None:
    """Run jobs until the pipe ends."""
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        if isinstance(job, Job) and not _run(pipe, job):
            return


def _run(pipe: Pipe, job: Job) -> bool:
    """Run one job. False when the parent is gone."""
    alive = True

    def on_control() -> None:
        nonlocal alive
        try:
            pipe.recv()
        except (EOFError, ConnectionResetError):
            alive = False
            generator.is_abandoned = True
        generator.stopping = True

    recorder = Recorder(job.slice_ns, pipe.send)
    generator = Generator(job, recorder, (pipe.fileno(), on_control))
    try:
        generator.open()
    except RepoManagerError as exc:
        pipe.send(("error", exc.message, exc.hint))
        return True
    except OSError as exc:
        pipe.send(("error", f"a load worker cannot connect: {exc}", None))
        return True
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would count as latency, and nothing here makes cycles
    try:
        pipe.send(("ready",))
        message = pipe.recv()
        if message[0] == "start":
            generator.run(message[1])
        pipe.send(("done",))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return False
    finally:
        gc.enable()
    return alive


def main() -> int:
    """Serve the pipe whose file descriptor is the only argument."""
    # Ctrl-C reaches the whole process group. The parent decides: this process ends when the pipe closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fine_timers()
    with multiprocessing.connection.Connection(int(sys.argv[1])) as pipe:
        serve(pipe)
    return 0
