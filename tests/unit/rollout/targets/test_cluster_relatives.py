"""The needs of a model in a cluster: they come along in the snapshot, or the roll-out is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster
from support.kserve_controller import Controller
from support.python_models import write_python_model
from support.triton_deployment import triton_deployment

from repo_manager.errors import RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.pinning import pin_snapshot
from repo_manager.rollout.result import Rollout

RELEASE, SERVICE = "k8s://models/rel", "kserve://models/digits"
PLAN = RolloutOptions(dry_run=True)
QUICK = RolloutOptions(load_timeout_s=5.0)
SERVED_3 = "version_policy { specific { versions: [3] } }\n"


@pytest.fixture
def family(repository: Path) -> Path:
    """`ens` asks for `scale_py:2` and `opt`, `bls` for `scale`; `scale_py` itself serves version 3."""
    write_python_model(repository, "scale_py", kind="scale", versions=(1, 2, 3), extra=SERVED_3)
    write_python_model(repository, "opt")
    config = write_python_model(repository, "ens") / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale_py" model_version: 2'))
    write_python_model(repository, "bls")
    for name in ("scale_py", "opt", "ens", "bls"):
        adopt(repository, name)
    return repository


def models_of(rollout: Rollout) -> dict[str, tuple[int, ...]]:
    change = rollout.servers[0].snapshot
    assert change is not None
    return dict(change.models)


@pytest.mark.parametrize("target", [RELEASE, SERVICE])
def test_a_version_that_an_ensemble_pins_comes_along(deployed: FakeCluster, family: Path, target: str) -> None:
    Controller(deployed)
    found = models_of(deploy(family, "ens", 1, target, options=PLAN))
    assert found["ens"] == (1,)
    assert 2 in found["scale_py"], "the ensemble asks for it by number"
    assert 3 in found["scale_py"], "and what was served stays"
    assert found["opt"] == (1,)


def test_a_pinned_snapshot_has_the_version_that_an_ensemble_pins(family: Path) -> None:
    found = pin_snapshot(family, {"ens": 1}, options=PLAN).models
    assert found["scale_py"] == (2, 3)


def test_only_what_comes_along_is_recorded_as_deployed(cluster: FakeCluster, family: Path) -> None:
    Controller(cluster)
    deploy(family, "bls", 1, SERVICE, options=QUICK)
    assert model_state(family, "scale").deployments == (), "it was served before"
    deploy(family, "ens", 1, SERVICE, options=QUICK)
    assert [each.version for each in model_state(family, "scale_py").deployments] == [3]
    assert model_state(family, "opt").deployments == ()


@pytest.mark.parametrize("target", [RELEASE, SERVICE])
def test_a_model_whose_code_asks_what_is_nowhere_is_refused_by_name(
    deployed: FakeCluster, repository: Path, target: str
) -> None:
    Controller(deployed)
    config = write_python_model(repository, "bls") / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "scale"', 'string_value: "absent"'))
    adopt(repository, "bls")
    with pytest.raises(RepositoryError, match="bls needs absent, which neither the repository nor"):
        deploy(repository, "bls", 1, target, options=QUICK)
    assert all(method == "GET" for method, _, _ in deployed.requests)


def test_pods_that_load_by_name_would_not_load_what_code_asks(cluster: FakeCluster, family: Path) -> None:
    item = triton_deployment()
    item["spec"]["template"]["spec"]["containers"][0]["args"] = ["--model-repository=$(MODEL_REPOSITORY)"]
    item["spec"]["template"]["spec"]["containers"][0]["args"] += ["--load-model=bls", "--load-model=ens"]
    cluster.add(item)
    with pytest.raises(RepositoryError, match=r"load bls, ens by name and would not load scale\n") as refused:
        deploy(family, "bls", 1, RELEASE, options=QUICK)
    assert "the chart's list `models`" in (refused.value.hint or "")
    assert all(method == "GET" for method, _, _ in cluster.requests)
    found = models_of(deploy(family, "ens", 1, RELEASE, options=PLAN))
    assert {"ens", "scale_py", "opt", "bls", "scale"} == found.keys(), "Triton loads an ensemble's parts with it"
