"""The servers a declaration names, each connected to once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from repo_manager.optional import deferred
from repo_manager.repository.location import Location
from repo_manager.rollout.targets.urls import is_cluster, resolve_targets
from repo_manager.server.client import TritonClient
from repo_manager.server.records import running_server
from repo_manager.server.transport import ClientOptions

if TYPE_CHECKING:
    from repo_manager.rollout.targets import clusters
else:
    clusters = deferred("repo_manager.rollout.targets.clusters")

__all__ = ["EMBEDDED", "Servers"]

EMBEDDED = "embedded"
"""The target for the running `serve` of the repository. One is started where there is none."""


class Servers:
    """Clients by the texts of the declaration. Closes them at the end.

    Args:
        repository: the repository they serve. Its running `serve` is the target `embedded`.
        base: the folder of the YAML file, for `@FILE`.
        options: TLS, headers and deadlines of clients. `None`: those of the environment and the settings.
        start: starts the embedded server, and returns its URL. `None`: it is not started.
    """

    def __init__(
        self,
        repository: Location,
        base: Path,
        options: ClientOptions | None = None,
        start: Callable[[], str] | None = None,
    ) -> None:
        self._repository, self._base, self._options, self._start = repository, base, options, start
        self._clients: dict[str, TritonClient] = {}

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            client.close()

    def clients(self, targets: Sequence[str], *, start: bool = False) -> tuple[TritonClient, ...]:
        """Return a client for each server of some targets. Those in a cluster are left out.

        Args:
            targets: targets as the file declares them.
            start: start the embedded server where it is named and does not run, else it is left out.

        Raises:
            UsageError: a target cannot be understood.
            ServerUnreachableError: a name has no address.
            ServerError: the embedded server does not start.
        """
        found: dict[str, TritonClient] = {}
        others = [self._beside(text) for text in targets if text != EMBEDDED and not is_cluster(text)]
        if EMBEDDED in targets and (url := self._embedded(start)) is not None:
            found[url] = self._client(url, None)
        for target in resolve_targets(others) if others else ():
            options = self._options or ClientOptions()
            found[target.url] = self._client(target.url, target.options(options))
        return tuple(found.values())

    def clusters(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Return the targets in a cluster.

        Raises:
            UsageError: one cannot be understood.
        """
        found = tuple(dict.fromkeys(text for text in targets if is_cluster(text)))
        for text in found:
            clusters.parse_cluster(text)
        return found

    def held_by(self, cluster: str) -> Mapping[str, tuple[int, ...]]:
        """Return the served models of a target in a cluster, model -> versions.

        Raises:
            RepoManagerError: it is unknown.
        """
        with contextlib.closing(clusters.api_of(cluster)) as api:
            return clusters.served_models_of(self._repository, cluster, api)

    def running(self) -> tuple[TritonClient, ...]:
        """Return a client of the running `serve` of the repository, if there is one."""
        return self.clients((EMBEDDED,))

    def _embedded(self, start: bool) -> str | None:
        running = running_server(self._repository)
        if running is not None:
            return running.grpc_url
        return self._start() if start and self._start is not None else None

    def _client(self, url: str, options: ClientOptions | None) -> TritonClient:
        if url not in self._clients:
            self._clients[url] = TritonClient.connect(url, options)
        return self._clients[url]

    def _beside(self, text: str) -> str:
        return f"@{self._base / text[1:]}" if text.startswith("@") else text
