"""An InferenceService, and KServe's controller as far as the status goes, for a fake cluster.

Like the real one, the controller lags behind the spec, copies `observedGeneration` from the objects it owns, and shows
the status of the previous version until then (kserve, `PropagateStatus`, `PropagateRawStatus`).
"""

from __future__ import annotations

import copy
from typing import Any

from support.fake_cluster import FakeCluster, touch

START = "s3://bucket/models"
LAG = 3
"""How often the status is read before the controller has seen a change."""


def inference_service(*, mode: str = "Knative") -> dict[str, Any]:
    """A ready one as `kubectl get -o json` shows it, with only the fields we read."""
    status = ready_status("00001", "00001", 100)
    status["deploymentMode"] = mode
    if mode != "Knative":
        status["components"] = {"predictor": {"url": "http://digits-predictor.models.example.com"}}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "digits", "namespace": "models"},
        "spec": {"predictor": {"model": {"modelFormat": {"name": "triton"}, "storageUri": START}}},
        "status": status,
    }


def owned_deployment(name: str, uri: str) -> dict[str, Any]:
    """Return the Deployment KServe makes of a predictor in Standard mode."""
    labels = {"app": f"isvc.{name}", "serving.kserve.io/inferenceservice": "digits"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "models", "labels": dict(labels)},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": f"isvc.{name}"}},
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {"internal.serving.kserve.io/storage-initializer-sourceuri": uri},
                },
                "spec": {"containers": [{"name": "kserve-container", "image": "tritonserver:26.07-py3"}]},
            },
        },
    }


def ready_status(newest: str, rolled_out: str, percent: int) -> dict[str, Any]:
    traffic = [{"latestRevision": True, "percent": percent, "revisionName": f"digits-predictor-{newest}"}]
    if percent < 100:
        traffic.append(
            {"latestRevision": False, "percent": 100 - percent, "revisionName": f"digits-predictor-{rolled_out}"}
        )
    return {
        "observedGeneration": 1,
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
            for kind in ("IngressReady", "PredictorReady", "Ready")
        ],
        "components": {
            "predictor": {
                "latestCreatedRevision": f"digits-predictor-{newest}",
                "latestReadyRevision": f"digits-predictor-{newest}",
                "latestRolledoutRevision": f"digits-predictor-{rolled_out}",
                "traffic": traffic,
            }
        },
        "modelStatus": {
            "transitionStatus": "UpToDate",
            "states": {"activeModelState": "Loaded", "targetModelState": "Loaded"},
        },
    }


class Controller:
    """KServe with Knative: a change of storageUri is a new revision; a bad URI fails to load.

    Args:
        cluster: whose InferenceService it looks after; one is added.
    """

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.revision, self.uri = 1, START
        self.rolled_out = [0, 1]
        self.fails: set[str] = set()
        self.percents: list[int] = []
        self.uris: list[str] = []
        self.stopped = False
        self._unseen = -1
        cluster.on_patch = self.patched
        cluster.on_read = self.read
        self.start()

    def start(self) -> None:
        self.cluster.add(inference_service())

    def patched(self, item: dict[str, Any]) -> None:
        if item["kind"] == "InferenceService":
            predictor = item["spec"]["predictor"]
            self.percents.append(predictor.get("canaryTrafficPercent", 100))
            self.uris.append(predictor["model"]["storageUri"])
            self._unseen = LAG

    def read(self, item: dict[str, Any]) -> None:
        if item["kind"] != "InferenceService" or self._unseen < 0 or self.stopped:
            return
        self._unseen -= 1
        if self._unseen == 0:
            self.reconcile(item)
            touch(item)
            self._unseen = -1

    def reconcile(self, item: dict[str, Any]) -> None:
        predictor = item["spec"]["predictor"]
        uri, percent = predictor["model"]["storageUri"], predictor.get("canaryTrafficPercent", 100)
        if uri != self.uri:
            self.revision, self.uri = self.revision + 1, uri
        if percent == 100 and self.revision not in self.rolled_out:
            self.rolled_out.append(self.revision)
        other = max(number for number in self.rolled_out if number != self.revision)
        status = ready_status(f"{self.revision:05}", f"{other:05}", percent)
        if any(uri.endswith(each) for each in self.fails):
            status["modelStatus"] = failed_to_load()
        item["status"] = status


class StandardController(Controller):
    """KServe in Standard mode: it owns Deployments, and from 0.20 on one for each canary.

    Args:
        cluster: as above.
        canaries: whether the CRD has `spec.canary`; else the API server drops it without a word.
    """

    def __init__(self, cluster: FakeCluster, *, canaries: bool = True) -> None:
        self._canaries = canaries
        self.shares: list[int] = []
        super().__init__(cluster)

    def start(self) -> None:
        self.cluster.add(inference_service(mode="Standard"))
        self.cluster.add(owned_deployment("digits-predictor", START))

    def patched(self, item: dict[str, Any]) -> None:
        super().patched(item)
        if item["kind"] == "InferenceService":
            if not self._canaries:
                item["spec"].pop("canary", None)
            self.shares.append(sum(each["trafficPercent"] for each in item["spec"].get("canary") or ()))

    def reconcile(self, item: dict[str, Any]) -> None:
        wanted = {_name_of(item["spec"]["predictor"]): item["spec"]["predictor"]["model"]["storageUri"]}
        canaries = item["spec"].get("canary") or []
        wanted |= {_name_of(each["predictor"]): each["predictor"]["model"]["storageUri"] for each in canaries}
        owned = {key[2]: key for key in self.cluster.objects if key[0] == "deployments"}
        for name in owned.keys() - wanted.keys():
            self.cluster.remove(owned[name])
        for name, uri in wanted.items():
            if name not in owned:
                self.cluster.add(owned_deployment(name, uri), settled=False)
                continue
            made = copy.deepcopy(self.cluster.objects[owned[name]])
            annotations = made["spec"]["template"]["metadata"]["annotations"]
            if list(annotations.values()) != [uri]:
                (annotations["internal.serving.kserve.io/storage-initializer-sourceuri"],) = (uri,)
                made["metadata"]["generation"] += 1
                touch(made)
                self.cluster.objects[owned[name]] = made
        item["status"]["canaryStatuses"] = [
            {"name": each["predictor"]["name"], "ready": True, "trafficPercent": each["trafficPercent"]}
            for each in canaries
        ]
        loaded = not any(uri.endswith(each) for uri in wanted.values() for each in self.fails)
        item["status"]["modelStatus"] = (
            {"transitionStatus": "UpToDate", "states": {"targetModelState": "Loaded"}} if loaded else failed_to_load()
        )


def failed_to_load() -> dict[str, Any]:
    return {
        "transitionStatus": "BlockedByFailedLoad",
        "states": {"activeModelState": "Loaded", "targetModelState": "FailedToLoad"},
        "lastFailureInfo": {"reason": "ModelLoadFailed", "message": "failed to load all models", "exitCode": 1},
    }


def _name_of(predictor: dict[str, Any]) -> str:
    return f"digits-{predictor['name']}-predictor" if predictor.get("name") else "digits-predictor"
