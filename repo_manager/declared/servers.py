"""The servers that a declaration names, each connected to once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from repo_manager.errors import UsageError
from repo_manager.repository import Location
from repo_manager.rollout.targets.urls import resolve_targets
from repo_manager.server import ClientOptions, TritonClient, running_server

__all__ = ["EMBEDDED", "Servers"]

EMBEDDED = "embedded"
"""The target that stands for the running `serve` of the repository; one is started where there is none."""


class Servers:
    """Clients by the texts of the declaration; closes them at the end.

    Args:
        repository: the repository that they serve.
        base: the folder of the YAML file, for `@FILE`.
        options: how to connect.
        start: starts the embedded server, and returns its URL; `None`: it is not started.
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
        """Return a client for each server of some targets.

        Args:
            targets: as declared.
            start: start the embedded server where it is named and does not run; else it is left out.

        Raises:
            UsageError: a target cannot be understood.
            ServerUnreachableError: a name has no address.
            ServerError: the embedded server does not start.
        """
        found: dict[str, TritonClient] = {}
        others = [self._beside(text) for text in targets if text != EMBEDDED]
        if EMBEDDED in targets and (url := self._embedded(start)) is not None:
            found[url] = self._client(url, None)
        for target in resolve_targets(others) if others else ():
            options = self._options or ClientOptions()
            found[target.url] = self._client(target.url, target.options(options))
        return tuple(found.values())

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
        if text.startswith(("k8s://", "kserve://")):
            raise UsageError(
                f"{text}: apply deploys to servers, not to a Kubernetes API",
                hint=f"Leave the target out, and run `repo-manager deploy NAME --to {text}` after apply.",
            )
        return f"@{self._base / text[1:]}" if text.startswith("@") else text
