"""Which server a command talks to: the one given, the running `serve` of the repository, or a new one."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from repo_manager.errors import (
    ConfigError,
    RepoManagerError,
    RepositoryError,
    ServerError,
    ServerUnreachableError,
    UsageError,
)
from repo_manager.repository import (
    Location,
    LocationLike,
    as_location,
    check_served,
    find_model,
    model_states,
    scan,
    settle_trial,
)
from repo_manager.repository.stores import open_store
from repo_manager.server import (
    EmbeddedServer,
    RunningServer,
    ServerOptions,
    ServerSettings,
    StubGuard,
    TritonClient,
    running_server,
)
from repo_manager.server.installation import find_triton
from repo_manager.server.paths import log_directory
from repo_manager.server.records import is_served, only_server, served_already, starting
from repo_manager.settings import load_settings
from repo_manager.types import StrPath
from repo_manager.validation import check_range

__all__ = [
    "ServeOptions",
    "ServeTarget",
    "deployed_models",
    "ensure_server",
    "follow_log",
    "handed_over",
    "log_of",
    "needs_auto_complete",
    "serve_until_ended",
    "server_options",
    "start_detached",
    "stop_running",
]


# What `serve` is asked for, and what that means for the embedded server of a repository.

_ALL, _DEPLOYED, _NONE = "all", "deployed", "none"


@dataclasses.dataclass(frozen=True)
class ServeOptions(ServerSettings):
    """Options of `serve`, besides the server's settings.

    Attributes:
        repository: the model repository.
        load: names of models to load at the start, or one of `all`, `deployed` (also when empty), `none`.
        timeout_s: how long the server may take to be ready.
        auto_complete: let Triton fill in what a config.pbtxt leaves out, at about a second a load; `None`: only
            where a model of the repository needs it.
        restart: start a server that ended by itself, with a failure, again.
        pass_env: names of environment variables that the server, and so the models' code, gets besides those it needs.
        signed_by: public keys one of which has to vouch for each version that is loaded; empty asks for no signature.
    """

    repository: Location
    load: tuple[str, ...] = ()
    timeout_s: float = 120.0
    auto_complete: bool | None = None
    restart: bool = False
    signed_by: tuple[Path, ...] = ()
    pass_env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.repository, str):
            object.__setattr__(self, "repository", as_location(self.repository))
        super().__post_init__()
        check_range("timeout_s", self.timeout_s)


def deployed_models(repository: Location) -> tuple[str, ...]:
    """Return the models whose last roll-out left a version in service, by name.

    Raises:
        RepositoryError: no such repository, or its state file is damaged.
    """
    states = model_states(repository)
    deployed = {name for name, state in states.items() if state.is_deployed}
    return tuple(entry.name for entry in scan(repository, deep=False) if entry.name in deployed)


def server_options(options: ServeOptions) -> ServerOptions:
    """Return the embedded server's options.

    Under the policy `signed_by`, models are left out that no key vouches for; they are in the server's failures.

    Raises:
        RepositoryError: a model that was named is not vouched for.
    """
    load: tuple[str, ...] = options.load
    deployed = load in ((), (_DEPLOYED,))
    if deployed:
        load = deployed_models(options.repository)
    elif load == (_ALL,):
        load = ("*",)
    elif load == (_NONE,):
        load = ()
    refused: dict[str, str] = {}
    if options.signed_by:
        if load == ("*",):
            load = tuple(entry.name for entry in scan(options.repository, deep=False))
        refused = _not_vouched_for(options, load)
        if refused and load == options.load:
            reasons = "; ".join(refused.values())
            raise RepositoryError(f"{reasons}", hint="Sign the version (repo-manager sign), or serve others.")
        load = tuple(name for name in load if name not in refused)
    return ServerOptions(
        repository=str(options.repository.resolve()),
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ServerSettings)},
        load=load,
        load_what_loads=deployed or bool(refused),
        refused=refused,
        environment={name: os.environ[name] for name in options.pass_env if name in os.environ},
        auto_complete=needs_auto_complete(options.repository)
        if options.auto_complete is None
        else options.auto_complete,
    )


def _not_vouched_for(options: ServeOptions, names: Sequence[str]) -> dict[str, str]:
    """Return model -> why, for those whose served versions no key vouches for."""
    refused = {}
    for name in names:
        try:
            check_served(options.repository, name, find_model(options.repository, name).selected, options.signed_by)
        except RepoManagerError as exc:
            refused[name] = exc.message
    return refused


def needs_auto_complete(repository: Location) -> bool:
    """Say whether any model's config.pbtxt leaves out what Triton would fill in: backend, inputs or outputs.

    What `add` writes is complete. A broken file counts as incomplete: the server will say what is wrong.
    """
    for model in scan(repository, deep=False):
        try:
            config = model.config()
        except ConfigError:
            return True
        if config is None:
            return True
        message = config.message()
        if not (message.backend and message.output and message.input):
            return True
    return False


_POLL_S = 0.05
_LOG_POLL_S = 0.2
_GUARD_S = 1.0
_STEADY_S = 60.0
_KILL_S = 5.0
_MAX_RESTARTS = 5


@dataclasses.dataclass(frozen=True)
class ServeTarget:
    """A server to talk to.

    Attributes:
        url: `grpc://host:port` or `http://host:port`.
        started: this command started it, and it goes on running.
        pid: of the embedded tritonserver; `None` for a server that was given by its URL.
        metrics_url: Triton's metrics, when known.
    """

    url: str
    started: bool = False
    pid: int | None = None
    metrics_url: str | None = None


def ensure_server(
    repository: LocationLike, url: str | None, *, timeout_s: float, report: Callable[[str], None]
) -> ServeTarget:
    """Return the server that a command with or without `--to` talks to.

    Args:
        repository: the model repository.
        url: the server's URL; `None` takes the running `serve` of the repository, else starts one, which goes on
            running in the background.
        timeout_s: how long a new server may take.
        report: told what was started.

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
            running = running_server(repository)  # another command may have started it by now
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


