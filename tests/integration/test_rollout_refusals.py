"""Servers that would refuse what a roll-out or its undo needs are refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.status import status
from repo_manager.server import EmbeddedServer, ServerOptions, TritonClient

pytestmark = pytest.mark.integration
POLICY = "version_policy { specific { versions: [1] } }\n"
StartServer = Callable[[ServerOptions], EmbeddedServer]
RESTRICTED = ("--grpc-restricted-protocol=model-config:admin-key=k", "--http-restricted-api=model-config:admin-key=k")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`m` with versions 1, 2 and a broken 3; 1 is served."""
    root = tmp_path / "models"
    root.mkdir()
    versions = {1: scaling_model(2.0), 2: scaling_model(3.0), 3: b"no model"}
    write_model(root, "m", SCALING_CONFIG + POLICY, versions)
    return root


def refused(repository: Path, client: TritonClient, version: int, text: str, *, dry_run: bool = False) -> None:
    """See that a deploy is refused, and changes nothing."""
    before = (repository / "m" / "config.pbtxt").stat().st_mtime_ns, client.versions("m")
    with pytest.raises(ServerRefusedError, match=text) as caught:
        deploy(repository, "m", version, client, options=RolloutOptions(dry_run=dry_run))
    assert "Nothing was changed" in caught.value.message
    assert ((repository / "m" / "config.pbtxt").stat().st_mtime_ns, client.versions("m")) == before


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_server_that_hides_configurations_is_unknown(
    repository: Path, start_server: StartServer, protocol: str, loaded: bool
) -> None:
    load = ("m",) if loaded else ()
    options = ServerOptions(repository=str(repository), load=load, auto_complete=False, extra_args=RESTRICTED)
    server = start_server(options)
    with TritonClient.connect(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        assert observe(client, "m").ready == ((1,) if loaded else ())
        for version in (1, 2, 3):
            refused(repository, client, version, "what it serves is unknown")
        (seen,) = status(repository, client, ("m",)).models
        assert seen.ready == ((1,) if loaded else ())
        assert any("unknown" in each for each in seen.drift) == loaded


@pytest.mark.parametrize("mode", ["none", "poll"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_server_that_is_not_in_explicit_mode_is_refused(
    repository: Path, start_server: StartServer, mode: str, dry_run: bool
) -> None:
    options = ServerOptions(
        repository=str(repository), load=(), auto_complete=False, extra_args=(f"--model-control-mode={mode}",)
    )
    with TritonClient.connect(start_server(options).grpc_url) as client:
        refused(repository, client, 2, "does not let models be loaded and unloaded", dry_run=dry_run)
        # What is served already is only asked.
        assert not deploy(repository, "m", 1, client).changed
