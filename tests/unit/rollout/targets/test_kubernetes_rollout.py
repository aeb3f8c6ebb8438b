"""Roll-outs on Kubernetes: control flow against a fake API server, over real HTTP, through the real client library."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, ready, touch, unschedulable, waiting
from support.triton_deployment import publish_scaling, triton_deployment

from repo_manager.errors import (
    RepositoryError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
    ServerUnreachableError,
    UsageError,
)
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.rollout.cluster_status import cluster_status
from repo_manager.rollout.deploy import deploy, rollback, undeploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Rollout, SnapshotChange
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.release import Release, previous_on_kubernetes
from repo_manager.types import as_json

TARGET = "k8s://models/rel"
QUICK = RolloutOptions(load_timeout_s=20.0)


def snapshot_of(rollout: Rollout) -> SnapshotChange:
    change = rollout.servers[0].snapshot
    assert change is not None
    return change


def id_of(rollout: Rollout) -> str:
    return snapshot_of(rollout).after.rpartition("/")[2]


def template_of(cluster: FakeCluster, name: str = "rel-triton") -> dict[str, Any]:
    return dict(cluster.deployment("models", name)["spec"]["template"])


def url_of(cluster: FakeCluster, name: str = "rel-triton") -> str:
    return str(template_of(cluster, name)["spec"]["containers"][0]["env"][0]["value"])


@pytest.mark.parametrize("text", ["k8s://", "k8s://ns", "k8s://ns/", "k8s://NS/rel", "k8s://ns/rel/x", "grpc://ns/rel"])
def test_wrong_targets(text: str) -> None:
    with pytest.raises(UsageError, match="k8s://NAMESPACE/RELEASE"):
        Release.parse(text)


def test_a_target() -> None:
    assert Release.parse("k8s://ns-1/rel.a/") == Release("ns-1", "rel.a")
    assert str(Release("ns", "rel")) == "k8s://ns/rel"


def test_a_roll_out_pins_the_pods_to_a_snapshot_of_all_that_they_served(
    deployed: FakeCluster, repository: Path
) -> None:
    rollout = deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert (rollout.changed, rollout.servers[0].proof, snapshot_of(rollout).models) == (
        True,
        "readiness",
        {"other": (1,), "scale": (2,)},
    )
    snapshot = repository.parent / "repository.snapshots" / id_of(rollout)
    assert url_of(deployed) == snapshot_of(rollout).after == f"/models/repository.snapshots/{snapshot.name}"
    assert find_model(snapshot, "scale").selected == (2,)
    assert [entry.version for entry in find_model(snapshot, "scale").versions] == [2]
    assert (snapshot / "other" / "1" / "model.onnx").samefile(repository / "other" / "1" / "model.onnx")
    assert json.loads((snapshot / "snapshot.json").read_text())["models"] == {"other": [1], "scale": [2]}
    status = deployed.deployment("models", "rel-triton")["status"]
    assert (status["updatedReplicas"], status["replicas"], status["availableReplicas"]) == (2, 2, 2)
    assert model_state(repository, "scale").deployments[-1].version == 2
    assert find_model(repository, "scale").policy == (1,), "the repository itself is left as it is"
    assert as_json(rollout)["servers"][0]["snapshot"]["models"] == {"other": [1], "scale": [2]}


@pytest.mark.parametrize(
    ("part", "mark", "keeper"),
    [
        ("annotations", "argocd.argoproj.io/tracking-id", "Argo CD"),
        ("labels", "helm.toolkit.fluxcd.io/name", "Flux"),
        ("labels", "team", None),
    ],
)
def test_a_gitops_controller_that_may_put_it_back_is_named(
    deployed: FakeCluster, repository: Path, part: str, mark: str, keeper: str | None
) -> None:
    deployed.deployment("models", "rel-triton")["metadata"][part][mark] = "x"
    events = deploy(repository, "scale", 2, TARGET, options=dataclasses.replace(QUICK, dry_run=True)).events
    said = [event for event in events if "repo-manager snapshot scale:2" in event]
    assert [event.partition(" applies")[0] for event in said] == ([keeper] if keeper else [])


def test_no_pod_goes_before_its_successor_is_available(deployed: FakeCluster, repository: Path) -> None:
    seen: list[int] = []
    watch = deployed.get

    def counting(*arguments: Any) -> Any:
        found = watch(*arguments)
        seen.append(deployed.deployment("models", "rel-triton")["status"]["availableReplicas"])
        return found

    deployed.get = counting  # type: ignore[method-assign]
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert min(seen) >= 2


def test_other_variables_of_the_container_stay(deployed: FakeCluster, repository: Path) -> None:
    before = copy.deepcopy(template_of(deployed)["spec"]["containers"][0])
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    after = template_of(deployed)["spec"]["containers"][0]
    assert {**after, "env": after["env"][1:]} == {**before, "env": before["env"][1:]}


def test_what_is_served_already_changes_nothing(deployed: FakeCluster, repository: Path) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    generation = deployed.deployment("models", "rel-triton")["metadata"]["generation"]
    again = deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert not again.changed
    assert deployed.deployment("models", "rel-triton")["metadata"]["generation"] == generation


def test_a_dry_run_writes_nothing(deployed: FakeCluster, repository: Path) -> None:
    plan = deploy(repository, "scale", 2, TARGET, options=RolloutOptions(dry_run=True))
    assert (plan.changed, plan.dry_run, plan.servers[0].changed, plan.servers[0].proof) == (False, True, True, "none")
    assert {method for method, _, _ in deployed.requests} == {"GET"}
    assert not (repository.parent / "repository.snapshots").exists()
    assert snapshot_of(deploy(repository, "scale", 2, TARGET, options=QUICK)).after == snapshot_of(plan).after


def test_keep_previous_serves_both(deployed: FakeCluster, repository: Path) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    options = RolloutOptions(load_timeout_s=20.0, keep_previous=True)
    assert snapshot_of(deploy(repository, "scale", 3, TARGET, options=options)).models["scale"] == (2, 3)


def test_other_models_are_taken_from_the_snapshot_not_from_the_repository(
    deployed: FakeCluster, repository: Path
) -> None:
    first = deploy(repository, "scale", 2, TARGET, options=QUICK)
    config = repository / "other" / "config.pbtxt"
    config.write_text(config.read_text() + "dynamic_batching {}\n")
    second = deploy(repository, "scale", 3, TARGET, options=QUICK)
    place = repository.parent / "repository.snapshots"
    texts = {
        (place / snapshot_of(each).after.rpartition("/")[2] / "other" / "config.pbtxt").read_text()
        for each in (first, second)
    }
    assert len(texts) == 1
    third = deploy(repository, "other", 1, TARGET, options=QUICK)
    assert "dynamic_batching" in (place / id_of(third) / "other" / "config.pbtxt").read_text()


def test_back_to_the_version_before(deployed: FakeCluster, repository: Path, api: Api) -> None:
    for version in (2, 3):
        deploy(repository, "scale", version, TARGET, options=QUICK)
    assert previous_on_kubernetes(Release.parse(TARGET), "scale", api) == 2
    with pytest.raises(RepositoryError, match="no earlier roll-out of other"):
        previous_on_kubernetes(Release.parse(TARGET), "other", api)


def test_a_model_leaves_the_snapshot_and_comes_back(deployed: FakeCluster, repository: Path, api: Api) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    planned = undeploy(repository, "scale", None, TARGET, options=RolloutOptions(dry_run=True))
    assert (planned.changed, planned.servers[0].ready) == (False, ())
    gone = undeploy(repository, "scale", None, TARGET, options=QUICK)
    assert (gone.version, gone.changed, snapshot_of(gone).models) == (None, True, {"other": (1,)})
    assert url_of(deployed) == snapshot_of(gone).after
    assert not undeploy(repository, "scale", None, TARGET, options=QUICK).changed
    assert not model_state(repository, "scale").is_deployed
    with pytest.raises(RepositoryError, match="other is all that k8s://models/rel serves"):
        undeploy(repository, "other", None, TARGET, options=QUICK)
    assert previous_on_kubernetes(Release.parse(TARGET), "scale", api) == 2
    assert rollback(repository, "scale", TARGET, options=QUICK).version == 2
    assert snapshot_of(deploy(repository, "scale", 2, TARGET, options=QUICK)).models == {"other": (1,), "scale": (2,)}


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (waiting("ImagePullBackOff", 'Back-off pulling image "tritonserver:26.07-py3"'), "ImagePullBackOff: Back-off"),
        (waiting("CreateContainerConfigError", 'secret "s3" not found'), 'secret "s3" not found'),
        (
            waiting("CrashLoopBackOff", "back-off 10s", restarts=1, ended={"reason": "Error", "exitCode": 1}),
            "last end: Error, exit code 1",
        ),
        (waiting("ContainerCreating", restarts=2, ended={"reason": "OOMKilled", "exitCode": 137}), "OOMKilled"),
    ],
)
def test_pods_that_cannot_start_are_named_and_the_template_is_put_back(
    deployed: FakeCluster, repository: Path, behaviour: Any, reason: str
) -> None:
    before = copy.deepcopy(template_of(deployed))
    deployed.behaviour = behaviour
    deployed.logs = "E1123 failed to load 'scale': bad file\nerror: creating server: failed to load all models\n"
    with pytest.raises(RolloutUndoneError) as caught:
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert reason in caught.value.message
    assert "they serve /models/repository" in caught.value.message
    assert template_of(deployed) == before
    assert "repo-manager/history" not in deployed.deployment("models", "rel-triton")["metadata"]["annotations"]
    status = deployed.deployment("models", "rel-triton")["status"]
    assert (status["replicas"], status["availableReplicas"]) == (2, 2)
    assert model_state(repository, "scale").deployments == ()
    assert ("failed to load 'scale'" in caught.value.message) == ("exit" in reason or "OOM" in reason)


@pytest.mark.parametrize(
    "condition",
    [
        {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"},
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: gpus"},
    ],
)
def test_what_the_controller_reports_ends_it(
    deployed: FakeCluster, repository: Path, condition: dict[str, str]
) -> None:
    def behave(_cluster: FakeCluster, deployment: Any, pod: Any) -> None:
        unschedulable(_cluster, deployment, pod)
        deployment["status"]["conditions"] = [condition]

    def heal(item: Any) -> None:
        item["status"]["conditions"] = []

    deployed.behaviour, deployed.on_patch = behave, heal
    with pytest.raises(RolloutUndoneError, match=condition["message"]):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_what_never_ends_is_undone_after_the_timeout_and_says_what_it_waited_for(
    deployed: FakeCluster, repository: Path
) -> None:
    deployed.behaviour = unschedulable
    with pytest.raises(RolloutUndoneError, match=r"no progress within 0.5 s: .*Insufficient nvidia.com/gpu"):
        deploy(repository, "scale", 2, TARGET, options=RolloutOptions(load_timeout_s=0.5))


def test_where_the_time_is_up_first_it_says_what_it_waited_for(
    deployed: FakeCluster, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the command: --timeout limits the time without progress, and the whole time too."""
    deployed.behaviour = unschedulable
    monkeypatch.setattr(cluster_api, "_POLL_S", 2.0)  # no look between the two ends
    options = RolloutOptions(load_timeout_s=8.0, deadline_s=8.0)
    with pytest.raises(RolloutUndoneError, match=r"8 s( of --timeout)?: .*Insufficient nvidia.com/gpu"):
        deploy(repository, "scale", 2, TARGET, options=options)


