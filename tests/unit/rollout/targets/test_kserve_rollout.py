"""InferenceServices: control flow against a fake API server with a controller of the test's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FakeCluster
from support.kserve_controller import Controller, inference_service
from support.triton_deployment import publish_scaling

from repo_manager.errors import GateError, RepositoryError, RolloutUndoneError, ServerRefusedError, UsageError
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.kserve import InferenceService, KServeWeights, previous_on_kserve
from repo_manager.rollout.targets.kserve_status import failure_of, is_there
from repo_manager.rollout.trial.steps import Weights

TARGET = "kserve://models/digits"
SERVICE = InferenceService.parse(TARGET)
QUICK = RolloutOptions(load_timeout_s=5.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish_scaling(folder / "repository", "scale", [2.0, 3.0, 4.0], folder)
    return folder / "repository"


@pytest.fixture
def controller(cluster: FakeCluster) -> Controller:
    made = Controller()
    cluster.on_patch = lambda item: made(item) if item["kind"] == "InferenceService" else None
    cluster.add(inference_service())
    return made


@pytest.mark.parametrize("text", ["kserve://", "kserve://a", "kserve://a/b/c", "k8s://a/b", "kserve://A/b"])
def test_wrong_targets(text: str) -> None:
    with pytest.raises(UsageError, match="kserve://NAMESPACE/NAME"):
        InferenceService.parse(text)


def test_all_at_once(cluster: FakeCluster, controller: Controller, repository: Path) -> None:
    rollout = deploy(repository, "scale", 2, TARGET, options=QUICK)
    change = rollout.servers[0].snapshot
    assert change is not None
    assert (rollout.changed, change.before, change.models) == (True, "s3://bucket/models", {"scale": (2,)})
    assert change.after.startswith("s3://bucket/models.snapshots/")
    assert change.revision == "digits-predictor-00002"
    assert rollout.servers[0].proof == "conditions"
    service = cluster.objects["inferenceservices", "models", "digits"]
    assert service["spec"]["predictor"]["model"] == {"modelFormat": {"name": "triton"}, "storageUri": change.after}
    assert not deploy(repository, "scale", 2, TARGET, options=QUICK).changed


@pytest.mark.parametrize("percent", [0, 10])
def test_a_canary_that_was_left_halfway_is_finished(
    cluster: FakeCluster, controller: Controller, repository: Path, api: Api, percent: int
) -> None:
    """The storageUri is the snapshot's already, and the revision has not all of the traffic."""
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    KServeWeights(SERVICE, api, timeout_s=5.0).set_weight(percent / 100)
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed
    assert "canaryTrafficPercent" not in cluster.objects["inferenceservices", "models", "digits"]["spec"]["predictor"]
    assert controller.percents == [100, percent, 100]


def test_step_by_step_with_a_gate(controller: Controller, repository: Path) -> None:
    asked: list[float] = []
    rollout = deploy(
        repository,
        "scale",
        2,
        TARGET,
        options=QUICK,
        trial=TrialOptions((0.1, 0.5, 1.0), step_s=0.02, on_step=asked.append),
    )
    assert controller.percents == [10, 50, 100]
    assert rollout.trial is not None
    assert (asked, [step.fraction for step in rollout.trial.steps]) == ([0.1, 0.5], [0.1, 0.5])


