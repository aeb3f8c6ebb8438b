"""A repository, and a fake API server with answers over real HTTP."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster, ServedCluster
from support.triton_deployment import publish_scaling, triton_deployment

from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.api import Api


@pytest.fixture(autouse=True)
def _lightkube() -> None:
    pytest.importorskip("lightkube", reason="needs the extra [k8s]")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish_scaling(folder / "repository", "scale", [2.0, 3.0, 4.0], folder)
    publish_scaling(folder / "repository", "other", [5.0], folder)
    return folder / "repository"


@pytest.fixture
def repository(tmp_path: Path, published: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "repository"))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    served = ServedCluster(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    yield served.cluster
    served.stop()


@pytest.fixture
def deployed(cluster: FakeCluster) -> FakeCluster:
    cluster.add(triton_deployment())
    return cluster


@pytest.fixture
def api(cluster: FakeCluster) -> Iterator[Api]:
    made = Api()
    yield made
    made.close()
