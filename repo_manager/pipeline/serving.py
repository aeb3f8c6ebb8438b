"""`serve` in the foreground: the embedded server until it ends, its models repaired, its signatures checked."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from repo_manager.errors import RepoManagerError, RepositoryError, ServerError
from repo_manager.pipeline.serve_options import ServeOptions, not_vouched_for, server_options
from repo_manager.repository.configuration import settle_trial
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.signing import check_served
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_states
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.guard import StubGuard
from repo_manager.server.records import only_server

__all__ = ["serve_until_ended"]

_LOG_POLL_S = 0.2
_GUARD_S = 1.0
_STEADY_S = 60.0
_MAX_RESTARTS = 5


def serve_until_ended(
    options: ServeOptions,
    *,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> None:
    """Run the embedded server in this process until it ends or this process is interrupted.

    A model whose stub process has died is unloaded and loaded again: Triton keeps it READY and answers every request
    with an error. With `restart`, a server ended on its own is started again on the same ports, at most
    `_MAX_RESTARTS` times in a row within a minute of each other.

    Args:
        options: repository, models, ports, policy and restarts.
        on_ready: called whenever a server is ready: once, and after each restart.
        report: called with a line for each repair.
        log_output: the server's log is copied there while it runs. `None` leaves it in its file.

    Raises:
        ServerError: it did not start, or ended on its own, with Triton's reason, or the repository is served already.
        KeyboardInterrupt: this process was interrupted. The server is stopped by then.
    """
    with only_server(options.repository):
        _settle_trials(options.repository, report)
        _serve(options, on_ready, report, log_output)


def _settle_trials(repository: Location, report: Callable[[str], None]) -> None:
    """Let a starting server serve the proven versions, where a roll-out was killed before its proof."""
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
    """Return under the policy model -> inodes and times of the files a load of it runs."""
    found: dict[str, list[object]] = {}
    for name in names if options.signed_by else ():
        with contextlib.suppress(RepoManagerError):
            versions = find_model(options.repository, name).selected
            checks = check_served(options.repository, name, versions, options.signed_by)
            found[name] = [(check.name, check.version, check.state) for check in checks]
    return found


def _drop_exchanged(server: EmbeddedServer, options: ServeOptions, before: Mapping[str, list[object]]) -> None:
    """Unload models changed between the check of their signature and the load.

    Raises:
        RepositoryError: a named model is not vouched for.
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
    """See under the policy a model may be loaded again.

    Raises:
        ServerError: no key vouches for its present files.
    """
    refused = not_vouched_for(options, [name]) if options.signed_by else {}
    if refused:
        raise ServerError(f"{name} stays unloaded: {refused[name]}")


def _mend(guard: StubGuard, report: Callable[[str], None]) -> None:
    try:
        for name in guard.check():
            report(f"{name}: its process had died; the model was unloaded and loaded again")
    except ServerError as exc:
        # The next round tries again. When the server itself has ended, the caller sees that.
        report(f"A model whose process has died could not be loaded again: {exc.message}")


def _copy_log(log: IO[str], output: IO[str] | None) -> None:
    text = log.read()
    if text and output is not None:
        output.write(text)
        output.flush()
