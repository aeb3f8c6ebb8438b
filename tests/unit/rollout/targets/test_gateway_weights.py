"""Weights of HTTPRoutes: control flow against a fake API server with a controller of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_cluster import FakeCluster
from typer.testing import CliRunner

from repo_manager.cli.main import app
from repo_manager.errors import RolloutUndoneError, ServerRefusedError, UsageError
from repo_manager.rollout.options import Weights
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.gateway import GatewayWeights
from repo_manager.rollout.traffic import parse_shares, shift_traffic


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


ROUTE = "gateway://models/digits"


def weights_in(cluster: FakeCluster) -> list[int | None]:
    rules = cluster.objects["httproutes", "models", "digits"]["spec"]["rules"]
    return [backend.get("weight") for backend in rules[0]["backendRefs"]]


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["traffic", ROUTE, *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_the_command_shows_plans_and_shifts(cluster: FakeCluster) -> None:
    cluster.add(route())
    seen: list[list[int | None]] = []
    cluster.on_patch = lambda item: (
        accept(item),
        seen.append([b["weight"] for b in item["spec"]["rules"][0]["backendRefs"]]),
    )[0]
    assert (run()["share"], run()["services"]) == (0.0, ["stable", "canary"])
    assert run("--share", "10%", "--dry-run")["share"] == 0.1
    assert seen == []
    made = run("--share", "10%,50%", "--step", "10ms")
    assert (made["before"], made["share"], seen) == (0.0, 0.5, [[90, 10], [50, 50]])
    assert run()["share"] == 0.5
    assert run("--share", "0%", "--stable", "stable", "--canary", "canary")["share"] == 0.0
    assert run("--share", "100%", "--canary", "stable", "--stable", "canary")["share"] == 1.0
    assert seen[-1] == [100, 0]


def test_a_share_that_a_gateway_refuses_is_taken_back(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    item = route()
    item["spec"]["rules"][0]["backendRefs"] = [
        {"name": "stable", "port": 8000, "weight": 3},
        {"name": "canary", "port": 8000},
    ]
    cluster.add(item)
    cluster.on_patch = lambda item: accept(item, "True" if weights_in(cluster) != [50, 50] else "False")
    monkeypatch.setattr(
        "repo_manager.rollout.targets.gateway.GatewayWeights.__init__.__kwdefaults__", {"timeout_s": 0.1}
    )
    with pytest.raises(
        RolloutUndoneError, match=r"no such Service\nThe weights of before are back: stable 3, canary 1"
    ):
        shift_traffic(ROUTE, (0.1, 0.5, 1.0), step_s=0.0)
    assert weights_in(cluster) == [3, None]


def test_an_interruption_takes_the_traffic_back(cluster: FakeCluster) -> None:
    cluster.add(route())
    cluster.on_patch = accept

    def interrupt(text: str) -> None:
        if "50 %" in text:
            raise KeyboardInterrupt

    with pytest.raises(RolloutUndoneError, match="interrupted"):
        shift_traffic(ROUTE, (0.1, 0.5), step_s=0.0, report=interrupt)
    assert weights_in(cluster) == [100, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: shift_traffic("gateway://models"),
        lambda: shift_traffic("k8s://models/rel"),
        lambda: shift_traffic(ROUTE, (1.5,)),
        lambda: parse_shares("10%,,50%"),
        lambda: parse_shares("101%"),
        lambda: parse_shares("-5%"),
    ],
)
def test_what_cannot_be_read(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()
