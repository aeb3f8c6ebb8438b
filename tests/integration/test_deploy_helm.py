"""The Helm chart: rendered by the real helm, held to schemas and rules of our own, its arguments run by Triton."""

from __future__ import annotations

import copy
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.command_lines import parse
from support.crds import check_custom
from support.fake_cluster import ServedCluster, merged
from support.helm import CHART, render, run_helm, upgrade
from support.helm_cluster import HelmCluster
from support.manifests import Object, load_objects, of_kind
from support.manifests_links import check_set
from support.promql import run_promtool
from support.serving import SCALING_CONFIG, running_server, scaling_model, write_model

from repo_manager.errors import ServerError
from repo_manager.pipeline.snapshot import fetch, snapshot
from repo_manager.repository.adopt import adopt
from repo_manager.rollout.targets.template import patch_for, read_template
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration

_BASE: dict[str, Any] = {
    "image": {"repository": "tritonserver", "tag": "26.07-py3"},
    "repository": {"url": "s3://bucket/models"},
}
_VOLUME = {"url": "/models/repository", "volume": {"source": {"persistentVolumeClaim": {"claimName": "models"}}}}
_GPU_KINDS = [
    {"name": "h100", "modelConfigName": "h100", "nodeSelector": {"nvidia.com/gpu.product": "H100"}, "gpus": 1},
    {
        "name": "l4",
        "modelConfigName": "l4",
        "nodeSelector": {"nvidia.com/gpu.product": "L4"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "gpus": 2,
        "replicas": 3,
    },
]
_DEPLOYER = {"create": True, "subjects": [{"kind": "ServiceAccount", "name": "ci", "namespace": "ci"}]}
_FULL: dict[str, Any] = {
    **_BASE,
    "repository": {"url": "s3://bucket/models", "s3": {"secretName": "s3", "region": "eu-central-1"}},
    "imagePullSecrets": [{"name": "pull"}],
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "runbookUrl": "https://runbooks.example.com/triton/",
        "objectives": {"digits": 0.05},
    },
    "deployer": _DEPLOYER,
    "podLabels": {"team": "vision"},
    "podAnnotations": {"note": "a"},
    "extraArgs": ["--log-verbose=1"],
    "extraEnv": [{"name": "TZ", "value": "UTC"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
}
_EXTERNAL = frozenset({"ConfigMap/keys", "Secret/s3", "Secret/pull", "PersistentVolumeClaim/models"})
_MATRIX: dict[str, dict[str, Any]] = {
    "smallest": _BASE,
    "everything": _FULL,
    "volume": {**_BASE, "repository": _VOLUME},
    "kinds": {**_BASE, "kinds": _GPU_KINDS, "autoscaling": {"enabled": True}, "deployer": _DEPLOYER},
    "kinds-fixed": {**_BASE, "kinds": _GPU_KINDS},
    "nothing-optional": {
        **_BASE,
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
    },
    "identity": {**_BASE, "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/m"}}},
    "digest": {**_BASE, "image": {"repository": "tritonserver", "digest": "sha256:" + "0" * 64}},
    "pinned": {**_BASE, "repository": {"url": "s3://bucket/models", "snapshot": "s3://bucket/models.snapshots/abc"}},
    "named-models": {**_BASE, "models": ["digits", "digits_int8"], "fullnameOverride": "vision"},
    "peers": {
        **_BASE,
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "apps"}}}],
            "monitoring": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9000, "protocol": "TCP"}]}],
        },
    },
}
_OWN_KINDS = [
    {
        **_GPU_KINDS[0],
        "image": {"tag": "26.08-py3"},
        "resources": {"limits": {"memory": "64Gi"}},
        "affinity": {"nodeAffinity": {}},
        "runtimeClassName": "nvidia",
        "autoscaling": {"by": "keda", "prometheus": "http://prometheus:9090", "maxReplicas": 20},
    },
    {**_GPU_KINDS[1], "autoscaling": {"enabled": False}, "podDisruptionBudget": {"maxUnavailable": "25%"}},
    {"name": "cpu", "podDisruptionBudget": {"enabled": False}},
]
_MATRIX["own-kinds"] = {**_BASE, "kinds": _OWN_KINDS, "autoscaling": {"enabled": True}, "deployer": _DEPLOYER}
_SNAPSHOT = {"url": "s3://bucket/models", "snapshot": "s3://bucket/models.snapshots/0123456789abcdef"}
_WARM: dict[str, Any] = {
    **_BASE,
    "repository": {**_SNAPSHOT, "s3": {"secretName": "s3", "region": "eu-central-1"}},
    "warmStart": {
        "enabled": True,
        "image": "repo-manager:0.1.0",
        "signedBy": {"configMap": "keys", "keys": ["release.pub"]},
    },
}
_MATRIX["warm"] = _WARM
# Not part of Kubernetes' own schemas.
_FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}