def serve_until_ended(
    options: ServeOptions,
    *,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> None:
    """Run the embedded server in this process until it ends or this process is interrupted.

    A model whose stub process has died is unloaded and loaded again: Triton keeps it READY and answers
    every request with an error. With `restart`, a server that ended by itself is started again on the
    same ports, at most `_MAX_RESTARTS` times in a row within a minute of each other.

    Args:
        options: what to serve, and where.
        on_ready: called whenever a server is ready: once, and after each restart.
        report: told what was mended.
        log_output: the server's log is copied there while it runs; `None` leaves it in its file.

    Raises:
        ServerError: it did not start, or ended by itself, with Triton's reason; or the repository is served already.
        KeyboardInterrupt: this process was interrupted; the server is stopped by then.
    """
    with only_server(options.repository):
        _settle_trials(options.repository, report)
        _serve(options, on_ready, report, log_output)


def _settle_trials(repository: Location, report: Callable[[str], None]) -> None:
    """Let a server that starts serve what was proven, where a roll-out was killed before its proof."""
    names = {entry.name for entry in scan(repository, deep=False)}
    for name, state in model_states(repository).items():
        if state.unproven is None or name not in names:
            continue
        try:
            with open_store(repository).lease(name, timeout_s=0.0):
                settle_trial(repository, name, report)
        except RepositoryError as exc:
            report(f"{name}:{state.unproven.version} is on trial: {exc.message}")


def _serve(
    options: ServeOptions,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> None:
    server = EmbeddedServer(server_options(options))
    restarts = 0
    while True:
        started = time.monotonic()
        try:
            code = _serve_once(server, options, on_ready, report, log_output)
        finally:
            server.stop()
        if code == 0:
            return
        restarts = restarts + 1 if time.monotonic() - started < _STEADY_S else 1
        if not options.restart or restarts > _MAX_RESTARTS:
            raise ServerError(
                f"tritonserver ended with code {code}; its log ends:\n{server.log_tail(10)}",
                hint=f"Its log: {server.log_path}",
            )
        report(f"tritonserver ended with code {code}; starting it again ({restarts} of {_MAX_RESTARTS})")
        server = server.successor(server_options(options))


def _serve_once(
    server: EmbeddedServer,
    options: ServeOptions,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> int:
    """Start one server, watch it until it ends, and return its exit code."""
    server.start(timeout_s=options.timeout_s)
    before = _vouched_for(options, server.options.load)
    server.wait_ready(options.timeout_s)
    _drop_exchanged(server, options, before)
    on_ready(server)
    guard = StubGuard(server.pid, server.http_url, server.client_options, lambda name: _require_vouched(options, name))
    checked = time.monotonic()
    with server.log_path.open(encoding="utf-8", errors="replace") as log:
        log.seek(0, os.SEEK_END)  # what it said while it started is in its file, and says little of a server that runs
        try:
            while (code := server.wait(_LOG_POLL_S)) is None:
                _copy_log(log, log_output)
                if time.monotonic() - checked >= _GUARD_S:
                    _mend(guard, report)
                    checked = time.monotonic()
        finally:  # after Ctrl-C, too
            _copy_log(log, log_output)
    return code


def _vouched_for(options: ServeOptions, names: Sequence[str]) -> dict[str, list[object]]:
    """Return under the policy model -> what the file system remembers of the files that a load of it runs."""
    found: dict[str, list[object]] = {}
    for name in names if options.signed_by else ():
        with contextlib.suppress(RepoManagerError):
            versions = find_model(options.repository, name).selected
            checks = check_served(options.repository, name, versions, options.signed_by)
            found[name] = [(check.name, check.version, check.state) for check in checks]
    return found


def _drop_exchanged(server: EmbeddedServer, options: ServeOptions, before: Mapping[str, list[object]]) -> None:
    """Unload what was changed between the check of its signature and the load.

    Raises:
        RepositoryError: a model that was named is not vouched for.
    """
    now = _vouched_for(options, server.options.load)
    odd = [name for name in server.options.load if options.signed_by and now.get(name) != before.get(name)]
    if not odd:
        return
    with TritonClient.connect(server.http_url, server.client_options) as client:
        for name in odd:
            client.unload(name)
            server.failures[name] = "it was changed between the check of its signature and the load"
    if server.options.load == options.load:
        raise RepositoryError(f"{', '.join(odd)}: changed between the check of the signature and the load")


def _require_vouched(options: ServeOptions, name: str) -> None:
    """See under the policy that a model may be loaded again.

    Raises:
        ServerError: no key vouches for what it is now.
    """
    refused = _not_vouched_for(options, [name]) if options.signed_by else {}
    if refused:
        raise ServerError(f"{name} stays unloaded: {refused[name]}")


def _mend(guard: StubGuard, report: Callable[[str], None]) -> None:
    try:
        for name in guard.check():
            report(f"{name}: its process had died; the model was unloaded and loaded again")
    except ServerError as exc:
        # The next round tries again; when the server itself has ended, the caller sees that.
        report(f"A model whose process has died could not be loaded again: {exc.message}")


def _copy_log(log: IO[str], output: IO[str] | None) -> None:
    text = log.read()
    if text and output is not None:
        output.write(text)
        output.flush()


def start_detached(options: ServeOptions) -> RunningServer:
    """Start `repo-manager serve` in the background and wait until it is ready.

    Raises:
        ServerError: it ended, or was not ready in time, with the end of its output; or the repository is served
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
    """Give a server in the background its options, by a pipe: nobody else reads what a header's file holds."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # what ended it is in its log
        pickle.dump(options, pipe)


def handed_over() -> ServeOptions:
    """Return the options that `start_detached` gave this process.

    Raises:
        UsageError: nobody did.
    """
    try:
        options = pickle.load(sys.stdin.buffer)  # from our own process, the same code
    except (EOFError, pickle.UnpicklingError):
        options = None
    if not isinstance(options, ServeOptions):
        raise UsageError("--options-from-stdin is for `serve --detach`, which writes them")
    return options


def _wait_for(process: subprocess.Popen[bytes], options: ServeOptions, log: Path) -> RunningServer:
    """Wait for the record that a ready server writes."""
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
    """Stop the running `serve` of a repository; return it, or `None` when there was none.

    It is asked with SIGTERM. One that does not end by the last quarter of `timeout_s`, or its last 5 s, is killed with
    all its processes.

    Args:
        repository: whose server it is.
        timeout_s: until when it has to be gone.
        report: told that it was killed.

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
    """Kill a server's processes; the `serve` that runs it is told to end, so that it starts no other one."""
    if running.owner and is_served(running.repository):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.owner, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)  # the supervisor makes it the leader of its group


def log_of(repository: LocationLike) -> Path:
    """Return the log of a repository's running embedded server, else of the last one that has ended.

    Raises:
        ServerError: none is kept.
    """
    repository = as_location(repository)
    running = running_server(repository)
    if running is not None:
        return running.log
    place = re.compile(rf"model_repository_path\[0\]\s*\|\s*{re.escape(str(repository.resolve()))}\s*\|")
    for log in sorted(log_directory().glob("tritonserver-*.log"), key=lambda path: path.stat().st_mtime, reverse=True):
        if place.search(log.read_text(encoding="utf-8", errors="replace")):
            return log
    raise ServerError(
        f"No server runs on {repository}, and no log of an earlier one is kept",
        hint="Start one: repo-manager serve --detach. A remote server keeps its own log.",
    )


def follow_log(repository: LocationLike, log: StrPath, lines: int = 50) -> Iterator[str]:
    """Yield the last lines of a log, then what is added to it, until its server has ended.

    Args:
        repository: whose server it is.
        log: its file.
        lines: how many from the end; 0: all.
    """
    repository, log = as_location(repository), Path(log)
    with log.open(encoding="utf-8", errors="replace") as file:
        yield from file.read().splitlines(keepends=True)[-lines:]
        while True:
            running = running_server(repository)
            text = file.read()  # after the look: what an ended server wrote last is read, too
            if text:
                yield text
            if running is None or running.log != log:
                return
            time.sleep(_LOG_POLL_S)


def _reason(log: Path) -> str:
    """Return the error that an ended `serve` printed, without its label; else the end of its output."""
    text = _tail(log)
    return text.rpartition("Error: ")[2].strip()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
