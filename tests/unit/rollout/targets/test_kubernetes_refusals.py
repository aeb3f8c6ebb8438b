"""Refusals of a roll-out on Kubernetes, and their words."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support import fake_cluster
from support.fake_cluster import FakeCluster, ServedCluster
from support.triton_deployment import triton_deployment

from repo_manager.errors import (
    MissingDependencyError,
    RepositoryError,
    ServerRefusedError,
    ServerUnreachableError,
    UsageError,
)
from repo_manager.rollout.calls import Deadline, OutOfTimeError
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.targets.api import Api

TARGET = "k8s://models/rel"
QUICK = RolloutOptions(load_timeout_s=20.0)


@pytest.mark.parametrize(("code", "hint"), [(403, "deployer"), (401, "kubeconfig")])
def test_refusals_name_the_next_step(deployed: FakeCluster, repository: Path, code: int, hint: str) -> None:
    deployed.refuse = lambda _method, _path: (code, "no")
    with pytest.raises(ServerRefusedError) as caught:
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert hint in str(caught.value.hint)
    assert "secret-token" not in str(caught.value)


def test_a_kind_that_the_cluster_does_not_know(
    cluster: FakeCluster, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cluster, "_PATHS", {})
    with pytest.raises(
        ServerRefusedError, match=r"read InferenceService models/digits: 404 page not found \(404\)"
    ) as caught:
        deploy(repository, "scale", 2, "kserve://models/digits", options=QUICK)
    assert "does not know the kind" in (caught.value.hint or "")


def test_a_release_that_is_not_there(cluster: FakeCluster, repository: Path) -> None:
    with pytest.raises(ServerRefusedError, match="neither a release nor a Deployment named rel"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_a_paused_deployment_is_refused_before_anything_is_done(deployed: FakeCluster, repository: Path) -> None:
    deployed.deployment("models", "rel-triton")["spec"]["paused"] = True
    with pytest.raises(ServerRefusedError, match="is paused"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert not (repository.parent / "repository.snapshots").exists()


def test_a_damaged_version_never_reaches_the_cluster(deployed: FakeCluster, repository: Path) -> None:
    (repository / "scale" / "2" / "model.onnx").write_bytes(b"other bytes")
    with pytest.raises(RepositoryError, match="damaged"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert deployed.requests == []


def test_an_unsigned_version_is_refused_where_signatures_are_wanted(
    deployed: FakeCluster, repository: Path, tmp_path: Path
) -> None:
    with pytest.raises(RepositoryError):
        deploy(repository, "scale", 2, TARGET, options=RolloutOptions(signed_by=(tmp_path / "no.pub",), dry_run=True))
    assert deployed.requests == []


def test_a_deployment_that_serves_no_repository_is_refused(cluster: FakeCluster, repository: Path) -> None:
    item = triton_deployment()
    item["spec"]["template"]["spec"]["containers"][0]["args"] = []
    cluster.add(item)
    with pytest.raises(ServerRefusedError, match="0 of its containers have a --model-repository"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_no_cluster(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="No Kubernetes cluster is configured"):
        deploy(repository, "scale", 2, TARGET)


def test_a_cluster_that_does_not_answer(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedCluster(tmp_path)
    served.stop()
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    with pytest.raises(ServerUnreachableError, match="gave no answer"):
        deploy(repository, "scale", 2, TARGET)


def test_a_call_cut_short_by_the_deadline_of_everything_says_so(deployed: FakeCluster, api: Api) -> None:
    ended = threading.Event()
    deployed.refuse = lambda _method, _path: ended.wait(30) and None
    deadline = Deadline(0.2)
    with api.within(deadline.remaining_s), pytest.raises(OutOfTimeError, match=r"0\.2 s of --timeout: The Kubernetes"):
        api.deployments("models", {})
    ended.set()


def test_without_the_extra_its_name_is_told(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightkube", None)
    with pytest.raises(MissingDependencyError) as caught:
        deploy(repository, "scale", 2, TARGET)
    assert "[k8s]" in str(caught.value.hint)
