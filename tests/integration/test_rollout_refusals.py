"""A roll-out is refused in advance if the server would refuse one of its steps or its undo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.rollout.checks import CheckOutcome
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.observe import load_on_server, observe
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

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
    """Check that a deploy is refused and changes nothing."""
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
        assert any("unknown" in each for each in seen.differences) == loaded


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
        # A version already served only gets an inference.
        assert not deploy(repository, "m", 1, client).changed


WHOLE = """
platform: "ensemble"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling {
  step {
    model_name: "m" model_version: 1
    input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
  }
}
"""


def test_a_version_that_an_ensemble_pins_stays_unless_told(repository: Path, start_server: StartServer) -> None:
    write_model(repository, "whole", WHOLE, {})
    (repository / "whole" / "1").mkdir()
    server = start_server(ServerOptions(repository=str(repository), load=("whole",), auto_complete=False))
    with TritonClient.connect(server.grpc_url) as client:
        before = client.versions("m")
        (planned,) = deploy(repository, "m", 2, client, options=RolloutOptions(dry_run=True)).servers
        assert [check.outcome for check in planned.checks if check.name == "ensembles"] == [CheckOutcome.REFUSED]
        with pytest.raises(RepositoryError, match="m:1 would not be served any more, and whole needs it") as caught:
            deploy(repository, "m", 2, client)
        assert "--keep-previous" in str(caught.value.hint)
        assert client.versions("m") == before
        assert client.model_ready("whole")

        deploy(repository, "m", 2, client, options=RolloutOptions(keep_previous=True))
        assert observe(client, "m").ready == (1, 2)
        assert client.model_ready("whole")

        deploy(repository, "m", 2, client, options=RolloutOptions(drop_pinned=True))
        assert observe(client, "m").ready == (2,)
        assert not client.model_ready("whole")


def test_an_ensemble_that_does_not_fit_its_models_is_refused(repository: Path, start_server: StartServer) -> None:
    write_model(repository, "whole", WHOLE.replace("max_batch_size: 8", "max_batch_size: 16"), {})
    (repository / "whole" / "1").mkdir()
    server = start_server(ServerOptions(repository=str(repository), load=("m",), auto_complete=False))
    with TritonClient.connect(server.grpc_url) as client:
        with pytest.raises(RepositoryError, match="whole has max_batch_size 16, and its model 'm' takes 8 at most"):
            deploy(repository, "whole", 1, client)
        with pytest.raises(ServerRefusedError, match="allows maximum batch size 16"):
            client.load("whole")  # the server gives the same reason


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_model_of_several_repositories_is_refused(
    repository: Path, tmp_path: Path, start_server: StartServer, protocol: str
) -> None:
    twin = tmp_path / "twin"
    write_model(twin, "m", SCALING_CONFIG + POLICY, {1: scaling_model(5.0)})
    write_model(twin, "other", SCALING_CONFIG, {1: scaling_model(5.0)})
    extra = (f"--model-repository={twin}", "--model-namespacing=true")
    # Both models `m` are not loaded together: Triton 2.51 sometimes crashes when it does so.
    server = start_server(
        ServerOptions(repository=str(repository), load=("other",), auto_complete=False, extra_args=extra)
    )
    with TritonClient.connect(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        text = "lists m more than once"
        before = client.repository_index()
        for version in (1, 2, 3):
            refused(repository, client, version, text)
        assert client.repository_index() == before
        found = status(repository, client)
        assert (found.unreachable, found.strangers) == ({}, {client.url: ("other:1",)})
        (seen,) = status(repository, client, ("m",)).models
        assert any("several models of this name" in each for each in seen.differences)


def test_a_folder_that_a_server_cannot_read_is_explained(
    repository: Path, start_server: StartServer, tmp_path: Path
) -> None:
    """Triton only says "failed to poll". A server without a record here is treated as a remote one."""
    other = tmp_path / "other"
    write_model(other, "m", SCALING_CONFIG + POLICY, {1: scaling_model(2.0)})
    (other / "m" / "config.pbtxt").write_text(SCALING_CONFIG + "no_such_field: 1\n")
    remote = start_server(ServerOptions(repository=str(other), load=(), auto_complete=False, record=False))
    with TritonClient.connect(remote.grpc_url) as client:
        with pytest.raises(ServerRefusedError, match=r"failed to poll.* the server may read other files") as caught:
            load_on_server(client, repository, "m", 60.0)
        assert caught.value.reason.endswith("failed to poll from model repository")
        with pytest.raises(ServerRefusedError, match=r"failed to poll.*In .*other: .*no_such_field"):
            load_on_server(client, other, "m", 60.0)
