"""`repo-manager deploy --to k8s://` from the shell: the chart's Deployment, with real tritonservers as pods.

The API server and its Deployment controller are a fake (tests/support/fake_cluster.py). Each pod runs the real
tritonserver on the snapshot named in its environment, on an address of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, Object, ServedCluster, ready, waiting
from support.helm import render
from support.manifests import load_objects, of_kind

from repo_manager.errors import ServerError
from repo_manager.server.command import ServerOptions, free_ports
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Pods:
    """Makes each pod a real tritonserver."""

    def __init__(self, port: int) -> None:
        self.port, self.running = port, dict[str, EmbeddedServer]()

    def __call__(self, cluster: FakeCluster, deployment: Object, pod: Object) -> None:
        (container,) = pod["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        address = f"127.0.0.{10 + len(self.running)}"
        options = ServerOptions(
            repository=str(environment["MODEL_REPOSITORY"]),
            host=address,
            grpc_port=self.port,
            extra_args=tuple(arg for arg in container["args"] if arg.startswith("--load-model")),
            auto_complete=False,
            record=False,
        )
        server = EmbeddedServer(options)
        self.running[pod["metadata"]["name"]] = server
        try:
            server.start()
            server.wait_ready(60)
        except ServerError as exc:
            cluster.logs = str(exc)
            ended = {"reason": "Error", "exitCode": 1}
            waiting("CrashLoopBackOff", "back-off 10s", restarts=1, ended=ended)(cluster, deployment, pod)
            return
        ready(cluster, deployment, pod)
        pod["status"]["podIP"] = address

    def stop(self) -> None:
        for server in self.running.values():
            server.stop(deadline_s=2.0)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    shutil.copytree(Path(__file__).parents[2] / "model_repository", root)
    return root


@pytest.fixture
def cluster(tmp_path: Path, repository: Path) -> Iterator[FakeCluster]:
    (port,) = free_ports("127.0.0.1", 1)
    volume = {"source": {"persistentVolumeClaim": {"claimName": "models"}}, "mountPath": str(tmp_path)}
    values: dict[str, Any] = {
        "image": {"repository": "tritonserver", "tag": "26.07-py3"},
        "repository": {"url": str(repository), "volume": volume},
        "replicas": 1,
    }
    deployment = of_kind(load_objects(render(values)), "Deployment")[0]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    next(each for each in container["ports"] if each["name"] == "grpc")["containerPort"] = port
    served, pods = ServedCluster(tmp_path), Pods(port)
    served.cluster.add(deployment)
    served.cluster.behaviour = pods
    yield served.cluster
    served.stop()
    pods.stop()


def run(*arguments: str | Path, kubeconfig: Path, code: int = 0) -> dict[str, Any]:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    command = [sys.executable, "-m", "repo_manager.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def test_deploy_prove_go_back_and_a_snapshot_that_cannot_be_served(
    cluster: FakeCluster, repository: Path, tmp_path: Path
) -> None:
    kubeconfig, target = tmp_path / "kubeconfig", "k8s://models/rel"
    plan = run("deploy", "digits:2", "-r", repository, "--to", target, "--dry-run", kubeconfig=kubeconfig)
    assert plan["rollout"]["dry_run"]
    first = run("deploy", "digits:2", "-r", repository, "--to", target, kubeconfig=kubeconfig)["rollout"]
    assert first["servers"][0]["snapshot"]["after"] == plan["rollout"]["servers"][0]["snapshot"]["after"]
    (deployment,) = first["servers"]
    change = deployment["snapshot"]
    assert (deployment["proof"], change["models"]) == ("inference", {"digits": [2], "digits_int8": [1]})
    assert len(change["pods"]) == 1
    assert all(proof["latency_ns"] > 0 for proof in change["pods"])

    again = run("deploy", "digits:1", "-r", repository, "--to", target, kubeconfig=kubeconfig)["rollout"]
    assert again["changed"]
    back = run("rollback", "digits", "-r", repository, "--to", target, kubeconfig=kubeconfig)["rollout"]
    assert (back["version"], back["servers"][0]["snapshot"]["after"]) == (2, change["after"])

    # Beside it, a model whose version no server can load, though its manifest vouches for it.
    snapshots = repository.parent / f"{repository.name}.snapshots"
    broken = run("deploy", "digits:1", "-r", repository, "--to", target, "--dry-run", kubeconfig=kubeconfig)
    place = (
        snapshots
        / broken["rollout"]["servers"][0]["snapshot"]["after"].rpartition("/")[2]
        / "digits_int8"
        / "config.pbtxt"
    )
    place.write_text(place.read_text() + 'parameters { key: "x" }\nbroken\n')
    error = run("deploy", "digits:1", "-r", repository, "--to", target, kubeconfig=kubeconfig, code=5)["error"]
    assert "CrashLoopBackOff" in error["message"]
    assert "failed to load all models" in error["message"]
    assert "were put back" in error["message"]
    assert cluster.deployment("models", "rel-triton")["status"]["availableReplicas"] == 1
