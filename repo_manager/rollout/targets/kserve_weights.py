"""Canary weights by KServe."""

from __future__ import annotations

from repo_manager.rollout.targets.api import Api, Kind
from repo_manager.rollout.targets.kserve_service import KServeTarget
from repo_manager.rollout.targets.kserve_status import wait_for_service

__all__ = ["KServeWeights"]


class KServeWeights:
    """The share of an InferenceService's newest revision, for `repo_manager.rollout.trial.canary`.

    Args:
        target: the InferenceService; its newest revision is the new version.
        api: the cluster.
        timeout_s: how long KServe may take to route so.
    """

    def __init__(self, target: KServeTarget, api: Api, *, timeout_s: float = 300.0) -> None:
        self._target, self._api, self._timeout_s = target, api, timeout_s
        self._fraction = 0.0

    def set_weight(self, fraction: float) -> None:
        """Route this share to the newest revision, and wait until it is routed so; 1 promotes it.

        Raises:
            ServerError: KServe does not come to it.
        """
        percent = round(fraction * 100)
        patch = {"spec": {"predictor": {"canaryTrafficPercent": None if percent >= 100 else percent}}}
        self._api.patch_custom(Kind.INFERENCE_SERVICE, self._target.namespace, self._target.name, patch)
        wait_for_service(self._api, self._target.namespace, self._target.name, percent, timeout_s=self._timeout_s)
        self._fraction = fraction

    def current(self) -> float:
        """Return the share that was set last; 0 before."""
        return self._fraction
