"""`apply` with targets in a cluster: k8s:// among the targets of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster, ServedCluster
from support.triton_deployment import publish_scaling, triton_deployment
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.repository.configuration import set_served_versions
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.template import url_of_pod

RELEASE = "k8s://models/rel"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    served = ServedCluster(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    served.cluster.add(triton_deployment())
    yield served.cluster
    served.stop()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_scaling(tmp_path / "repository", "scale", [2.0, 3.0], tmp_path)
    set_served_versions(tmp_path / "repository", "scale", (1,))
    return tmp_path / "repository"


def run(repository: Path, text: str, *arguments: str) -> Result:
    file = repository.parent / "repository.yaml"
    file.write_text(text, encoding="utf-8")
    return CliRunner().invoke(app, ["apply", str(file), "--repository", str(repository), *arguments])


def declared(target: str = RELEASE) -> str:
    return f"schema_version: 1\nmodels:\n  scale:\n    serve: newest\n    targets: [{json.dumps(target)}]\n"


def test_a_release_is_brought_to_the_declared_version_once(cluster: FakeCluster, repository: Path) -> None:
    planned = run(repository, declared(), "--check", "--json")
    assert planned.exit_code == 8, planned.output
    (step,) = json.loads(planned.stdout)["models"][0]["steps"]
    assert (step["action"], step["what"]) == ("deploy", f"version 2 on {RELEASE}")
    assert not [method for method, _, _ in cluster.requests if method == "PATCH"]
    done = run(repository, declared(), "--quiet")
    assert done.exit_code == 0, done.output
    (url,) = {url_of_pod(pod) for pod in cluster.pods}
    held = json.loads(
        (repository.parent / "repository.snapshots" / url.rpartition("/")[2] / "snapshot.json").read_text()
    )
    assert held["models"] == {"scale": [2]}
    again = run(repository, declared(), "--check")
    assert again.exit_code == 0, again.output


def test_what_apply_would_refuse_is_not_planned(cluster: FakeCluster, repository: Path) -> None:
    for target, reason in (("k8s://models", "k8s://NAMESPACE/RELEASE"), ("k8s://models/none", "neither a release")):
        checked = run(repository, declared(target), "--check")
        assert checked.exit_code not in (0, 8)
        assert reason in " ".join(checked.output.split())


def test_a_model_that_a_release_serves_is_not_pruned(cluster: FakeCluster, repository: Path) -> None:
    text = f"schema_version: 1\ntargets: [{RELEASE!r}]\nmodels: {{}}\n"
    done = run(repository, text, "--prune", "--dry-run")
    assert done.exit_code == 3, done.output
    assert f"{RELEASE} serves it" in " ".join(done.output.split())
