"""deploy/gitops, checked with the CRDs of Argo CD and Flux, and with the output of the chart and `snapshot`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.crds import check_custom
from support.helm import CHART
from support.manifests import Object, load_objects

DEPLOY = Path(__file__).parents[3] / "deploy"
FILES = sorted((DEPLOY / "gitops").rglob("*.yaml"))


def objects(path: Path) -> list[Object]:
    return load_objects(path.read_text(encoding="utf-8"))


def of_kind(kind: str) -> Object:
    (found,) = (item for path in FILES for item in objects(path) if item["kind"] == kind)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_object_is_what_its_crd_takes(path: Path) -> None:
    for item in objects(path):
        check_custom(item)


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("Application", lambda o: o["spec"]["sources"][0]["helm"].update(valuesFiles=[])),
        ("Application", lambda o: o["spec"].pop("destination")),
        ("Application", lambda o: o["spec"]["syncPolicy"]["automated"].update(prune="yes")),
        ("HelmRelease", lambda o: o["spec"].pop("interval")),
        ("HelmRelease", lambda o: o["spec"]["upgrade"]["remediation"].update(strategy="undo")),
        ("HelmRelease", lambda o: o["spec"]["driftDetection"].update(mode="loud")),
        ("GitRepository", lambda o: o["spec"].update(interval="soon")),
    ],
)
def test_what_a_crd_does_not_take_fails(kind: str, mutate: Callable[[Any], object]) -> None:
    mutant = copy.deepcopy(of_kind(kind))
    mutate(mutant)
    with pytest.raises(jsonschema.ValidationError):
        check_custom(mutant)


def test_the_pin_comes_after_the_values_that_it_completes() -> None:
    source, values = of_kind("Application")["spec"]["sources"]
    assert values["ref"] == "values"
    assert [name.rpartition("/")[2] for name in source["helm"]["valueFiles"]] == ["values.yaml", "snapshot.yaml"]
    chart = of_kind("HelmRelease")["spec"]["chart"]["spec"]
    assert chart["valuesFiles"][0] == f"{chart['chart']}/values.yaml", "the chart's own are left out unless named"
    assert chart["valuesFiles"][-1].endswith("/snapshot.yaml")
    for place in (source["path"], chart["chart"]):
        assert (DEPLOY.parent / place).samefile(CHART)


def test_a_sync_that_turns_the_autoscaler_on_leaves_the_number_of_pods() -> None:
    """Applied on the server, a field left out by its only owner goes back to its default: one pod."""
    spec = of_kind("Application")["spec"]
    assert "ServerSideApply=true" in spec["syncPolicy"]["syncOptions"]
    assert "RespectIgnoreDifferences=true" in spec["syncPolicy"]["syncOptions"]
    assert spec["ignoreDifferences"] == [{"group": "apps", "kind": "Deployment", "jsonPointers": ["/spec/replicas"]}]


def test_a_release_has_time_for_its_slowest_pod() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    minutes = int(of_kind("HelmRelease")["spec"]["timeout"].removesuffix("m"))
    assert minutes * 60 >= values["rollout"]["progressDeadlineSeconds"] * values["replicas"]
