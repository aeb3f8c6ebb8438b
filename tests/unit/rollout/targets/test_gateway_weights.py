"""Weights of HTTPRoutes: control flow against a fake API server with a controller of the test's own."""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_cluster import FakeCluster

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.gateway import GatewayWeights
from repo_manager.rollout.trial.steps import Weights


def route() -> dict[str, Any]:
    backends = [{"name": "stable", "port": 8000, "weight": 100}, {"name": "canary", "port": 8000, "weight": 0}]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "digits", "namespace": "models"},
        "spec": {
            "parentRefs": [{"name": "gateway"}],
            "rules": [
                {"matches": [{"path": {"type": "PathPrefix", "value": "/v2"}}], "backendRefs": backends},
                {"backendRefs": [{"name": "stable", "port": 8000}]},
            ],
        },
    }


def accept(item: dict[str, Any], status: str = "True") -> None:
    if item["kind"] == "HTTPRoute":
        generation = item["metadata"]["generation"]
        conditions = [
            {"type": kind, "status": status, "observedGeneration": generation, "message": "no such Service"}
            for kind in ("Accepted", "ResolvedRefs")
        ]
        item["status"] = {"parents": [{"parentRef": {"name": "gateway"}, "conditions": conditions}]}


def test_weights_of_a_gateway(cluster: FakeCluster, api: Api) -> None:
    cluster.add(route())
    cluster.on_patch = accept
    weights: Weights = GatewayWeights("models", "digits", ("stable", "canary"), api)
    weights.set_weight(0.1)
    rules = cluster.objects["httproutes", "models", "digits"]["spec"]["rules"]
    assert [backend["weight"] for backend in rules[0]["backendRefs"]] == [90, 10]
    assert rules[1] == route()["spec"]["rules"][1], "rules that do not name both stay"
    assert weights.current() == 0.1


def test_a_route_without_both_services_is_refused(cluster: FakeCluster, api: Api) -> None:
    cluster.add(route())
    with pytest.raises(ServerRefusedError, match="sends to both stable and other"):
        GatewayWeights("models", "digits", ("stable", "other"), api)


@pytest.mark.parametrize("controller_says", ["False", None])
def test_a_gateway_that_does_not_accept_is_an_error(
    cluster: FakeCluster, api: Api, controller_says: str | None
) -> None:
    cluster.add(route())
    if controller_says is not None:
        cluster.on_patch = lambda item: accept(item, controller_says)
    weights = GatewayWeights("models", "digits", ("stable", "canary"), api, timeout_s=0.1)
    with pytest.raises(ServerRefusedError, match="no such Service" if controller_says else "no gateway has taken it"):
        weights.set_weight(0.5)
    assert weights.current() == 0


def test_a_route_that_somebody_else_changed_is_not_overwritten(cluster: FakeCluster, api: Api) -> None:
    cluster.add(route())
    cluster.on_patch = accept
    weights = GatewayWeights("models", "digits", ("stable", "canary"), api)
    real = cluster.patch

    def late(key: Any, patch: Any, *, strategic: bool) -> Any:
        cluster.objects[key]["metadata"]["resourceVersion"] = "99"
        return real(key, patch, strategic=strategic)

    cluster.patch = late  # type: ignore[method-assign]
    with pytest.raises(ServerRefusedError, match="409"):
        weights.set_weight(0.5)
