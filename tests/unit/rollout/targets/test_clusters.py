"""Which cluster: contexts of the kubeconfig in targets, and one roll-out over releases in several clusters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.fake_cluster import FakeCluster, ServedCluster, ready, waiting
from support.kserve_controller import START, Controller
from support.python_models import write_python_model
from support.triton_deployment import triton_deployment
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import RolloutUndoneError, UsageError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.clusters import KINDS, cluster_kind_of
from repo_manager.rollout.targets.inference_service import InferenceService
from repo_manager.rollout.targets.release import Release
from repo_manager.rollout.targets.urls import CLUSTERS

EU, US = "k8s://models/rel?context=eu", "k8s://models/rel?context=arn:aws:eks:us-1:1:cluster/us"
QUICK = RolloutOptions(load_timeout_s=20.0)


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeCluster, FakeCluster]]:
    """Two clusters under the contexts of one kubeconfig, neither of them current."""
    served = []
    config = {"apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": []}
    for name in ("eu", "arn:aws:eks:us-1:1:cluster/us"):
        (tmp_path / str(len(served))).mkdir()
        served.append(ServedCluster(tmp_path / str(len(served))))
        own = yaml.safe_load(served[-1].kubeconfig.read_text())
        config["clusters"].append({**own["clusters"][0], "name": name})  # type: ignore[attr-defined]
        config["users"].append({**own["users"][0], "name": name})  # type: ignore[attr-defined]
        context = {"cluster": name, "user": name, "namespace": "default"}
        config["contexts"].append({"name": name, "context": context})  # type: ignore[attr-defined]
        served[-1].cluster.add(triton_deployment())
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    yield served[0].cluster, served[1].cluster
    for each in served:
        each.stop()


def url_of(cluster: FakeCluster) -> str:
    template = cluster.deployment("models", "rel-triton")["spec"]["template"]
    return str(template["spec"]["containers"][0]["env"][0]["value"])


def test_targets_name_their_context() -> None:
    assert Release.parse(US) == Release("models", "rel", "arn:aws:eks:us-1:1:cluster/us")
    assert str(Release.parse(US)) == US
    assert str(InferenceService.parse("kserve://m/x?context=eu")) == "kserve://m/x?context=eu"
    for wrong in ("k8s://m/x?context=", "k8s://m/x?ctx=eu", "k8s://m/x?context=a&b=c"):
        with pytest.raises(UsageError):
            Release.parse(wrong)


def test_one_of_several_clusters(clusters: tuple[FakeCluster, FakeCluster], repository: Path) -> None:
    eu, us = clusters
    done = deploy(repository, "scale", 2, US, options=QUICK)
    assert done.target == US
    assert done.servers[0].name == "rel-triton in arn:aws:eks:us-1:1:cluster/us"
    assert url_of(us).startswith("/models/repository.snapshots/")
    assert url_of(eu) == "/models/repository"
    assert eu.requests == []
    assert any("-> /models/repository.snapshots/" in event and "at http://127.0.0.1:" in event for event in done.events)


def test_releases_of_two_clusters_go_one_after_the_other(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    eu, us = clusters
    seen: list[str] = []
    us.on_patch = lambda item: seen.append(url_of(eu))
    done = deploy(repository, "scale", 2, (EU, US), options=QUICK)
    assert done.target == f"{EU}, {US}"
    assert url_of(eu) == url_of(us) == seen[0], "the second cluster begins when the first one serves"
    assert [server.name.partition(" in ")[2] for server in done.servers] == ["eu", "arn:aws:eks:us-1:1:cluster/us"]
    back = rollback(repository, "scale", (EU, US), options=QUICK)
    assert (back.version, url_of(eu)) == (1, url_of(us))


def test_a_failure_in_the_last_cluster_takes_all_back(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    eu, us = clusters
    broken = waiting("ImagePullBackOff", "no such image")
    us.behaviour = lambda *given: (ready if url_of(us) == "/models/repository" else broken)(*given)
    with pytest.raises(RolloutUndoneError, match="no such image"):
        deploy(repository, "scale", 2, (EU, US), options=QUICK)
    assert url_of(eu) == url_of(us) == "/models/repository"


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (("k8s://models/rel?context=asia",), "Context 'asia' not found"),
        (("k8s://models/rel",), "No Kubernetes cluster is configured"),
        ((EU, "grpc://h:1"), "is a whole deployment"),
        (("kserve://models/digits?context=eu", "http://h:1"), "is a whole deployment"),
    ],
)
def test_what_names_no_cluster_is_refused(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path, to: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        deploy(repository, "scale", 2, to, options=QUICK)
    assert not [request for cluster in clusters for request in cluster.requests if request[0] == "PATCH"]


EU_SERVICE, US_SERVICE = (each.replace("k8s://models/rel", "kserve://models/digits") for each in (EU, US))


def test_services_of_two_clusters_have_their_canaries_one_after_the_other(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    eu, us = (Controller(cluster) for cluster in clusters)
    seen: list[list[int]] = []
    after_first = clusters[1].on_patch
    clusters[1].on_patch = lambda item: (seen.append(list(eu.percents)), after_first(item))[1]
    trial = TrialOptions(steps=(0.1, 0.5, 1.0), step_s=0.01)
    done = deploy(repository, "scale", 2, (EU_SERVICE, US_SERVICE), options=QUICK, trial=trial)
    assert seen[0] == [10, 50], "the second cluster begins when the first one has held its steps"
    assert eu.percents == us.percents == [10, 50, 100]
    assert eu.uris[-1] == us.uris[-1] != START
    assert done.trial is not None
    assert [step.fraction for step in done.trial.steps] == [0.1, 0.5, 0.1, 0.5]
    assert [server.name for server in done.servers] == ["digits in eu", "digits in arn:aws:eks:us-1:1:cluster/us"]


def test_a_service_that_fails_takes_back_what_went_before_it(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    us = Controller(clusters[1])
    us.fails.add(deploy(repository, "scale", 2, US_SERVICE, options=dry(QUICK)).servers[0].snapshot.after[-16:])  # type: ignore[union-attr]
    with pytest.raises(RolloutUndoneError, match="failed to load all models"):
        deploy(repository, "scale", 2, (EU, US_SERVICE), options=QUICK)
    assert (url_of(clusters[0]), us.uris[-1]) == ("/models/repository", START)


def test_a_release_and_a_service_go_together_and_back(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    us = Controller(clusters[1])
    for version in (2, 3):
        done = deploy(repository, "scale", version, (EU, US_SERVICE), options=QUICK)
    assert done.target == f"{EU}, {US_SERVICE}"
    assert url_of(clusters[0])[-16:] == us.uris[-1][-16:]
    assert not deploy(repository, "scale", 3, (EU, US_SERVICE), options=QUICK).changed
    assert rollback(repository, "scale", (EU, US_SERVICE), options=QUICK).version == 2
    deploy(repository, "scale", 3, US_SERVICE, options=QUICK)
    assert deploy(repository, "scale", 3, (EU, US_SERVICE), options=QUICK).changed, "one of them has to change"


def test_what_comes_along_in_one_cluster_alone_is_recorded(
    clusters: tuple[FakeCluster, FakeCluster], repository: Path
) -> None:
    """The last of the clusters serves it already. This says nothing about the first."""
    write_python_model(repository, "opt")
    write_python_model(repository, "scale_py", kind="scale", versions=(1, 2))
    write_python_model(repository, "ens")
    config = repository / "ens" / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale_py" model_version: 1'))
    for name in ("opt", "scale_py", "ens"):
        adopt(repository, name)
    deploy(repository, "scale_py", 2, EU, options=QUICK)
    deploy(repository, "scale_py", 1, US, options=QUICK)
    done = deploy(repository, "ens", 1, (EU, US), options=QUICK)
    assert [server.snapshot.models["scale_py"] for server in done.servers if server.snapshot] == [(1, 2), (1,)]
    assert [each.version for each in model_state(repository, "scale_py").deployments] == [2, 1, 2]


def dry(options: RolloutOptions) -> RolloutOptions:
    return dataclasses.replace(options, dry_run=True)


def run(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--repository", str(repository)])


def test_the_commands_take_contexts(clusters: tuple[FakeCluster, FakeCluster], repository: Path) -> None:
    done = run(repository, "deploy", "scale:2", "--to", EU, "--to", US, "--quiet")
    assert done.exit_code == 0, done.output
    told = json.loads(run(repository, "status", "--to", EU, "--to", US, "--json").stdout)
    assert [each["target"] for each in told["clusters"]] == [EU, US]
    assert [each["cluster"].partition(" ")[2] for each in told["clusters"]] == [
        "(context eu)",
        "(context arn:aws:eks:us-1:1:cluster/us)",
    ]
    assert told["clusters"][0]["parts"][0]["models"] == {"other": [1], "scale": [2]}
    kept = run(repository, "gc", "--snapshots", "--to", US, "--older-than", "0s", "--json")
    assert json.loads(kept.stdout)["removed"] == []


def test_what_is_told_from_servers_is_what_has_a_kind() -> None:
    assert tuple(KINDS) == CLUSTERS
    for scheme, kind in KINDS.items():
        assert cluster_kind_of(kind.parse(f"{scheme}models/triton?context=east")) is kind