def test_a_gate_that_fails_takes_the_traffic_back_first(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    before = copy.deepcopy(cluster.objects["inferenceservices", "models", "digits"]["spec"])

    def gate(share: float) -> None:
        if share == 0.5:
            raise GateError("p99 is worse")

    with pytest.raises(GateError, match=r"(?s)p99 is worse.*previous state was put back"):
        deploy(
            repository, "scale", 2, TARGET, options=QUICK, trial=TrialOptions((0.1, 0.5, 1.0), step_s=0.0, on_step=gate)
        )
    assert controller.percents == [10, 50, 0, 100]
    assert controller.uris[2] != controller.uris[3] == "s3://bucket/models"
    assert cluster.objects["inferenceservices", "models", "digits"]["spec"] == before


def test_a_service_that_breaks_while_it_is_watched_is_put_back(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    seen = iter(range(1000))
    real = cluster.get

    def breaking(*arguments: Any) -> Any:
        found = real(*arguments)
        if found is not None and controller.percents[-1:] == [10] and next(seen) > 3:
            found = copy.deepcopy(found)
            found["status"]["conditions"][1]["status"] = "False"
        return found

    cluster.get = breaking  # type: ignore[method-assign]
    with pytest.raises(RolloutUndoneError, match="at 10 % of the traffic: PredictorReady is False"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=TrialOptions((0.1, 1.0), step_s=5.0))
    assert controller.percents == [10, 0, 100]


def test_somebody_who_was_faster_is_not_overwritten(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    real = cluster.patch

    def late(key: Any, patch: Any, *, strategic: bool) -> Any:
        cluster.objects[key]["metadata"]["resourceVersion"] = "99"
        return real(key, patch, strategic=strategic)

    cluster.patch = late  # type: ignore[method-assign]
    with pytest.raises(ServerRefusedError, match="409"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert controller.uris == []


def test_a_revision_that_cannot_load_is_undone_with_kserves_reason(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    trial = TrialOptions((0.1, 1.0), step_s=0.0)
    plan = deploy(repository, "scale", 2, TARGET, options=RolloutOptions(dry_run=True), trial=trial)
    assert plan.dry_run
    assert {method for method, _, _ in cluster.requests} == {"GET"}
    assert plan.servers[0].snapshot is not None
    controller.fails = {plan.servers[0].snapshot.after.rpartition("/")[2]}
    with pytest.raises(RolloutUndoneError, match=r"ModelLoadFailed: failed to load all models \(exit code 1\)"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=TrialOptions((0.1, 1.0), step_s=0.0))
    assert controller.uris[-1] == "s3://bucket/models"


def test_a_failure_from_before_does_not_condemn_what_comes_after(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    service = cluster.objects["inferenceservices", "models", "digits"]
    service["status"]["modelStatus"]["transitionStatus"] = "InvalidSpec"
    assert failure_of(service) == "InvalidSpec: no reason is given"
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed


@pytest.mark.parametrize("mode", ["RawDeployment", "Standard"])
def test_no_canary_without_knative(cluster: FakeCluster, repository: Path, mode: str) -> None:
    service = inference_service()
    service["metadata"]["annotations"] = {"serving.kserve.io/deploymentMode": mode}
    cluster.add(service)
    with pytest.raises(UsageError, match=f"{mode} mode, which has no canary"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=TrialOptions((0.1, 1.0), step_s=0.0))


@pytest.mark.parametrize("percents", [(0,), (100,), (50, 10), (10, 10)])
def test_wrong_percentages(repository: Path, percents: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="do not ascend"):
        deploy(repository, "scale", 2, TARGET, trial=TrialOptions((*(percent / 100 for percent in percents), 1.0)))


def test_the_version_before(controller: Controller, repository: Path, api: Api) -> None:
    with pytest.raises(RepositoryError, match="no earlier roll-out"):
        previous_on_kserve(SERVICE, repository, "scale", api)
    for version in (2, 3):
        deploy(repository, "scale", version, TARGET, options=QUICK)
    assert previous_on_kserve(SERVICE, repository, "scale", api) == 2


def test_nothing_is_judged_by_a_status_that_is_older_than_the_change() -> None:
    service = inference_service()
    service["metadata"]["generation"] = 2
    assert not is_there(service, 100)
    service["status"]["modelStatus"]["transitionStatus"] = "InvalidSpec"
    assert failure_of(service) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda status: status["conditions"][2].update(status="False"),
        lambda status: status["conditions"].pop(1),
        lambda status: status["modelStatus"].update(transitionStatus="InProgress"),
        lambda status: status["components"]["predictor"].update(latestCreatedRevision="digits-predictor-00002"),
        lambda status: status["components"]["predictor"]["traffic"][0].update(percent=90),
    ],
)
def test_what_is_missing_is_waited_for(change: Any) -> None:
    service = inference_service()
    service["metadata"]["generation"] = 1
    assert is_there(service, 100)
    change(service["status"])
    assert not is_there(service, 100)


def test_weights_of_kserve(controller: Controller, repository: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    weights: Weights = KServeWeights(SERVICE, api, timeout_s=5.0)
    assert weights.current() == 0
    for fraction in (0.25, 0.0, 1.0):
        weights.set_weight(fraction)
        assert weights.current() == fraction
    assert controller.percents[1:] == [25, 0, 100]
