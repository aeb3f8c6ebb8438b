"""A roll-out on Kubernetes whose repository is in object storage, and the snapshot served by the real tritonserver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster, ServedCluster
from support.object_stores import BUCKET, moto_server, s3_environment
from support.serving import running_server
from support.triton_deployment import publish_scaling, triton_deployment

from repo_manager.pipeline.snapshot import fetch
from repo_manager.repository.location import Location, parse_location
from repo_manager.repository.scan import find_model
from repo_manager.repository.stores.objects.client import open_client
from repo_manager.repository.transfer import copy_version
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with moto_server() as (host, port):
        for key, value in s3_environment().items():
            monkeypatch.setenv(key, value)
        yield f"s3://http://{host}:{port}/{BUCKET}/models"


@pytest.fixture
def repository(store: str, tmp_path: Path) -> Location:
    local, place = tmp_path / "repository", parse_location(store)
    for name, factors in (("scale", [2.0, 3.0]), ("other", [5.0])):
        publish_scaling(local, name, factors, tmp_path)
        for version in range(1, len(factors) + 1):
            copy_version(local, name, version, place)
    return place


@pytest.fixture
def cluster(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    served = ServedCluster(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    served.cluster.add(triton_deployment(url=store))
    yield served.cluster
    served.stop()


def test_the_snapshot_is_written_beside_the_repository_and_can_be_served(
    cluster: FakeCluster, repository: Location, tmp_path: Path
) -> None:
    target, options = "k8s://models/rel", RolloutOptions(load_timeout_s=30.0)
    rollout = deploy(repository, "scale", 2, target, options=options)
    change = rollout.servers[0].snapshot
    assert change is not None
    assert change.models == {"other": (1,), "scale": (2,)}
    place = parse_location(change.after)
    assert str(place).startswith(f"{repository}.snapshots/")
    assert [entry.version for entry in find_model(place, "scale").versions] == [2]
    found = open_client(place).get("snapshot.json")  # type: ignore[arg-type]
    assert found is not None
    assert json.loads(found[0])["models"] == {"other": [1], "scale": [2]}
    assert not deploy(repository, "scale", 2, target, options=options).changed
    options_of_server = ServerOptions(repository=change.after, load=("*",), auto_complete=False)
    with running_server(options_of_server) as server, TritonClient.connect(server.grpc_url) as client:
        assert client.model_ready("scale", 2)
        assert client.model_ready("other", 1)
        assert set(client.versions("scale")) == {2}
    for fetched in (True, False):
        with fetch(change.after, tmp_path / "warm") as here:
            assert (here.fetched, here.models) == (fetched, change.models)
    shutil.rmtree(here.folder / "scale")
    with fetch(change.after, tmp_path / "warm") as here:
        assert here.fetched
        assert (here.folder / "scale" / "2" / "model.onnx").is_file()
