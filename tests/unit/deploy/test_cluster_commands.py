"""`--to k8s://` and `--to kserve://` on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster, ServedCluster
from support.triton_deployment import publish_scaling, triton_deployment
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import UsageError
from repo_manager.rollout.targets import api as cluster_api

pytest.importorskip("lightkube", reason="needs the extra [k8s]")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    served = ServedCluster(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    served.cluster.add(triton_deployment())
    predictor = {"model": {"modelFormat": {"name": "triton"}, "storageUri": "s3://bucket/models"}}
    meta = {"name": "scale", "namespace": "models"}
    kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    served.cluster.add({**kind, "metadata": meta, "spec": {"predictor": predictor}})
    yield served.cluster
    served.stop()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_scaling(tmp_path / "repository", "scale", [2.0, 3.0], tmp_path)
    return tmp_path / "repository"


def run(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--repository", str(repository)])


def test_a_dry_run_and_a_deployment(cluster: FakeCluster, repository: Path) -> None:
    planned = run(repository, "deploy", "scale:2", "--to", "k8s://models/rel", "--dry-run", "--json")
    assert json.loads(planned.stdout)["rollout"]["dry_run"] is True
    done = run(repository, "deploy", "scale:2", "--to", "k8s://models/rel", "--quiet")
    assert done.exit_code == 0, done.output
    assert "readiness only: no pod can be reached from here" in " ".join(done.stdout.split())
    assert "rel-triton" in done.stdout
    back = run(repository, "rollback", "scale", "--to", "k8s://models/rel", "--json", "--quiet")
    assert json.loads(back.stdout)["rollout"]["version"] == 1


def test_steps_of_a_canary_by_kserve(cluster: FakeCluster, repository: Path) -> None:
    to = ("--to", "kserve://models/scale")
    planned = run(repository, "deploy", "scale:2", *to, "--canary", "10%,50%,100%", "--dry-run", "--json")
    assert json.loads(planned.stdout)["rollout"]["trial"]["shares"] == [0.1, 0.5, 1.0]
    shown = run(repository, "deploy", "scale:2", *to, "--canary", "10%,50%,100%", "--dry-run")
    assert "10 %, 50 %, 100 %" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--to", "k8s://models/rel", "--canary", "10%,100%"), "not for k8s://models/rel"),
        (("--to", "kserve://models/scale", "--canary", "10%,100%", "--gate", "errors<2%"), "need servers that can be"),
        (("--to", "k8s://models/rel", "--to", "grpc://h:1"), "is a whole deployment"),
        (("--to", "k8s://models"), "k8s://NAMESPACE/RELEASE"),
    ],
)
def test_what_such_a_target_cannot_do(
    cluster: FakeCluster, repository: Path, arguments: tuple[str, ...], reason: str
) -> None:
    done = run(repository, "deploy", "scale:2", *arguments)
    assert isinstance(done.exception, UsageError)
    assert reason in str(done.exception)
    assert not [method for method, _, _ in cluster.requests if method != "GET"]