def test_where_the_time_is_up_an_api_server_that_says_nothing_is_named(deployed: FakeCluster, repository: Path) -> None:
    deployed.refuse = lambda _method, _path: (503, "starting")
    options = RolloutOptions(load_timeout_s=2.0, deadline_s=2.0)
    with pytest.raises(ServerUnreachableError, match=r"list the Deployments in models: starting \(503\)"):
        deploy(repository, "scale", 2, TARGET, options=options)


def test_a_template_that_was_put_back_is_not_to_be_put_back_by_hand(deployed: FakeCluster, repository: Path) -> None:
    broken = waiting("ImagePullBackOff", "no such image")
    deployed.behaviour = broken
    deployed.on_patch = lambda _: deployed.pods.clear()  # the nodes are gone
    with pytest.raises(RollbackFailedError, match="no such image") as caught:
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert "kubectl describe deployment/rel-triton -n models" in str(caught.value.hint)
    assert "set env" not in str(caught.value.hint)
    assert url_of(deployed) == "/models/repository"


def test_several_kinds_go_one_after_the_other_and_back_together(cluster: FakeCluster, repository: Path) -> None:
    for name in ("rel-triton-h100", "rel-triton-l4"):
        cluster.add(triton_deployment(name))
    rollout = deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert [each.name for each in rollout.servers] == ["rel-triton-h100", "rel-triton-l4"]

    def l4_crashes(made: FakeCluster, deployment: Any, pod: Any) -> None:
        bad = waiting("CrashLoopBackOff", "", restarts=1, ended={"reason": "Error", "exitCode": 1})
        (bad if deployment["metadata"]["name"].endswith("l4") else ready)(made, deployment, pod)

    cluster.behaviour = l4_crashes
    with pytest.raises(RolloutUndoneError, match="rel-triton-l4-"):
        deploy(repository, "scale", 3, TARGET, options=QUICK)
    assert {url_of(cluster, f"rel-triton-{kind}") for kind in ("h100", "l4")} == {snapshot_of(rollout).after}


