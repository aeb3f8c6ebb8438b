"""Show the status as the command does: with the settings, and with the repository's own server.

It is separate from `deploying.py` because it needs nothing of the engine, and answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from repo_manager.errors import RepositoryError, ServerError, ServerUnreachableError
from repo_manager.pipeline.connection import connection_of
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.repository.scan import find_model, scan
from repo_manager.rollout.observe import observe
from repo_manager.rollout.status import RepositoryStatus
from repo_manager.rollout.status import status as status_of
from repo_manager.rollout.targets.urls import To
from repo_manager.server.client import TritonClient
from repo_manager.server.records import running_server
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import load_settings

__all__ = ["refuse_while_ready", "status", "watch_status"]


def refuse_while_ready(repository: LocationLike, name: str, version: int | None) -> None:
    """Check the repository's own running server, where there is one: it must not serve versions about to be removed.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model with the versions to remove.
        version: the version to remove. `None`: all, so none may be ready.

    Raises:
        RepositoryError: the server serves one of them.
    """
    running = running_server(as_location(repository))
    if running is None:
        return
    with (
        contextlib.suppress(ServerError),
        TritonClient.connect(running.http_url, ClientOptions(timeout_s=5.0)) as client,
    ):
        ready = [each for each in observe(client, name).ready if version in (None, each)]
        if ready:
            raise RepositoryError(
                f"in use: {name}:{', '.join(map(str, ready))} is ready on {client.url}",
                hint=f"First: repo-manager undeploy {name}" + (f":{version}" if version else ""),
            )


def status(
    repository: LocationLike,
    name: str | None = None,
    to: To | None = None,
    *,
    timeout_s: float = 10.0,
    connection: ClientOptions | None = None,
) -> RepositoryStatus:
    """Show the served state of servers, and its differences from the repository. Nothing is changed.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model. `None` for all deployed or loaded ones.
        to: connected clients or URLs. `None` takes the server of the settings, else the running `serve`.
        timeout_s: how long to wait for each answer.
        connection: how to connect to URLs, except for its own time. `None` takes the settings.

    Raises:
        RepositoryError: there is no such model.
        ServerUnreachableError: no server runs, or none answers.
    """
    repository = as_location(repository)
    if name is not None:
        find_model(repository, name)
    settings = load_settings()
    if not to:
        to = settings.server
    if to is None:
        running = running_server(repository)
        if running is None:
            scan(repository, deep=False)  # report a missing repository first
            raise ServerUnreachableError(
                f"No server runs on {repository}", hint="Start one: repo-manager serve, or use --to."
            )
        to = running.http_url
    how = dataclasses.replace(connection or connection_of(settings), timeout_s=timeout_s)
    return status_of(repository, to, (name,) if name else (), connection=how)


def watch_status(
    repository: LocationLike,
    name: str | None = None,
    to: To | None = None,
    *,
    interval_s: float = 2.0,
    timeout_s: float = 10.0,
    connection: ClientOptions | None = None,
) -> Iterator[RepositoryStatus | ServerError]:
    """Look at the status again and again, for ever. A server away for a moment ends nothing.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: name of the model. `None`: all models deployed or loaded.
        to: a server, a cluster target, or several. `None`: the running `serve`, or a new one.
        interval_s: pause in seconds between the end of a look and the next one.
        timeout_s: deadline of the call in seconds.
        connection: TLS, headers and deadlines of clients. `None`: those of the environment and the settings.

    Yields:
        The state seen, or the reason for none.

    Raises:
        RepositoryError: there is no such model.
    """
    while True:
        try:
            yield status(repository, name, to, timeout_s=timeout_s, connection=connection)
        except ServerError as exc:
            yield exc
        time.sleep(interval_s)
