"""`status` of a release and of an InferenceService: pods, snapshot, versions, who set them, and differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, waiting
from support.triton_deployment import triton_deployment
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.cluster_status import cluster_status
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.targets.api import Api

TARGET = "k8s://models/rel"
QUICK = RolloutOptions(load_timeout_s=20.0)


def run(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["status", *arguments, "--repository", str(repository)])


def test_a_release_before_and_after_a_roll_out(deployed: FakeCluster, repository: Path, api: Api) -> None:
    (before,) = cluster_status(repository, TARGET, api).parts
    assert (before.url, before.models) == ("/models/repository", {"other": (1,), "scale": (1,)})
    (difference,) = cluster_status(repository, TARGET, api).differences
    assert "pods load the repository itself" in difference
    done = deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.settle()
    after = cluster_status(repository, TARGET, api)
    assert after.differences == ()
    (part,) = after.parts
    assert done.servers[0].snapshot is not None
    assert part.url == done.servers[0].snapshot.after
    assert part.owners == {"snapshot": "repo-manager", "replicas": "helm", "image": "helm"}
    assert (part.wanted, part.generation, part.observed) == (2, 2, 2)
    assert [(pod.ready, pod.url, pod.models) for pod in part.pods] == [(True, part.url, part.models)] * 2
    assert part.models == {"other": (1,), "scale": (2,)}


def test_pods_on_their_way_out_are_shown_and_are_no_difference(
    deployed: FakeCluster, repository: Path, api: Api
) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    found = cluster_status(repository, TARGET, api)
    assert found.differences == ()
    pods = found.parts[0].pods
    assert [(pod.ready, pod.ending, pod.note) for pod in pods] == [(False, True, "it is ending")] * 2 + [
        (True, False, "")
    ] * 2
    assert "2 of 2 ready" in " ".join(run(repository, "--to", TARGET).stdout.split())


def test_pods_that_do_not_become_ready_say_why(deployed: FakeCluster, repository: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.settle()
    deployed.behaviour = waiting("ImagePullBackOff", "no such image")
    deployment = deployed.deployment("models", "rel-triton")
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = "tritonserver:nope"
    deployment["metadata"]["generation"] += 1
    found = cluster_status(repository, TARGET, api)
    (part,) = found.parts
    new = [pod for pod in part.pods if not pod.ready]
    assert [pod.note for pod in new] == ["ImagePullBackOff no such image"]
    assert new[0].models == {}
    assert any("1 of 2 pods new" in each for each in found.differences)


def test_what_somebody_else_did_is_said(deployed: FakeCluster, repository: Path, api: Api) -> None:
    first = deploy(repository, "scale", 2, TARGET, options=QUICK)
    deploy(repository, "scale", 3, TARGET, options=QUICK)
    assert first.servers[0].snapshot is not None
    url = first.servers[0].snapshot.after
    env = deployed.deployment("models", "rel-triton")["spec"]["template"]["spec"]["containers"][0]["env"]
    env[0]["value"] = url  # `kubectl set env`, without a history
    said = " ".join(cluster_status(repository, TARGET, api).differences)
    assert "the last roll-out was of" in said
    assert "pods serve something else" in said, "what a pod serves is read from its own containers"


def test_a_snapshot_that_is_not_here_is_said_and_the_pods_are_shown(
    deployed: FakeCluster, tmp_path: Path, repository: Path, api: Api
) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.settle()
    (tmp_path / "elsewhere").mkdir()
    found = cluster_status(tmp_path / "elsewhere", TARGET, api)
    assert [pod.ready for pod in found.parts[0].pods] == [True, True]
    assert any("does not have it" in each for each in found.differences)


def test_two_deployments_that_serve_different_snapshots(deployed: FakeCluster, repository: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.add(triton_deployment("rel-triton-l4"))
    found = cluster_status(repository, TARGET, api)
    assert [part.name for part in found.parts] == ["rel-triton", "rel-triton-l4"]
    assert any("do not serve the same" in each for each in found.differences)


def service(uri: str) -> dict[str, Any]:
    meta = {"name": "scale", "namespace": "models"}
    model = {"modelFormat": {"name": "triton"}, "storageUri": uri}
    kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    return {**kind, "metadata": meta, "spec": {"predictor": {"model": model}}}


def test_an_inference_service(cluster: FakeCluster, repository: Path, api: Api) -> None:
    cluster.add(service("s3://bucket/models"))
    (part,) = cluster_status(repository, "kserve://models/scale", api).parts
    assert (part.kind, part.url, part.wanted, part.pods) == ("InferenceService", "s3://bucket/models", None, ())
    assert part.owners == {"snapshot": "helm"}


def test_the_command(deployed: FakeCluster, repository: Path) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.settle()
    shown = run(repository, "--to", TARGET)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert "2 of 2 ready" in text
    assert "snapshot repo-manager" in text
    assert "Everything is as it was rolled out" in text
    told = json.loads(run(repository, "--to", TARGET, "--json").stdout)
    assert told["clusters"][0]["parts"][0]["pods"][0]["models"] == {"other": [1], "scale": [2]}


def test_a_release_that_is_not_there(cluster: FakeCluster, repository: Path) -> None:
    done = run(repository, "--to", "k8s://models/none")
    assert isinstance(done.exception, ServerRefusedError)
    assert "neither a release nor a Deployment" in done.exception.message


def test_a_mistyped_release_is_not_called_forbidden_alone(deployed: FakeCluster, repository: Path, api: Api) -> None:
    deployed.refuse = lambda _method, path: (403, "deployments.apps is forbidden") if path.endswith("/rle") else None
    with pytest.raises(ServerRefusedError, match="has no release named rle") as caught:
        cluster_status(repository, "k8s://models/rle", api)
    assert "Check the name first" in str(caught.value.hint)


@pytest.mark.parametrize("target", ["k8s://models", "kserve://models"])
def test_a_target_that_cannot_be_read(repository: Path, target: str) -> None:
    done = run(repository, "--to", target)
    assert getattr(done.exception, "exit_code", 0) == 2