@pytest.fixture(scope="module")
def full() -> list[Object]:
    return load_objects(render(_FULL))


@pytest.mark.parametrize("case", _MATRIX)
def test_every_rendering_is_valid_and_hangs_together(case: str) -> None:
    objects = load_objects(render(_MATRIX[case]))
    for item in objects:
        if item["kind"] in _FOREIGN:
            check_custom(item)
        else:
            kubernetes_validate.validate(item, "1.37", strict=True)
    assert [str(finding) for finding in check_set(objects, external=_EXTERNAL)] == []
    assert len(of_kind(objects, "Deployment")) == len(_MATRIX[case].get("kinds", [1]))


@pytest.mark.parametrize("version", ["1.27", "1.31", "1.37"])
def test_supported_kubernetes_releases(full: list[Object], version: str) -> None:
    for item in full:
        if item["kind"] not in _FOREIGN:
            kubernetes_validate.validate(item, version, strict=True)


def test_the_schema_check_would_fail(full: list[Object]) -> None:
    broken = copy.deepcopy(of_kind(full, "Deployment")[0])
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullPolicyy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)
    with pytest.raises(kubernetes_validate.utils.SchemaNotFoundError):
        kubernetes_validate.validate({"apiVersion": "apps/v1", "kind": "Deploymint"}, "1.37", strict=True)


def test_lint() -> None:
    done = run_helm("lint", "--strict", str(CHART), values=_FULL)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": {"repository": "", "tag": "x"}}, "/image/repository"),
        ({"image": {"repository": "tritonserver"}}, "image.tag or image.digest is required"),
        (
            {"image": {"repository": "tritonserver", "tag": "latest"}},
            "image.tag is latest, which changes under running",
        ),
        ({"kinds": [{"name": "l4", "image": {"tag": "latest"}}]}, "image.tag is latest, which changes under running"),
        ({"kinds": [{"name": "l4", "resources": {"limit": {}}}]}, "/kinds/0/resources"),
        ({"autoscaling": {"enabled": True, "by": "keda"}}, "autoscaling.prometheus is required with autoscaling.by"),
        ({"autoscaling": {"enabled": True, "by": "vpa"}}, "/autoscaling/by"),
        ({"fullnameOverride": "9lives"}, '"9lives" cannot be the name of a Service'),
        ({"repository": {"url": ""}}, "/repository/url"),
        ({"repository": {"url": "/models/repository"}}, "/repository/volume/source"),
        ({"repository": {"url": "ftp://host/models"}}, "/repository/url"),
        ({"replica": 3}, "replica"),
        ({"models": ["*", "digits"]}, "/models"),
        (
            {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
            "autoscaling.maxReplicas (2) is below",
        ),
        ({"resources": {"limits": {"memory": "8 GB"}}}, "/resources/limits/memory"),
        ({"deployer": {"create": True}}, "deployer.subjects is required"),
        ({"runAsUser": 0}, "/runAsUser"),
        ({"warmStart": {"enabled": True}}, "warmStart.image is required with warmStart.enabled"),
        ({"warmStart": {"image": "repo-manager"}}, "/warmStart/image"),
        ({"warmStart": {"enabled": True, "image": "r:latest"}}, "warmStart.image is latest"),
        ({"warmStart": {"enabled": True, "image": "r:1"}}, "warmStart keeps snapshots, and none is pinned"),
        (
            {"warmStart": {"enabled": True, "image": "r:1", "signedBy": {"configMap": "keys"}}},
            "warmStart.signedBy.keys is empty",
        ),
        ({"replicas": 2.5}, "replicas is 2.5: expected a whole number, 0 or more"),
        ({"replicas": "two"}, "replicas is two: expected a whole number, 0 or more"),
        ({"kinds": [{"name": "l4", "replicas": -1}]}, 'kinds "l4": replicas is -1: expected a whole number, 0 or more'),
        ({"kinds": [{"name": "l4", "gpus": 0.5}]}, 'kinds "l4": gpus is 0.5: expected a whole number, 0 or more'),
        ({"autoscaling": {"minReplicas": 0}}, 'kinds "any": autoscaling.minReplicas is 0: expected a whole number, 1'),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "/podDisruptionBudget/maxUnavailable"),
        ({"kinds": [{"podDisruptionBudget": {"maxUnavailable": 0}}]}, "/kinds/0/podDisruptionBudget/maxUnavailable"),
        ({"kinds": [{"name": "H100_SXM"}]}, "/kinds/0/name"),
        ({"kinds": [{"name": "l4"}, {"name": "l4", "gpus": 1}]}, 'two of them are named "l4"'),
        ({"kinds": [{"name": ""}, {"name": "any", "gpus": 1}]}, 'two of them are named "any"'),
        ({"rollout": {"maxSurge": 0}}, "maxSurge and rollout.maxUnavailable are both 0"),
        ({"rollout": {"maxSurge": "0%", "maxUnavailable": 0}}, "maxSurge and rollout.maxUnavailable are both 0"),
        ({"rollout": {"maxUnavailable": -1}}, "/rollout/maxUnavailable"),
        ({"extraEnv": [{"name": "MODEL_REPOSITORY", "value": "/x"}]}, "extraEnv: MODEL_REPOSITORY is set by the chart"),
        ({"repository": {**_VOLUME, "requireSnapshot": True}}, "repository.snapshot is empty"),
        ({"repository": {**_VOLUME, "url": "/models"}}, "/models is not below volume.mountPath (/models/)"),
        ({"repository": {**_VOLUME, "url": "/data/models"}}, "/data/models is not below volume.mountPath"),
        ({"repository": {**_VOLUME, "snapshots": "/snapshots"}}, "/snapshots is not below volume.mountPath"),
    ],
)
def test_wrong_values_are_refused_with_the_value_named(change: dict[str, Any], reason: str) -> None:
    done = run_helm("template", "rel", str(CHART), values={**_BASE, **change})
    assert done.returncode != 0
    assert reason in done.stderr