def test_a_roll_back_that_fails_says_what_to_do(
    deployed: FakeCluster, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed.behaviour = waiting("ImagePullBackOff", "no")
    patches = []

    def refuse(method: str, _path: str) -> tuple[int, str] | None:
        patches.extend([method] if method == "PATCH" else [])
        return (403, "forbidden") if len(patches) > 1 and method == "PATCH" else None

    deployed.refuse = refuse
    monkeypatch.setattr(cluster_api, "_SILENCE_S", 0.05)
    with pytest.raises(RollbackFailedError) as caught:
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    command = "kubectl set env deployment/rel-triton -n models -c triton MODEL_REPOSITORY=/models/repository"
    assert command in str(caught.value.hint)


def test_somebody_elses_roll_out_is_left_alone(deployed: FakeCluster, repository: Path) -> None:
    def other(item: Any) -> None:
        item["spec"]["template"]["metadata"]["annotations"]["repo-manager/snapshot"] = "s3://their/own"
        item["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = "s3://their/own"

    deployed.on_patch = other
    with pytest.raises(RolloutUndoneError, match="Nothing was put back: rel-triton serves s3://their/own, to which"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert url_of(deployed) == "s3://their/own"


def test_somebodys_rollout_undo_is_what_was_to_be_undone(deployed: FakeCluster, repository: Path, api: Api) -> None:
    """`kubectl rollout undo` puts the template back, and leaves the Deployment's own annotations."""
    first = deploy(repository, "scale", 2, TARGET, options=QUICK)
    template = copy.deepcopy(template_of(deployed))
    undone: list[bool] = []

    def undo(item: Any) -> None:
        if not undone:
            undone.append(True)
            item["spec"]["template"] = copy.deepcopy(template)

    deployed.on_patch = undo
    with pytest.raises(RolloutUndoneError, match="previous state was put back"):
        deploy(repository, "scale", 3, TARGET, options=QUICK)
    assert template_of(deployed) == template
    deployed.on_patch = lambda _: None
    deploy(repository, "scale", 3, TARGET, options=QUICK)
    deployed.deployment("models", "rel-triton")["spec"]["template"] = copy.deepcopy(template)
    assert url_of(deployed) == snapshot_of(first).after
    with pytest.raises(RepositoryError, match="no earlier roll-out"):  # the first template named no models
        previous_on_kubernetes(Release.parse(TARGET), "other", api)
    assert previous_on_kubernetes(Release.parse(TARGET), "scale", api) == 1, "not 2, which is served"


def test_pods_that_die_and_an_autoscaler_do_not_end_it(deployed: FakeCluster, repository: Path) -> None:
    real = deployed.patch
    moved: list[int] = []

    def late(key: Any, patch: Any, *, strategic: bool) -> Any:
        if len(moved) < 3:
            moved.append(1)
            touch(deployed.objects[key])
            deployed.objects[key]["spec"]["replicas"] += 1
            deployed.objects[key]["metadata"]["generation"] += 1
        return real(key, patch, strategic=strategic)

    deployed.patch = late  # type: ignore[method-assign]
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed
    assert deployed.deployment("models", "rel-triton")["spec"]["replicas"] == 5


def test_what_a_pinned_snapshot_holds_is_read_from_it(deployed: FakeCluster, repository: Path, tmp_path: Path) -> None:
    """GitOps pins a snapshot and knows nothing of annotations; the repository's policy has moved on since."""
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    note = "repo-manager/models"
    template_of(deployed)["metadata"]["annotations"][note] = '{"other": [2], "scale": [1]}'
    publish_scaling(repository, "other", [6.0], tmp_path)
    set_served_versions(repository, "other", [2])
    assert snapshot_of(deploy(repository, "scale", 3, TARGET, options=QUICK)).models == {"other": (1,), "scale": (3,)}
    assert note not in template_of(deployed)["metadata"]["annotations"], "what earlier versions wrote beside it is gone"
    plan = deploy(repository, "scale", 1, TARGET, options=RolloutOptions(dry_run=True))
    assert snapshot_of(plan).models == {"other": (1,), "scale": (1,)}
    shutil.rmtree(repository.parent / "repository.snapshots")
    with pytest.raises(RepositoryError, match="the versions of its other models are not known"):
        deploy(repository, "scale", 1, TARGET, options=QUICK)


def test_a_repository_that_is_served_itself_is_pinned_and_said_so(deployed: FakeCluster, repository: Path) -> None:
    plan = deploy(repository, "scale", 2, TARGET, options=RolloutOptions(dry_run=True))
    assert any("the snapshot pins other:1" in event for event in plan.events)


@pytest.mark.parametrize("code", [401, 403, 404, 503])
def test_an_api_server_that_restarts_does_not_end_it(deployed: FakeCluster, repository: Path, code: int) -> None:
    """It refuses everybody until it has read its rights and kinds."""
    seen = iter(range(1000))

    def refuse(_method: str, _path: str) -> tuple[int, str] | None:
        return (code, "not yet") if 6 < next(seen) < 14 else None

    deployed.refuse = refuse
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed


def test_an_api_server_that_restarts_does_not_end_the_undo(deployed: FakeCluster, repository: Path) -> None:
    deployed.behaviour = waiting("ImagePullBackOff", "no")
    before = copy.deepcopy(template_of(deployed))
    patches: list[str] = []

    def refuse(method: str, _path: str) -> tuple[int, str] | None:
        patches.extend([method] if method == "PATCH" else [])
        return (403, "forbidden") if method == "PATCH" and 1 < len(patches) < 6 else None

    deployed.refuse = refuse
    with pytest.raises(RolloutUndoneError, match="put back"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert template_of(deployed) == before


def test_a_deployment_that_is_deleted_is_said_so_at_once(deployed: FakeCluster, repository: Path) -> None:
    deployed.on_patch = lambda _: deployed.remove(("deployments", "models", "rel-triton"))
    with pytest.raises(RollbackFailedError, match="was deleted during the roll-out"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)


def test_a_large_deployment_has_the_time_for_each_pod(cluster: FakeCluster, repository: Path) -> None:
    """Sixteen pods of 0.2 s, one after the other, where one alone may take 2 s."""
    item = triton_deployment()
    item["spec"]["replicas"] = 16
    cluster.add(item)
    due: list[float] = [0.0]

    def slow(made: FakeCluster, deployment: Any, pod: Any) -> None:
        unschedulable(made, deployment, pod)
        due[0] = time.monotonic() + 0.2

    def become_ready(deployment: Any) -> None:
        for pod in cluster.pods:
            if time.monotonic() > due[0] and pod["status"]["phase"] == "Pending":
                ready(cluster, deployment, pod)

    cluster.behaviour, cluster.on_read = slow, become_ready
    began = time.monotonic()
    assert deploy(repository, "scale", 2, TARGET, options=RolloutOptions(load_timeout_s=2.0, deadline_s=2.0)).changed
    assert time.monotonic() - began > 3.0


def test_somebody_who_was_faster_is_told_and_nothing_is_changed(deployed: FakeCluster, repository: Path) -> None:
    real = deployed.patch

    def late(key: Any, patch: Any, *, strategic: bool) -> Any:
        deployed.objects[key]["metadata"]["resourceVersion"] = "99"
        deployed.objects[key]["spec"]["minReadySeconds"] = 30
        return real(key, patch, strategic=strategic)

    deployed.patch = late  # type: ignore[method-assign]
    before = copy.deepcopy(template_of(deployed))
    with pytest.raises(ServerRefusedError, match=r"changed by somebody else since it was read.*409"):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert template_of(deployed) == before


def test_an_api_server_that_is_away_for_a_moment_does_not_end_it(deployed: FakeCluster, repository: Path) -> None:
    count = iter(range(1000))

    def refuse(method: str, _path: str) -> tuple[int, str] | None:
        return (503, "etcd is changing its leader") if method == "GET" and 3 < next(count) < 9 else None

    deployed.refuse = refuse
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed


def test_a_plain_deployment_with_the_url_in_its_arguments(cluster: FakeCluster, repository: Path) -> None:
    item = triton_deployment("plain", release="none")
    item["metadata"]["labels"] = item["metadata"]["annotations"] = {}
    container = item["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["tritonserver", "--model-store", "s3://bucket/models/"]
    container["args"] = ["--load-model=scale"]
    cluster.add(item)
    rollout = deploy(repository, "scale", 2, "k8s://models/plain", options=QUICK)
    assert snapshot_of(rollout).models == {"scale": (2,)}, "only what it loads"
    made = template_of(cluster, "plain")["spec"]["containers"][0]
    assert made["command"] == ["tritonserver", "--model-store", snapshot_of(rollout).after]
    assert snapshot_of(rollout).after.startswith("s3://bucket/models.snapshots/")
    again = deploy(repository, "scale", 3, "k8s://models/plain", options=QUICK)
    assert snapshot_of(again).after.startswith("s3://bucket/models.snapshots/")


def test_a_deployment_with_a_warm_start_is_told_in_its_sidecar(
    cluster: FakeCluster, repository: Path, api: Api
) -> None:
    item = triton_deployment()
    pod = item["spec"]["template"]["spec"]
    server = pod["containers"][0]
    sidecar = {"name": "snapshot", "image": "repo-manager:0.1.0", "env": server["env"][:1], "restartPolicy": "Always"}
    pod["initContainers"] = [{**sidecar, "args": ["$(MODEL_REPOSITORY)", "--link=/snapshot/models"]}]
    server |= {"env": server["env"][1:], "args": ["--model-repository=/snapshot/models", "--load-model=*"]}
    cluster.add(item)
    before = copy.deepcopy(item["spec"]["template"]["spec"])
    done = deploy(repository, "scale", 2, TARGET, options=QUICK)
    (change,) = [server.snapshot for server in done.servers]
    assert change is not None
    after = cluster.deployment("models", "rel-triton")["spec"]["template"]["spec"]
    assert after["initContainers"][0]["env"] == [{"name": "MODEL_REPOSITORY", "value": change.after}]
    assert after["containers"] == before["containers"]
    assert cluster_status(repository, TARGET, api).parts[0].owners["snapshot"] == "repo-manager"
    cluster.behaviour = waiting("CrashLoopBackOff", "back-off", restarts=3)
    with pytest.raises(RolloutUndoneError, match="CrashLoopBackOff"):
        deploy(repository, "scale", 3, TARGET, options=QUICK)
    assert cluster.deployment("models", "rel-triton")["spec"]["template"]["spec"] == after


def test_roll_outs_are_events_of_the_deployment(deployed: FakeCluster, repository: Path) -> None:
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    deployed.behaviour = waiting("ImagePullBackOff", "no such image")
    with pytest.raises(RolloutUndoneError):
        deploy(repository, "scale", 3, TARGET, options=QUICK)
    found = [(event["reason"], event["type"]) for event in deployed.events]
    assert found == [
        ("RolloutStarted", "Normal"),
        ("RolloutDone", "Normal"),
        ("RolloutStarted", "Normal"),
        ("RolloutUndone", "Warning"),
    ]
    about = deployed.events[0]["involvedObject"]
    assert (about["kind"], about["name"], about["namespace"]) == ("Deployment", "rel-triton", "models")
    assert deployed.events[0]["message"].startswith(
        "deploy scale:2: /models/repository -> /models/repository.snapshots/"
    )


def test_events_that_may_not_be_written_end_no_roll_out(deployed: FakeCluster, repository: Path) -> None:
    deployed.refuse = lambda method, path: (403, "events is forbidden") if method == "POST" else None
    done = deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert [event for event in done.events if "no Events are written of rel-triton" in event]
    assert len([request for request in deployed.requests if request[0] == "POST"]) == 1


def test_a_roll_out_owns_one_field_of_the_template_and_an_undo_restores_the_very_same(
    deployed: FakeCluster, repository: Path
) -> None:
    before = copy.deepcopy(template_of(deployed))
    assert "repo-manager/snapshot" in before["metadata"]["annotations"], "as earlier versions of the chart made it"
    deployed.behaviour = waiting("ImagePullBackOff", "no such image")
    with pytest.raises(RolloutUndoneError):
        deploy(repository, "scale", 2, TARGET, options=QUICK)
    assert template_of(deployed) == before
    deployed.behaviour = ready
    deploy(repository, "scale", 2, TARGET, options=QUICK)
    (fields,) = (
        entry["fieldsV1"]
        for entry in deployed.deployment("models", "rel-triton")["metadata"]["managedFields"]
        if entry["manager"] == "repo-manager"
    )
    assert fields["f:spec"] == {
        "f:template": {
            "f:spec": {
                "f:containers": {'k:{"name":"triton"}': {"f:env": {'k:{"name":"MODEL_REPOSITORY"}': {"f:value": {}}}}}
            }
        }
    }
