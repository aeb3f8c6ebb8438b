"""`apply` with targets in a cluster: k8s:// among the targets of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.fake_cluster import FakeCluster, ServedCluster
from support.triton_deployment import publish_scaling, triton_deployment
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.repository.configuration import set_served_versions
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.template import url_of_pod

pytest.importorskip("lightkube", reason="needs the extra [k8s]")

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


def test_a_deployment_that_would_be_refused_is_not_planned(
    cluster: FakeCluster, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`apply` refuses the deployments `deploy` refuses. A check that planned one would promise too much."""
    cluster.deployment("models", "rel-triton")["spec"]["paused"] = True
    checked = run(repository, declared(), "--check")
    assert (checked.exit_code, "rel-triton is paused" in " ".join(checked.output.split())) == (5, True)
    del cluster.deployment("models", "rel-triton")["spec"]["paused"]
    tagged = declared().replace("serve: newest", "serve: newest\n    tags: {stable: newest}")
    (tmp_path / "key.pub").write_bytes(
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    monkeypatch.setenv("REPO_MANAGER_SIGNED_BY", str(tmp_path / "key.pub"))
    in_config = declared().replace(f"targets: [{json.dumps(RELEASE)}]", "targets: []")
    for text in (declared(), tagged, in_config):
        for flag in ("--check", "--dry-run"):
            checked = run(repository, text, flag)
            assert (checked.exit_code, "scale:2 is not signed" in " ".join(checked.output.split())) == (3, True), text
    assert not [method for method, _, _ in cluster.requests if method == "PATCH"]


def test_a_model_that_a_release_serves_is_not_pruned(cluster: FakeCluster, repository: Path) -> None:
    text = f"schema_version: 1\ntargets: [{RELEASE!r}]\nmodels: {{}}\n"
    done = run(repository, text, "--prune", "--dry-run")
    assert done.exit_code == 3, done.output
    assert f"{RELEASE} serves it" in " ".join(done.output.split())