def _deployment(objects: list[Object]) -> Object:
    return of_kind(objects, "Deployment")[0]


def _container(objects: list[Object]) -> Object:
    return _deployment(objects)["spec"]["template"]["spec"]["containers"][0]


def _only(objects: list[Object], kind: str, index: int = 0) -> Object:
    return of_kind(objects, kind)[index]


Mutation = Callable[[list[Object]], object]
_MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "selector": ("selector", lambda o: _deployment(o)["spec"]["selector"]["matchLabels"].update(a="b")),
    "selector-overlap": ("selector", lambda o: o.append(_second_deployment(o))),
    "service-selector": ("service", lambda o: _only(o, "Service")["spec"]["selector"].update(a="b")),
    "service-target": ("service", lambda o: _only(o, "Service")["spec"]["ports"][0].update(targetPort="web")),
    "service-port-twice": ("service", lambda o: _only(o, "Service")["spec"]["ports"][1].update(port=8000)),
    "service-name-twice": ("service", lambda o: _only(o, "Service")["spec"]["ports"][1].update(name="http")),
    "port-twice": ("names", lambda o: _container(o)["ports"][1].update(containerPort=8000)),
    "port-name-twice": ("names", lambda o: _container(o)["ports"][1].update(name="http")),
    "port-name-long": ("names", lambda o: _container(o)["ports"].append({"name": "x" * 16, "containerPort": 1})),
    "container-twice": ("names", lambda o: _pod(o)["containers"].append(copy.deepcopy(_container(o)))),
    "hpa-order": ("autoscaler", lambda o: _only(o, "HorizontalPodAutoscaler")["spec"].update(minReplicas=99)),
    "hpa-target": (
        "autoscaler",
        lambda o: _only(o, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="nobody"),
    ),
    "hpa-api": (
        "autoscaler",
        lambda o: _only(o, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(apiVersion="v1"),
    ),
    "hpa-and-replicas": ("autoscaler", lambda o: _deployment(o)["spec"].update(replicas=2)),
    "hpa-zero": (
        "autoscaler",
        lambda o: _only(o, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["target"].update(averageValue="0"),
    ),
    "pdb-both": ("budget", lambda o: _only(o, "PodDisruptionBudget")["spec"].update(minAvailable=1)),
    "pdb-none": ("budget", lambda o: _only(o, "PodDisruptionBudget")["spec"].pop("maxUnavailable")),
    "pdb-blocks": ("budget", lambda o: _only(o, "PodDisruptionBudget")["spec"].update(maxUnavailable=0)),
    "pdb-selector": (
        "budget",
        lambda o: _only(o, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    "pdb-second": ("budget", lambda o: o.append(_renamed(_only(o, "PodDisruptionBudget")))),
    "volume-missing": ("volumes", lambda o: _pod(o)["volumes"].pop()),
    "volume-unused": ("volumes", lambda o: _container(o)["volumeMounts"].pop()),
    "mount-twice": ("volumes", lambda o: _container(o)["volumeMounts"][1].update(mountPath="/tmp/")),
    "volume-twice": ("volumes", lambda o: _pod(o)["volumes"].append({"name": "shm", "emptyDir": {}})),
    "variable-twice": ("environment", lambda o: _container(o)["env"].append({"name": "HOME", "value": "/"})),
    "variable-missing": ("environment", lambda o: _container(o)["env"].pop(0)),
    "probe-port": ("probes", lambda o: _container(o)["readinessProbe"]["httpGet"].update(port="web")),
    "probe-timeout": ("probes", lambda o: _container(o)["readinessProbe"].update(timeoutSeconds=60)),
    "probe-startup": ("probes", lambda o: _container(o).pop("startupProbe")),
    "probe-deadline": ("probes", lambda o: _deployment(o)["spec"].update(progressDeadlineSeconds=600)),
    "quantity": ("resources", lambda o: _container(o)["resources"]["limits"].update(memory="8 GB")),
    "request-over-limit": ("resources", lambda o: _container(o)["resources"]["requests"].update(memory="9Gi")),
    "gpu-request": ("resources", lambda o: _container(o)["resources"]["requests"].update({"nvidia.com/gpu": 1})),
    "no-requests": ("resources", lambda o: _container(o)["resources"].pop("requests")),
    "shm": ("shared_memory", lambda o: _pod(o)["volumes"][1]["emptyDir"].update(sizeLimit="8Gi")),
    "root": ("security", lambda o: _pod(o)["securityContext"].update(runAsUser=0)),
    "root-allowed": ("security", lambda o: _pod(o)["securityContext"].pop("runAsNonRoot")),
    "writable": ("security", lambda o: _container(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    "capabilities": ("security", lambda o: _container(o)["securityContext"].pop("capabilities")),
    "seccomp": ("security", lambda o: _pod(o)["securityContext"].pop("seccompProfile")),
    "image-latest": ("images", lambda o: _container(o).update(image="host:5000/tritonserver:latest")),
    "image-untagged": ("images", lambda o: _container(o).update(image="host:5000/tritonserver")),
    "drain": ("drain", lambda o: _pod(o).update(terminationGracePeriodSeconds=30)),
    "unavailable": (
        "strategy",
        lambda o: _deployment(o)["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    ),
    "never-rolls": ("strategy", lambda o: _deployment(o)["spec"]["strategy"]["rollingUpdate"].update(maxSurge=0)),
    "min-ready": ("strategy", lambda o: _deployment(o)["spec"].update(minReadySeconds=5000)),
    "policy-port": ("policy", lambda o: _only(o, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0].update(port="web")),
    "policy-selector": (
        "policy",
        lambda o: _only(o, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].update(a="b"),
    ),
    "monitor-both": (
        "monitor",
        lambda o: _only(o, "ServiceMonitor")["spec"]["selector"]["matchLabels"].pop("repo-manager/service"),
    ),
    "monitor-port": ("monitor", lambda o: _only(o, "ServiceMonitor")["spec"]["endpoints"][0].update(port="web")),
    "binding": ("account", lambda o: _only(o, "RoleBinding")["roleRef"].update(name="nobody")),
    "subject": ("account", lambda o: _only(o, "RoleBinding")["subjects"][0].pop("namespace")),
    "nobody": ("account", lambda o: _only(o, "RoleBinding").update(subjects=[])),
    "wildcard": ("account", lambda o: _only(o, "Role")["rules"][0].update(verbs=["*"])),
    "secrets": ("account", lambda o: _only(o, "Role")["rules"][2].update(resources=["secrets"])),
    "list-by-name": ("account", lambda o: _only(o, "Role")["rules"][1]["verbs"].append("list")),
    "account": ("reference", lambda o: _pod(o).update(serviceAccountName="nobody")),
    "secret": ("reference", lambda o: _pod(o).update(imagePullSecrets=[{"name": "other"}])),
    "claim": (
        "reference",
        lambda o: _pod(o)["volumes"][0].update({"persistentVolumeClaim": {"claimName": "other"}}),
    ),
    "name": ("identity", lambda o: _deployment(o)["metadata"].update(name="Rel_Triton")),
    "label": ("identity", lambda o: _deployment(o)["metadata"]["labels"].update(a="not valid!")),
    "object-twice": ("identity", lambda o: o.append(copy.deepcopy(_deployment(o)))),
}


def _pod(objects: list[Object]) -> Object:
    return _deployment(objects)["spec"]["template"]["spec"]


def _renamed(item: Object) -> Object:
    twin = copy.deepcopy(item)
    twin["metadata"]["name"] += "-2"
    return twin


def _second_deployment(objects: list[Object]) -> Object:
    return _renamed(_deployment(objects))


@pytest.mark.parametrize("case", _MUTATIONS)
def test_each_rule_fails_a_manifest_that_breaks_it(full: list[Object], case: str) -> None:
    rule, mutate = _MUTATIONS[case]
    mutant = copy.deepcopy(full)
    mutate(mutant)
    assert rule in {finding.rule for finding in check_set(mutant, external=_EXTERNAL)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ServedCluster]:
    served = ServedCluster(tmp_path)
    yield served
    served.stop()


def _live(cluster: ServedCluster, values: dict[str, Any]) -> Object:
    """Put the chart's Deployment into the cluster, as an installation does."""
    deployment: Object = _deployment(load_objects(render(values)))
    cluster.cluster.frozen = True
    return cluster.cluster.add(deployment)


def _deploy(deployment: Object, snapshot: str) -> None:
    """Point it at a snapshot, as a roll-out does."""
    served = read_template(deployment)
    patch = patch_for(deployment, served, (snapshot, {"digits": (2,)}), before={})
    deployment["spec"] = merged(deployment["spec"], patch["spec"], strategic=True)


def _served(text: str) -> str:
    deployment = _deployment(load_objects(text))
    assert "annotations" not in deployment["spec"]["template"]["metadata"], "what pods load is said once"
    return read_template(deployment).url


def test_an_upgrade_keeps_what_was_rolled_out(cluster: ServedCluster) -> None:
    _deploy(_live(cluster, _BASE), "s3://bucket/models.snapshots/abc")
    text = upgrade({**_BASE, "replicas": 3}, cluster.kubeconfig)
    assert _served(text) == "s3://bucket/models.snapshots/abc"


def test_an_upgrade_keeps_what_was_rolled_out_to_a_warm_start(cluster: ServedCluster) -> None:
    _deploy(_live(cluster, _WARM), "s3://bucket/models.snapshots/abc")
    values = {**_WARM, "repository": {key: value for key, value in _WARM["repository"].items() if key != "snapshot"}}
    assert _served(upgrade(values, cluster.kubeconfig)) == "s3://bucket/models.snapshots/abc"


@pytest.mark.parametrize("rolled_out", [False, True])
def test_an_upgrade_to_another_repository_is_not_ignored(cluster: ServedCluster, rolled_out: bool) -> None:
    deployment = _live(cluster, _BASE)
    if rolled_out:
        _deploy(deployment, "s3://bucket/models.snapshots/abc")
    text = upgrade({**_BASE, "repository": {"url": "s3://other/models"}}, cluster.kubeconfig)
    assert _served(text) == "s3://other/models"


def test_a_rendering_that_pins_nothing_says_so(cluster: ServedCluster) -> None:
    assert "# WARNING: nothing is pinned" in render(_BASE)
    assert "WARNING" not in render(_MATRIX["pinned"])
    _deploy(_live(cluster, _BASE), "s3://bucket/models.snapshots/abc")
    assert "WARNING" not in upgrade(_BASE, cluster.kubeconfig)


def test_a_values_file_of_the_tool_pins_what_pods_serve(tmp_path: Path) -> None:
    write_model(tmp_path / "repository", "scale", SCALING_CONFIG, {1: scaling_model()})
    adopt(tmp_path / "repository")
    made = snapshot(tmp_path / "repository", mounted="/models/repository", values=tmp_path / "snapshot.yaml")
    required = {**_BASE, "repository": {"volume": _VOLUME["volume"], "requireSnapshot": True}}
    command = ("template", "rel", str(CHART), "--values", str(tmp_path / "snapshot.yaml"))
    done = run_helm(*command, values=required)
    assert done.returncode == 0, done.stderr
    assert _served(done.stdout) == f"/models/repository.snapshots/{made.pin.id}"


def test_turning_the_autoscaler_on_keeps_the_number_of_pods(cluster: ServedCluster) -> None:
    _live(cluster, {**_BASE, "replicas": 6})
    text = upgrade({**_BASE, "autoscaling": {"enabled": True}}, cluster.kubeconfig)
    assert _deployment(load_objects(text))["spec"]["replicas"] == 6
    assert "replicas" not in _deployment(load_objects(render({**_BASE, "autoscaling": {"enabled": True}})))["spec"]


def test_a_kind_without_a_gpu_to_spare_goes_down_by_one() -> None:
    kinds = [{**_GPU_KINDS[0], "rollout": {"maxSurge": 0, "maxUnavailable": 1}}, _GPU_KINDS[1]]
    tight, other = of_kind(load_objects(render({**_BASE, "kinds": kinds})), "Deployment")
    assert tight["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert other["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert tight["spec"]["minReadySeconds"] == other["spec"]["minReadySeconds"] == 10


def test_pods_are_spread_over_zones_and_reserve_the_disk_that_they_fill() -> None:
    pod = _deployment(load_objects(render(_BASE)))["spec"]["template"]["spec"]
    spread = pod["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert all(each["matchLabelKeys"] == ["pod-template-hash"] for each in spread)
    assert pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] == "10Gi"
    own = {**_BASE, "resources": {"requests": {"cpu": "1", "ephemeral-storage": "1Gi"}}}
    assert _container(load_objects(render(own)))["resources"]["requests"]["ephemeral-storage"] == "1Gi"
    for values in (_WARM, {**_BASE, "repository": _VOLUME}):
        requests = _container(load_objects(render(values)))["resources"]["requests"]
        assert "ephemeral-storage" not in requests, "nothing is downloaded into the pod"


def test_a_warm_start_lets_triton_read_what_a_sidecar_has_checked() -> None:
    pod = _deployment(load_objects(render(_WARM)))["spec"]["template"]["spec"]
    (sidecar,), (server,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always", "Kubernetes ends it after Triton, and starts it again when it ends"
    assert [*sidecar["command"], *sidecar["args"][:2]] == ["repo-manager", "fetch", "$(MODEL_REPOSITORY)", "/warm"]
    assert {"--hold", "--signed-by=/keys/release.pub"} <= set(sidecar["args"])
    mounts = [{each["name"]: each for each in container["volumeMounts"]} for container in (sidecar, server)]
    for volume in ("warm", "snapshot"):
        assert mounts[0][volume]["mountPath"] == mounts[1][volume]["mountPath"], "the link leads to the same place"
        assert (mounts[0][volume].get("readOnly"), mounts[1][volume]["readOnly"]) == (None, True)
    (link,) = (each.partition("=")[2] for each in sidecar["args"] if each.startswith("--link="))
    assert f"--model-repository={link}" in server["args"]
    assert sidecar["startupProbe"]["exec"]["command"] == ["test", "-e", f"{link}/snapshot.json"]
    names = [{each["name"] for each in container["env"]} for container in (sidecar, server)]
    assert "AWS_SECRET_ACCESS_KEY" in names[0]
    assert not names[1] & {"AWS_SECRET_ACCESS_KEY", "MODEL_REPOSITORY"}, "Triton needs no key of the object store"
    parse([*sidecar["command"][1:], *sidecar["args"]])


def test_what_a_kind_has_of_its_own_is_its_alone(tmp_path: Path) -> None:
    objects = load_objects(render(_MATRIX["own-kinds"]))
    large, fixed, plain = of_kind(objects, "Deployment")
    pods = [item["spec"]["template"]["spec"] for item in (large, fixed, plain)]
    assert [pod["containers"][0]["image"] for pod in pods] == [
        "tritonserver:26.08-py3",
        "tritonserver:26.07-py3",
        "tritonserver:26.07-py3",
    ]
    limits = [pod["containers"][0]["resources"]["limits"] for pod in pods]
    assert limits == [
        {"memory": "64Gi", "nvidia.com/gpu": 1},
        {"memory": "8Gi", "nvidia.com/gpu": 2},
        {"memory": "8Gi"},
    ]
    assert [(pod.get("runtimeClassName"), "affinity" in pod) for pod in pods] == [("nvidia", True)] + [
        (None, False)
    ] * 2
    assert [item["spec"].get("replicas") for item in (large, fixed, plain)] == [None, 3, None]
    budgets = [
        (each["metadata"]["name"], each["spec"]["maxUnavailable"]) for each in of_kind(objects, "PodDisruptionBudget")
    ]
    assert budgets == [(large["metadata"]["name"], 1), (fixed["metadata"]["name"], "25%")]
    (scaler,) = of_kind(objects, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == plain["metadata"]["name"]
    (scaled,) = of_kind(objects, "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == large["metadata"]["name"]
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (2, 20)
    _check_query(scaled["spec"]["triggers"][0], large["metadata"]["name"], tmp_path)


def _check_query(trigger: dict[str, Any], name: str, folder: Path) -> None:
    """Check KEDA's query: the queue time of the Deployment's own pods, and 0 without requests."""
    assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("Value", "0.02")
    series = [
        {"series": f'nv_inference_{metric}{{namespace="models",pod="{pod}"}}', "values": f"0+{step}x10"}
        for metric, pod, step in (
            ("queue_duration_us", f"{name}-5d9f7c6b8-x2x4z", 18_000_000),
            ("request_success", f"{name}-5d9f7c6b8-x2x4z", 600),
            ("queue_duration_us", "rel-triton-cpu-5d9f7c6b8-abcde", 99_000_000),
            ("request_success", "rel-triton-cpu-5d9f7c6b8-abcde", 600),
        )
    ]
    tests = []
    for given, value in ((series, 0.03), ([{**each, "values": "5x10"} for each in series], 0)):
        check = {
            "expr": trigger["metadata"]["query"],
            "eval_time": "5m",
            "exp_samples": [{"labels": "{}", "value": value}],
        }
        tests.append({"interval": "1m", "input_series": given, "promql_expr_test": [check]})
    (folder / "keda.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": tests}), encoding="utf-8")
    done = run_promtool("test", "rules", "keda.yaml", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_selector_that_cannot_be_changed_is_said_before_the_upgrade(cluster: ServedCluster) -> None:
    values = {**_BASE, "fullnameOverride": "vision"}
    _live(cluster, values)
    upgrade({**values, "replicas": 3}, cluster.kubeconfig)
    where = ("--namespace", "models", "--kubeconfig", str(cluster.kubeconfig))
    asked = ("--is-upgrade", "--dry-run=server", "--disable-openapi-validation")
    done = run_helm("template", "rel", str(CHART), *where, *asked, values={**values, "nameOverride": "other"})
    assert done.returncode != 0
    assert "Deployment vision selects its pods by" in done.stderr


def test_a_release_with_a_dot_gets_names_that_services_may_have() -> None:
    objects = load_objects(render(_BASE, release="rel.v2"))
    assert {item["metadata"]["name"] for item in of_kind(objects, "Service")} == {
        "rel-v2-triton",
        "rel-v2-triton-headless",
    }
    assert _deployment(objects)["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "rel.v2"


@pytest.mark.parametrize("url", ["s3://bucket/models", "gs://bucket/models", "as://account/container/models"])
def test_pods_reach_their_object_store_and_their_cloud_identity(url: str) -> None:
    objects = load_objects(render({**_BASE, "repository": {"url": url}}))
    egress = of_kind(objects, "NetworkPolicy")[0]["spec"]["egress"]
    assert {"ports": [{"port": 443, "protocol": "TCP"}]} in egress
    blocks = {peer["ipBlock"]["cidr"] for rule in egress for peer in rule.get("to", ()) if "ipBlock" in peer}
    assert {"169.254.170.23/32", "169.254.169.254/32"} <= blocks


def test_a_prometheus_of_another_namespace_may_scrape() -> None:
    objects = load_objects(render({**_BASE, "serviceMonitor": {"enabled": True}}))
    rules = of_kind(objects, "NetworkPolicy")[0]["spec"]["ingress"]
    (scrape,) = (rule for rule in rules if rule["ports"] == [{"port": "metrics", "protocol": "TCP"}])
    assert scrape["from"] == [{"namespaceSelector": {}}]


def test_the_alerts_of_the_chart_link_to_their_runbooks(full: list[Object], tmp_path: Path) -> None:
    spec = _only(full, "PrometheusRule")["spec"]
    alerts = [rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule]
    assert {rule["annotations"]["runbook_url"] for rule in alerts} == {
        f"https://runbooks.example.com/triton/{rule['alert']}.md" for rule in alerts
    }
    assert "{{ $labels.model }}" in alerts[0]["annotations"]["summary"], "helm leaves Prometheus' templates alone"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    done = run_promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", _MATRIX)
def test_no_pod_gets_a_token_of_the_api_server(case: str) -> None:
    for item in load_objects(render(_MATRIX[case])):
        if item["kind"] == "ServiceAccount":
            assert item["automountServiceAccountToken"] is False
        if item["kind"] == "Deployment":
            assert item["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.fixture(scope="module")
def arguments() -> list[str]:
    """The pods' own arguments, without those the embedded server sets itself."""
    given = _container(load_objects(render(_BASE)))["args"]
    ours = ("--model-repository", "--model-control-mode", "--strict-readiness")
    return [argument for argument in given if not argument.startswith(ours)]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "scale", SCALING_CONFIG, {1: scaling_model()})
    return tmp_path / "models"


def test_the_pods_arguments_and_probes_are_tritons(good: Path, arguments: list[str]) -> None:
    container = _container(load_objects(render(_BASE)))
    with running_server(ServerOptions(repository=str(good), extra_args=tuple(arguments))) as server:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = container[probe]["httpGet"]["path"]
            with urllib.request.urlopen(server.http_url + path, timeout=5) as answer:
                assert answer.status == 200
        with urllib.request.urlopen(server.metrics_url, timeout=5) as answer:
            assert b"nv_inference_request_summary_us" in answer.read()
        with TritonClient.connect(server.grpc_url) as client:
            assert client.model_ready("scale", 1), "--load-model=* loads what the repository holds"


def test_triton_serves_a_snapshot_through_the_sidecars_link(good: Path, tmp_path: Path, arguments: list[str]) -> None:
    adopt(good)
    pinned = snapshot(good).pin
    with fetch(pinned.url, tmp_path / "warm", link=tmp_path / "link"):
        options = ServerOptions(repository=str(tmp_path / "link"), extra_args=tuple(arguments))
        with running_server(options) as server, TritonClient.connect(server.grpc_url) as client:
            assert client.model_ready("scale", 1)


def test_a_pod_of_a_broken_snapshot_ends_and_never_becomes_ready(good: Path, arguments: list[str]) -> None:
    write_model(good, "broken", SCALING_CONFIG, {1: b"no model"})
    server = EmbeddedServer(ServerOptions(repository=str(good), extra_args=tuple(arguments)))
    try:
        with pytest.raises(ServerError, match="failed to load all models"):
            server.start()
    finally:
        server.stop(deadline_s=2.0)


@pytest.fixture
def helmed(tmp_path: Path) -> Iterator[HelmCluster]:
    served = HelmCluster(tmp_path)
    yield served
    served.stop()


@pytest.mark.parametrize("on_the_server", [True, False], ids=["helm 4", "as helm 3"])
def test_a_helm_rollback_after_a_roll_out(helmed: HelmCluster, on_the_server: bool) -> None:
    """helm 4 applies on the server and conflicts over the snapshot; helm 3 merges itself and takes the model back."""
    where = ("--namespace", "models", "--kubeconfig", str(helmed.kubeconfig))
    how = (*where, f"--server-side={str(on_the_server).lower()}")
    values = {**_BASE, **{key: {"enabled": False} for key in ("podDisruptionBudget", "networkPolicy")}}
    values["serviceAccount"] = {"create": False}
    checked = ("--disable-openapi-validation", *how)
    done = run_helm("install", "rel", str(CHART), *checked, values=values)
    assert done.returncode == 0, done.stderr
    deployed = helmed.cluster.deployment("models", "rel-triton")
    served = read_template(deployed)
    snapshot_url = "s3://bucket/models.snapshots/0123456789abcdef"
    helmed.cluster.manager = "repo-manager"
    patch = patch_for(deployed, served, (snapshot_url, {"digits": (2,)}), before={})
    assert helmed.cluster.patch(("deployments", "models", "rel-triton"), patch, strategic=True)[0] == 200
    done = run_helm("upgrade", "rel", str(CHART), *checked, values={**values, "replicas": 5})
    assert done.returncode == 0, done.stderr
    live = helmed.cluster.deployment("models", "rel-triton")
    assert (live["spec"]["replicas"], read_template(live).url) == (5, snapshot_url)
    back = run_helm("rollback", "rel", "1", *how)
    live = helmed.cluster.deployment("models", "rel-triton")
    if on_the_server:
        assert back.returncode != 0
        assert "MODEL_REPOSITORY" in back.stderr
        assert (live["spec"]["replicas"], read_template(live).url) == (5, snapshot_url), "nothing was changed"
        back = run_helm("rollback", "rel", "1", *how, "--force-conflicts")
        live = helmed.cluster.deployment("models", "rel-triton")
    assert back.returncode == 0, back.stderr
    assert (live["spec"]["replicas"], read_template(live).url) == (2, "s3://bucket/models")
