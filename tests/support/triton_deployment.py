"""A repository with a published model, and a Deployment of it, for tests of roll-outs on Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.serving import scaling_model

from repo_manager.repository.publish import publish
from repo_manager.triton_config.config import parse_config

CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
instance_group { count: 1 kind: KIND_CPU }
"""


def publish_scaling(repository: Path, name: str, factors: list[float], scratch: Path) -> None:
    """Publish one version per factor: `y = factor * x`."""
    for factor in factors:
        source = scratch / f"{name}-{factor}.onnx"
        source.write_bytes(scaling_model(factor).SerializeToString())
        config = parse_config(f'name: "{name}"\n{CONFIG}', where=name)
        publish(repository, name, {"model.onnx": source}, config, {"precision": "fp32"})


def triton_deployment(
    name: str = "rel-triton", *, release: str = "rel", url: str = "/models/repository"
) -> dict[str, Any]:
    """Return a Deployment as the chart makes it, with a gRPC port without a listener."""
    labels = {"app.kubernetes.io/name": "triton", "app.kubernetes.io/instance": release}
    labels |= {"app.kubernetes.io/component": "server", "repo-manager/kind": name}
    container = {
        "name": "triton",
        "image": "tritonserver:26.07-py3",
        "command": ["tritonserver"],
        "args": ["--model-repository=$(MODEL_REPOSITORY)", "--load-model=*"],
        "env": [{"name": "MODEL_REPOSITORY", "value": url}, {"name": "HOME", "value": "/tmp"}],
        "ports": [{"name": "grpc", "containerPort": 1}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": "models",
            "labels": labels,
            "annotations": {"repo-manager/snapshots": f"{url}.snapshots"},
        },
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": {"repo-manager/snapshot": url}},
                "spec": {"containers": [container]},
            },
        },
    }
