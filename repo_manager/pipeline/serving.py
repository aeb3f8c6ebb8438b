"""`serve` in the foreground: the embedded server until it ends, its models repaired, its signatures checked."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import IO

from repo_manager.errors import RepoManagerError, RepositoryError, ServerError
from repo_manager.pipeline.serve_options import ServeOptions, server_options
from repo_manager.repository.configuration import settle_trial
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import Location
from repo_manager.repository.scan import scan
from repo_manager.repository.sealed_repository import SealedRepository
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_states
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.guard import StubGuard
from repo_manager.server.records import only_server, sealed_folder

__all__ = ["sealed_options", "serve_until_ended"]

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
    with contextlib.ExitStack() as stack:
        sealed = None
        if options.signed_by:
            with disk_errors("keep private copies of the models"):
                folder = stack.enter_context(sealed_folder(options.repository))
                sealed = SealedRepository.make(options.repository, options.signed_by, folder)
        _serve_again(options, sealed, on_ready, report, log_output)


def _serve_again(
    options: ServeOptions,
    sealed: SealedRepository | None,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> None:
    """Run one server after the other, until one ends that is not started again."""
    server = EmbeddedServer(sealed_options(options, sealed))
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
        server = server.successor(sealed_options(options, sealed))


def sealed_options(options: ServeOptions, sealed: SealedRepository | None) -> ServerOptions:
    """Return the server's options. Under the policy it reads copies of what keys vouch for.

    Args:
        options: repository, models, ports, policy and restarts.
        sealed: where the copies are. `None`: there is no policy.

    Raises:
        RepositoryError: a model that was named is not vouched for.
    """
    found = server_options(options)
    if sealed is None:
        return found
    refused = dict(found.refused)
    for name in found.load:
        try:
            sealed.refresh(name)
        except RepoManagerError as exc:
            if found.load == options.load:
                raise
            refused[name] = exc.message
    return dataclasses.replace(
        found,
        load=tuple(name for name in found.load if name not in refused),
        load_what_loads=found.load_what_loads or bool(refused),
        refused=refused,
        sealed=sealed.folder,
    )


def _serve_once(
    server: EmbeddedServer,
    options: ServeOptions,
    on_ready: Callable[[EmbeddedServer], None],
    report: Callable[[str], None],
    log_output: IO[str] | None,
) -> int:
    """Start one server, watch it until it ends, and return its exit code."""
    server.start(timeout_s=options.timeout_s)
    server.wait_ready(options.timeout_s)
    on_ready(server)
    guard = StubGuard(server.pid, server.http_url, server.client_options)
    checked = time.monotonic()
    with server.log_path.open(encoding="utf-8", errors="replace") as log:
        log.seek(0, os.SEEK_END)  # skip the start-up messages: the log file has them
        try:
            while (code := server.wait(_LOG_POLL_S)) is None:
                _copy_log(log, log_output)
                if time.monotonic() - checked >= _GUARD_S:
                    _mend(guard, report)
                    checked = time.monotonic()
        finally:  # also after Ctrl-C
            _copy_log(log, log_output)
    return code


def _mend(guard: StubGuard, report: Callable[[str], None]) -> None:
    try:
        for name in guard.check():
            report(f"{name}: its process had died; the model was unloaded and loaded again")
    except ServerError as exc:
        # The next round tries again. If the server itself has ended, the caller notices.
        report(f"A model whose process has died could not be loaded again: {exc.message}")


def _copy_log(log: IO[str], output: IO[str] | None) -> None:
    text = log.read()
    if text and output is not None:
        output.write(text)
        output.flush()
