"""An InferenceService, and KServe's controller as far as the status goes, for a fake cluster."""

from __future__ import annotations

from typing import Any


def inference_service() -> dict[str, Any]:
    """As `kubectl get -o json` shows a ready one, in the fields that are read."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "digits", "namespace": "models"},
        "spec": {"predictor": {"model": {"modelFormat": {"name": "triton"}, "storageUri": "s3://bucket/models"}}},
        "status": ready_status(1, "00001", "00001", 100),
    }


def ready_status(generation: int, newest: str, rolled_out: str, percent: int) -> dict[str, Any]:
    traffic = [{"latestRevision": True, "percent": percent, "revisionName": f"digits-predictor-{newest}"}]
    if percent < 100:
        traffic.append(
            {"latestRevision": False, "percent": 100 - percent, "revisionName": f"digits-predictor-{rolled_out}"}
        )
    return {
        "observedGeneration": generation,
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
    """KServe, as far as the status goes: a change of storageUri is a new revision; a bad URI fails to load."""

    def __init__(self) -> None:
        self.revision, self.uri = 1, "s3://bucket/models"
        self.rolled_out = [0, 1]
        self.fails: set[str] = set()
        self.percents: list[int] = []
        self.uris: list[str] = []

    def __call__(self, item: dict[str, Any]) -> None:
        predictor = item["spec"]["predictor"]
        uri = predictor["model"]["storageUri"]
        percent = predictor.get("canaryTrafficPercent", 100)
        if uri != self.uri:
            self.revision, self.uri = self.revision + 1, uri
        self.percents.append(percent)
        self.uris.append(uri)
        generation = item["metadata"]["generation"]
        if percent == 100 and self.revision not in self.rolled_out:
            self.rolled_out.append(self.revision)
        other = max(number for number in self.rolled_out if number != self.revision)
        status = ready_status(generation, f"{self.revision:05}", f"{other:05}", percent)
        if any(uri.endswith(each) for each in self.fails):
            status["modelStatus"] = {
                "transitionStatus": "BlockedByFailedLoad",
                "states": {"activeModelState": "Loaded", "targetModelState": "FailedToLoad"},
                "lastFailureInfo": {"reason": "ModelLoadFailed", "message": "failed to load all models", "exitCode": 1},
            }
        item["status"] = status
