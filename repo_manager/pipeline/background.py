"""Servers in the background: the one a command talks to, how it is started and stopped, and its log."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from repo_manager.errors import ServerError, ServerUnreachableError, UsageError
from repo_manager.pipeline.serve_options import ServeOptions
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.server.client import TritonClient
from repo_manager.server.installation import find_triton
from repo_manager.server.paths import kept_files, log_directory
from repo_manager.server.records import (
    RunningServer,
    is_served,
    running_server,
    served_already,
    starting,
    was_served_from,
)
from repo_manager.settings import load_settings
from repo_manager.types import StrPath

__all__ = ["ServeTarget", "ensure_server", "follow_log", "handed_over", "log_of", "start_detached", "stop_running"]

_POLL_S = 0.05
_LOG_POLL_S = 0.2
_KILL_S = 5.0
_BEGINNING = 8 << 20  # characters: Triton names its repository within them in its log


@dataclasses.dataclass(frozen=True)
class ServeTarget:
    """A server to talk to.

    Attributes:
        url: the URL given, unchanged. Of a `serve`: `grpc://host:port`, or `http://` if gRPC asks for certificates.
        started: this command started it, and it goes on running.
        pid: of the embedded tritonserver. `None` for a server given by its URL.
        metrics_url: `http://host:port/metrics` of a `serve`. `None` for a server given by its URL.
    """

    url: str
    started: bool = False
    pid: int | None = None
    metrics_url: str | None = None


def ensure_server(
    repository: LocationLike, url: str | None, *, timeout_s: float, report: Callable[[str], None]
) -> ServeTarget:
    """Return the server a command with or without `--to` talks to.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        url: the server's URL. `None` takes the running `serve` of the repository, else starts one, left running in the
            background.
        timeout_s: how long a new server may take.
        report: called with a line for a started server.

    Raises:
        ServerError: no server could be started.
        MissingDependencyError: there is no tritonserver on this machine.
    """
    repository = as_location(repository)
    if url is not None:
        return ServeTarget(url)
    running = running_server(repository)
    started = False
    if running is None:
        with starting(repository, timeout_s):
            running = running_server(repository)  # another command may have started it in the meantime
            started = running is None
            if running is None:
                signed_by = load_settings().signed_by
                running = start_detached(ServeOptions(repository, timeout_s=timeout_s, signed_by=signed_by))
    if started:
        report(
            f"No server runs on {repository}: started one (pid {running.pid}, {running.grpc_url}, {running.http_url}). "
            f"Stop it with: repo-manager serve --stop --repository {repository}"
        )
        for name, reason in running.failures.items():
            report(f"{name} did not load: {reason}")
    return ServeTarget(running.control_url, started, running.pid, running.metrics_url)


def start_detached(options: ServeOptions) -> RunningServer:
    """Start `repo-manager serve` in the background and wait until it is ready.

    Raises:
        ServerError: it ended, or was not ready in time, with the end of its output, or the repository is served
            already.
        MissingDependencyError: there is no tritonserver on this machine.
    """
    find_triton()
    running = running_server(options.repository)
    if running is not None:
        raise served_already(options.repository, running)
    log = log_directory() / f"serve-{os.getpid()}-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "repo_manager", "serve", "--quiet", "--options-from-stdin"]
    command.append(f"--repository={options.repository.resolve()}")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    try:
        _hand_over(process, options)
        return _wait_for(process, options, log)
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _hand_over(process: subprocess.Popen[bytes], options: ServeOptions) -> None:
    """Give a server in the background its options, by a pipe: no other process reads the content of a header's
    file."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # its log shows why it ended
        pickle.dump(options, pipe)


def handed_over() -> ServeOptions:
    """Return this process's options from `start_detached`.

    Raises:
        UsageError: the process was not started so.
    """
    try:
        options = pickle.load(sys.stdin.buffer)  # written by our own process with the same code
    except (EOFError, pickle.UnpicklingError):
        options = None
    if not isinstance(options, ServeOptions):
        raise UsageError("--options-from-stdin is for `serve --detach`, which writes them")
    return options


