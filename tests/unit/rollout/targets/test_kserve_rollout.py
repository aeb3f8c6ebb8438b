"""InferenceServices: control flow against a fake API server with a controller of the test's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, unschedulable
from support.kserve_controller import START, Controller, StandardController, inference_service
from support.triton_deployment import publish_scaling

from repo_manager.errors import GateError, RepositoryError, RolloutUndoneError, ServerRefusedError, UsageError
from repo_manager.rollout.deploy import deploy, undeploy
from repo_manager.rollout.options import RolloutOptions, TrialOptions, Weights
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.inference_service import InferenceService, KServeWeights, previous_on_kserve
from repo_manager.rollout.targets.kserve_status import Sight, WantedState, failure_of, missing

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
    return Controller(cluster)


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
        cluster.objects[key]["spec"]["predictor"]["minReplicas"] = 3
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


def standard_service(cluster: FakeCluster) -> dict[str, Any]:
    return cluster.objects["inferenceservices", "models", "digits"]


def sources(cluster: FakeCluster) -> dict[str, str]:
    """Return the snapshots served by the pods of each owned Deployment."""
    return {
        key[2]: next(iter(item["spec"]["template"]["metadata"]["annotations"].values()))
        for key, item in cluster.objects.items()
        if key[0] == "deployments"
    }


@pytest.mark.parametrize("mode", ["RawDeployment", "Standard"])
def test_in_standard_mode_the_owned_deployment_is_waited_for(cluster: FakeCluster, repository: Path, mode: str) -> None:
    StandardController(cluster)
    standard_service(cluster)["metadata"]["annotations"] = {"serving.kserve.io/deploymentMode": mode}
    rollout = deploy(repository, "scale", 2, TARGET, options=QUICK)
    change = rollout.servers[0].snapshot
    assert change is not None
    assert sources(cluster) == {"digits-predictor": change.after}
    status = cluster.deployment("models", "digits-predictor")["status"]
    assert (status["updatedReplicas"], status["replicas"]) == (1, 1)
    assert not deploy(repository, "scale", 2, TARGET, options=QUICK).changed


@pytest.mark.parametrize("standard", [False, True])
def test_without_a_controller_nothing_is_said_to_be_deployed(
    cluster: FakeCluster, repository: Path, standard: bool
) -> None:
    controller = (StandardController if standard else Controller)(cluster)
    controller.stopped = True
    before = copy.deepcopy(standard_service(cluster)["spec"])
    said = r"the controller has (made no revision after|not changed the Depl)[^\n]*\n.*KServe's controller runs"
    with pytest.raises(RolloutUndoneError, match=said):
        deploy(repository, "scale", 2, TARGET, options=RolloutOptions(load_timeout_s=0.3))
    assert standard_service(cluster)["spec"] == before
    # The last look's finding ends the message. On a busy machine the deadline may cut a look short, as said before it.
    with pytest.raises(RolloutUndoneError, match=r"2 s of --timeout: (The Kub[^\n]*: )?digits: " + said):
        deploy(repository, "scale", 2, TARGET, options=RolloutOptions(load_timeout_s=20.0, deadline_s=2.0))


def test_deployments_that_may_not_be_read_are_named_before_anything_is_changed(
    cluster: FakeCluster, repository: Path
) -> None:
    controller = StandardController(cluster)
    cluster.refuse = lambda _, path: (403, "deployments is forbidden") if "deployments" in path else None
    with pytest.raises(ServerRefusedError, match="refused to list the Deployments") as caught:
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert "docs/kubernetes.md" in str(caught.value.hint)
    assert controller.uris == []


def test_a_deployment_that_cannot_come_up_ends_it(cluster: FakeCluster, repository: Path) -> None:
    StandardController(cluster)

    def behave(made: FakeCluster, deployment: Any, pod: Any) -> None:
        unschedulable(made, deployment, pod)
        late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
        deployment["status"]["conditions"] = [late]

    def heal(item: Any) -> None:
        if item["kind"] == "InferenceService" and item["spec"]["predictor"]["model"]["storageUri"] == START:
            cluster.deployment("models", "digits-predictor")["status"]["conditions"] = []

    patched = cluster.on_patch

    def on_patch(item: Any) -> None:
        patched(item)
        heal(item)

    cluster.behaviour, cluster.on_patch = behave, on_patch
    with pytest.raises(RolloutUndoneError, match="made no progress within its deadline: timed out"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_a_canary_in_standard_mode_is_promoted_without_a_restart(cluster: FakeCluster, repository: Path) -> None:
    controller = StandardController(cluster)
    trial = TrialOptions((0.1, 0.5, 1.0), step_s=0.02)
    rollout = deploy(repository, "scale", 2, TARGET, options=QUICK, trial=trial)
    change = rollout.servers[0].snapshot
    assert change is not None
    assert controller.shares == [10, 50, 0]
    service = standard_service(cluster)
    name = service["spec"]["predictor"]["name"]
    assert "canary" not in service["spec"]
    assert sources(cluster) == {f"digits-{name}-predictor": change.after}
    assert cluster.deployment("models", f"digits-{name}-predictor")["metadata"]["generation"] == 1
    assert deploy(repository, "scale", 3, TARGET, options=QUICK).changed


def test_a_canary_in_standard_mode_is_undone(cluster: FakeCluster, repository: Path) -> None:
    controller = StandardController(cluster)
    before = copy.deepcopy(standard_service(cluster)["spec"])

    def gate(share: float) -> None:
        if share == 0.5:
            raise GateError("p99 is worse")

    trial = TrialOptions((0.1, 0.5, 1.0), step_s=0.0, on_step=gate)
    with pytest.raises(GateError, match="put back"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=trial)
    assert controller.shares == [10, 50, 0]
    assert standard_service(cluster)["spec"] == before


def test_a_canary_of_somebody_else_is_left_alone(cluster: FakeCluster, repository: Path) -> None:
    StandardController(cluster)
    theirs = {"trafficPercent": 5, "predictor": {"name": "v2", "model": {"storageUri": "s3://their/own"}}}
    standard_service(cluster)["spec"]["canary"] = [theirs]
    with pytest.raises(ServerRefusedError, match="a canary that repo-manager did not make: v2"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_no_canary_in_standard_mode_before_kserve_0_20(cluster: FakeCluster, repository: Path) -> None:
    StandardController(cluster, canaries=False)
    before = copy.deepcopy(standard_service(cluster)["spec"])
    with pytest.raises(UsageError, match=r"Standard mode, which has no canary before KServe 0\.20"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=TrialOptions((0.1, 1.0), step_s=0.0))
    assert standard_service(cluster)["spec"] == before


def test_a_status_that_moves_is_no_change_by_somebody_else(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    real = cluster.patch
    moved: list[bool] = []

    def late(key: Any, patch: Any, *, strategic: bool) -> Any:
        if not moved:
            moved.append(True)
            cluster.objects[key]["metadata"]["resourceVersion"] = "99"
        return real(key, patch, strategic=strategic)

    cluster.patch = late  # type: ignore[method-assign]
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed


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


def test_a_model_leaves_the_service(controller: Controller, repository: Path, tmp_path: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    with pytest.raises(RepositoryError, match="scale is all that kserve://models/digits serves"):
        undeploy(repository, "scale", None, TARGET, options=QUICK)
    publish_scaling(repository, "second", [5.0], tmp_path)
    deploy(repository, "second", 1, TARGET, options=QUICK)
    gone = undeploy(repository, "scale", None, TARGET, options=QUICK)
    change = gone.servers[0].snapshot
    assert change is not None
    assert (gone.version, gone.servers[0].proof, change.models) == (None, "conditions", {"second": (1,)})
    assert not undeploy(repository, "scale", None, TARGET, options=QUICK).changed
    assert previous_on_kserve(SERVICE, repository, "scale", api) == 2


def test_nothing_is_judged_by_a_status_that_is_older_than_the_change() -> None:
    """`observedGeneration` is an owned object's: it may be below the service's own, and above it."""
    service = inference_service()
    for generation, observed in ((5, 1), (1, 5)):
        service["metadata"]["generation"], service["status"]["observedGeneration"] = generation, observed
        assert list(missing(Sight(service), WantedState(START))) == []
        (reason,) = missing(Sight(service), WantedState(START, not_revision="digits-predictor-00001"))
        assert reason == "the controller has made no revision after digits-predictor-00001 yet"


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
    assert list(missing(Sight(service), WantedState(START))) == []
    change(service["status"])
    assert list(missing(Sight(service), WantedState(START))) != []


def test_weights_of_kserve(controller: Controller, repository: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    weights: Weights = KServeWeights(SERVICE, api, timeout_s=5.0)
    assert weights.current() == 0
    for fraction in (0.25, 0.0, 1.0):
        weights.set_weight(fraction)
        assert weights.current() == fraction
    assert controller.percents[1:] == [25, 0, 100]


def test_a_share_of_a_sequence_is_refused_before_the_cluster_is_asked(
    cluster: FakeCluster, controller: Controller, repository: Path
) -> None:
    config = repository / "scale" / "config.pbtxt"
    config.write_text(config.read_text() + "sequence_batching { }\n")
    asked = len(cluster.requests)
    trial = TrialOptions(steps=(0.1, 1.0), step_s=0.0)
    with pytest.raises(UsageError, match="of a sequence of scale have to reach one version"):
        deploy(repository, "scale", 2, TARGET, options=QUICK, trial=trial)
    assert len(cluster.requests) == asked


def test_roll_outs_are_events_of_the_service(cluster: FakeCluster, controller: Controller, repository: Path) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert [event["reason"] for event in cluster.events] == ["RolloutStarted", "RolloutDone"]
    assert cluster.events[0]["involvedObject"]["apiVersion"] == "serving.kserve.io/v1beta1"
