"""Real servers for the integration tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import running_server

from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' records, logs and backends out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty repository, served by the module's `server`."""
    return tmp_path_factory.mktemp("repository")


@pytest.fixture(scope="module")
def server(repository: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A real tritonserver on the module's repository; nothing is loaded.

    A module with complete configurations sets `AUTO_COMPLETE = False`: each load is a second faster.
    """
    auto_complete = getattr(request.module, "AUTO_COMPLETE", True)
    with running_server(ServerOptions(repository=str(repository), auto_complete=auto_complete)) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[TritonClient]:
    """A gRPC client of the module's server."""
    with TritonClient.connect(server.grpc_url) as connected:
        yield connected


@pytest.fixture(params=["grpc", "http"])
def any_client(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[TritonClient]:
    """A client of the module's server, over each protocol."""
    with TritonClient.connect(server.grpc_url if request.param == "grpc" else server.http_url) as connected:
        yield connected


@pytest.fixture
def start_server() -> Iterator[Callable[[ServerOptions], EmbeddedServer]]:
    """Start servers, and kill them at the test's end in any case."""
    with contextlib.ExitStack() as stack:
        yield lambda options: stack.enter_context(running_server(options))


class BothProtocols:
    """A client for gRPC and HTTP at once: it compares the answers of both."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._clients = [TritonClient.connect(url) for url in (server.grpc_url, server.http_url)]

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        first, second = (client.infer(*args, **kwargs) for client in self._clients)
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert array.dtype == second[name].dtype
            np.testing.assert_array_equal(array, second[name])
        return first

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def both(server: EmbeddedServer) -> Iterator[BothProtocols]:
    """A client over both protocols at once: one load of a model serves both."""
    connected = BothProtocols(server)
    yield connected
    connected.close()