def _wait_for(process: subprocess.Popen[bytes], options: ServeOptions, log: Path) -> RunningServer:
    """Wait for the record a ready server writes."""
    deadline = time.monotonic() + options.timeout_s
    while True:
        running = running_server(options.repository)
        if running is not None and running.owner == process.pid:
            with TritonClient.connect(running.control_url) as client:
                client.wait_ready(max(1.0, deadline - time.monotonic()))
            return running
        if process.poll() is not None:
            raise ServerError(_reason(log) or f"serve ended with code {process.returncode}", hint=f"Its log: {log}")
        if time.monotonic() > deadline:
            raise ServerUnreachableError(
                f"serve was not ready within {options.timeout_s:g} s; its output ends:\n{_tail(log)}",
                hint=f"Its log: {log}",
            )
        time.sleep(_POLL_S)


def stop_running(
    repository: LocationLike, *, timeout_s: float = 60.0, report: Callable[[str], None] = lambda _: None
) -> RunningServer | None:
    """Stop the running `serve` of a repository. Return it, or `None` when there was none.

    It is asked with SIGTERM. A server still running in the last quarter of `timeout_s`, or its last 5 s, is killed
    with all its processes.

    Args:
        repository: the repository of the `serve` to stop. Only this user's servers on this machine are found.
        timeout_s: until when it must be gone.
        report: called with a line when it was killed.

    Raises:
        ServerError: it still runs after `timeout_s`.
    """
    repository = as_location(repository)
    running = running_server(repository)
    if running is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    patience = timeout_s - min(_KILL_S, timeout_s / 4)
    kill_at: float | None = time.monotonic() + patience
    while (current := running_server(repository)) is not None and current.pid == running.pid:
        if time.monotonic() > deadline:
            raise ServerError(
                f"the server of {repository} (pid {running.pid}) still runs {timeout_s:g} s after it was asked to stop",
                hint=f"Look at its log, {running.log}; end it with: kill -9 {running.pid}",
            )
        if kill_at is not None and time.monotonic() >= kill_at:
            kill_at = None
            _kill(running)
            report(f"The server (pid {running.pid}) did not end within {patience:g} s of SIGTERM and was killed.")
        time.sleep(_POLL_S)
    return running


def _kill(running: RunningServer) -> None:
    """Kill a server's processes. Its `serve` ends first, so it starts no other one."""
    if running.owner and is_served(running.repository):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.owner, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)  # the supervisor made it the leader of its process group


def log_of(repository: LocationLike) -> Path:
    """Return the log of a repository's running embedded server, else of the last ended one.

    Raises:
        ServerError: none is kept.
    """
    repository = as_location(repository)
    running = running_server(repository)
    if running is not None:
        return running.log
    place = re.compile(rf"model_repository_path\[0\]\s*\|\s*({was_served_from(repository).pattern})\s*\|")
    for log in sorted(kept_files("logs", "tritonserver-*.log"), key=_written_at, reverse=True):
        with contextlib.suppress(FileNotFoundError), log.open(encoding="utf-8", errors="replace") as file:
            if place.search(file.read(_BEGINNING)):
                return log
    raise ServerError(
        f"No server runs on {repository}, and no log of an earlier one is kept",
        hint="Start one: repo-manager serve --detach. A remote server keeps its own log.",
    )


def _written_at(log: Path) -> float:
    """Return when a log was last written. 0 for one another command has just removed."""
    try:
        return log.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def follow_log(repository: LocationLike, log: StrPath, lines: int = 50) -> Iterator[str]:
    """Yield the last lines of a log, then each added line, until its server has ended.

    Args:
        repository: the server's repository. Its record on this machine says whether `log` still grows.
        log: path of the log file.
        lines: how many from the end. 0: all.
    """
    repository, log = as_location(repository), Path(log)
    with log.open(encoding="utf-8", errors="replace") as file:
        yield from file.read().splitlines(keepends=True)[-lines:]
        while True:
            running = running_server(repository)
            text = file.read()  # read after the check, so the last lines of an ended server are included
            if text:
                yield text
            if running is None or running.log != log:
                return
            time.sleep(_LOG_POLL_S)


def _reason(log: Path) -> str:
    """Return the error an ended `serve` printed, without its label, else the end of its output."""
    text = _tail(log)
    return text.rpartition("Error: ")[2].strip()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
