"""Deploying and going back on a real tritonserver, with realistic faults."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model
from support.waiting import PAUSE_S, eventually

from repo_manager.errors import RollbackFailedError, RolloutUndoneError, ServerRefusedError, ServerUnreachableError
from repo_manager.pipeline.adding import add
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.golden import Golden, write_golden
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy, rollback, undeploy
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import Amount, RolloutOptions
from repo_manager.rollout.plan import VersionFate, plan_deploy
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.smoke import SmokeFailedError
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.triton_config.problems import Severity

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
StartServer = Callable[[ServerOptions], EmbeddedServer]
X = np.ones((1, 4), np.float32)
POLICY = "version_policy { specific { versions: [1] } }  # a comment that stays\n"


@pytest.fixture
def model(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model of three versions (factors 2, 3, 4), none of them loaded; unloaded afterwards."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:60]
    versions = {1: scaling_model(2.0), 2: scaling_model(3.0), 3: scaling_model(4.0)}
    write_model(repository, name, SCALING_CONFIG + POLICY, versions)
    yield name
    client.unload(name)


def test_a_model_is_deployed_with_the_dims_that_a_person_gave_it(
    repository: Path, client: TritonClient, tmp_path: Path
) -> None:
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", "a", "b"]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "free.onnx")
    add(tmp_path / "free.onnx", "free", repository)
    change_config(repository, "free", {"input[0].dims": "[4, 5]"})  # the golden sample has other sizes
    assert [each for each in verify(repository, "free") if each.severity is Severity.ERROR] == []
    narrow = deploy(repository, "free", 1, client).servers[0].smoke
    assert narrow is not None
    assert (narrow.reference, narrow.outputs[0].error) == ("onnxruntime", 0.0)
    batchless = {"max_batch_size": "0", "dynamic_batching": None, "input[0].dims": "[-1, -1, -1]"}
    change_config(repository, "free", {**batchless, "output[0].dims": "[-1, -1, -1]"})
    whole = deploy(repository, "free", 1, client).servers[0].smoke
    assert whole is not None
    assert (whole.reference, whole.outputs[0].error) == ("golden", 0.0)
    client.unload("free")


def answer(client: TritonClient, name: str) -> float:
    return float(client.infer(name, None, {"x": X})["y"][0, 0])


def ready(client: TritonClient, name: str) -> tuple[int, ...]:
    return observe(client, name).ready


def actions(rollout: Rollout) -> list[tuple[int, VersionFate]]:
    """Return the only server's planned action for each version."""
    (server,) = rollout.servers
    assert server.plan is not None
    return [(step.version, step.action) for step in server.plan.steps]


class Load:
    """Closed-loop clients of one model, with all their answers and errors."""

    def __init__(self, server: EmbeddedServer, name: str) -> None:
        self.errors: list[str] = []
        self.answers: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server.grpc_url, name)) for _ in range(3)]

    def _ask(self, url: str, name: str) -> None:
        with TritonClient.connect(url) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append((time.monotonic(), answer(client, name)))
                except ServerRefusedError as exc:
                    self.errors.append(str(exc))
                self._stop.wait(PAUSE_S)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_first_second_and_back(repository: Path, client: TritonClient, model: str) -> None:
    first = deploy(repository, model, 1, client)
    assert (first.changed, first.ready, first.servers[0].previous) == (True, (1,), ())
    assert first.servers[0].smoke is not None
    assert first.servers[0].smoke.reference == "onnxruntime"
    assert [each.error for each in first.servers[0].smoke.outputs] == [0.0]
    second = deploy(repository, model, 2, client)
    assert [(step.version, step.action) for step in second.servers[0].plan.steps] == [
        (1, VersionFate.DROP),
        (2, VersionFate.LOAD),
    ]
    assert (second.ready, answer(client, model)) == ((2,), 3.0)
    back = rollback(repository, model, client)
    assert (back.version, ready(client, model), answer(client, model)) == (1, (1,), 2.0)
    assert [each.version for each in model_state(repository, model).deployments] == [1, 2, 1]


def test_the_first_deploy_can_be_taken_back_to_what_somebody_else_served(
    repository: Path, client: TritonClient, model: str
) -> None:
    set_served_versions(repository, model, (1,))
    client.load(model)
    assert deploy(repository, model, 2, client).servers[0].previous == (1,)
    back = rollback(repository, model, client)
    assert (back.version, ready(client, model), answer(client, model)) == (1, (1,), 2.0)
    assert [each.version for each in model_state(repository, model).deployments] == [1, 2, 1]


def test_what_is_deployed_is_not_touched(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    before = (repository / model / "config.pbtxt").stat().st_mtime_ns
    assert eventually(lambda: client.statistics(model, 1)[0].inference_count == 1)
    again = deploy(repository, model, 1, client)
    assert not again.changed
    plan = again.servers[0].plan
    assert plan is not None
    assert not plan.changes
    assert (repository / model / "config.pbtxt").stat().st_mtime_ns == before
    assert eventually(lambda: client.statistics(model, 1)[0].inference_count == 2)


def test_no_request_fails_during_switches(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str
) -> None:
    deploy(repository, model, 1, client)
    with Load(server, model) as load:
        for version in (2, 3, 1, 2):
            deploy(repository, model, version, client)
            assert ready(client, model) == (version,)
    assert load.errors == []
    assert {value for _, value in load.answers} == {2.0, 3.0, 4.0}


def test_kept_previous_makes_going_back_a_policy_change(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    kept = deploy(repository, model, 2, client, options=RolloutOptions(keep_previous=True))
    assert kept.ready == (1, 2)
    back = rollback(repository, model, client)
    assert actions(back) == [(1, VersionFate.KEEP), (2, VersionFate.DROP)]
    assert ready(client, model) == (1,)


def test_a_corrupt_version_leaves_the_old_one_serving(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str
) -> None:
    deploy(repository, model, 1, client)
    before = (repository / model / "config.pbtxt").read_bytes()
    write_model(repository, model, None, {4: b"no model"})
    with Load(server, model) as load, pytest.raises(RolloutUndoneError, match=r"(?s)model\.onnx failed.*version 1"):
        deploy(repository, model, 4, client)
    assert load.errors == []
    assert (repository / model / "config.pbtxt").read_bytes() == before
    assert ready(client, model) == (1,)
    assert [each.version for each in model_state(repository, model).deployments] == [1]


def test_a_failing_first_deploy_leaves_nothing_loaded(repository: Path, client: TritonClient) -> None:
    write_model(repository, "hopeless", SCALING_CONFIG, {1: b"no model"})
    before = (repository / "hopeless" / "config.pbtxt").read_bytes()
    with pytest.raises(RolloutUndoneError, match="serves no version"):
        deploy(repository, "hopeless", 1, client)
    assert (repository / "hopeless" / "config.pbtxt").read_bytes() == before


def test_a_wrong_answer_is_undone(repository: Path, client: TritonClient, server: EmbeddedServer, model: str) -> None:
    deploy(repository, model, 1, client)
    golden = Golden({"x": X}, {"y": 3.1 * X})  # version 2 answers 3
    write_golden(repository / model / "2" / "golden.npz", golden)
    with Load(server, model) as load, pytest.raises(RolloutUndoneError, match=r"y is off by 0\.0323, allowed 0\.01"):
        deploy(repository, model, 2, client)
    assert load.errors == []
    assert (ready(client, model), answer(client, model)) == ((1,), 2.0)
    write_golden(repository / model / "2" / "golden.npz", Golden({"x": X}, {"y": 3 * X}))
    result = deploy(repository, model, 2, client)
    assert result.servers[0].smoke is not None
    assert result.servers[0].smoke.reference == "golden"


def test_a_golden_sample_that_the_deployed_version_contradicts_is_told(
    repository: Path, client: TritonClient, model: str
) -> None:
    deploy(repository, model, 1, client)
    write_golden(repository / model / "1" / "golden.npz", Golden({"x": X}, {"y": 5 * X}))
    with pytest.raises(SmokeFailedError, match="y is off by"):
        deploy(repository, model, 1, client)


def test_a_killed_stub_is_reloaded(repository: Path, client: TritonClient, server: EmbeddedServer, model: str) -> None:
    deploy(repository, model, 1, client)
    stubs = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"{repository}/{model}/".encode() in path.read_bytes()
    ]
    assert stubs
    for pid in stubs:
        os.kill(pid, signal.SIGKILL)
    assert ready(client, model) == (1,)
    result = deploy(repository, model, 1, client)
    assert result.servers[0].reloaded
    assert answer(client, model) == 2.0


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.2, 0.8])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_any_moment_leave_one_version(
    repository: Path, client: TritonClient, model: str, number: int, delay_s: float
) -> None:
    deploy(repository, model, 1, client)
    script = (
        "import sys\nfrom pathlib import Path\nfrom repo_manager.rollout.deploy import deploy\n"
        "from repo_manager import TritonClient\n"
        "client = TritonClient.connect(sys.argv[1])\nprint('go', flush=True)\n"
        "deploy(Path(sys.argv[2]), sys.argv[3], 2, client)\nprint('done', flush=True)\n"
    )
    command = [sys.executable, "-c", script, client.url, str(repository), model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    state = observe(client, model)
    if b"done" in output:
        assert state.ready == (2,), errors.decode()
    elif b"RolloutUndoneError" in errors:
        assert state.ready == (1,), errors.decode()
    else:  # the signal came before the roll-out began, or between its end and the script's next line
        assert state.ready in ((1,), (2,)), errors.decode()
    text = (repository / model / "config.pbtxt").read_text()
    assert f"[{state.ready[0]}]" in text
    assert answer(client, model) == {1: 2.0, 2: 3.0}[state.ready[0]]


def test_a_changed_config_is_predicted_to_reload(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    path = repository / model / "config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size: 8", "max_batch_size: 4"))
    plan = plan_deploy(repository, model, 2, client)
    assert [(step.version, step.action) for step in plan.steps] == [(1, VersionFate.DROP), (2, VersionFate.LOAD)]
    plan = plan_deploy(repository, model, 1, client)
    assert [(step.version, step.action) for step in plan.steps] == [(1, VersionFate.RELOAD)]
    deploy(repository, model, 1, client)
    assert client.model_config(model).max_batch_size == 4


def test_a_server_of_another_repository_is_told_apart(
    start_server: StartServer, tmp_path: Path, repository: Path, model: str
) -> None:
    write_model(tmp_path, model, SCALING_CONFIG, {7: scaling_model()})
    other = start_server(ServerOptions(repository=str(tmp_path)))
    with TritonClient.connect(other.grpc_url) as client, pytest.raises(RolloutUndoneError, match="another repository"):
        deploy(repository, model, 1, client)


def test_a_server_killed_during_the_load(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "killed", SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    before = (tmp_path / "killed" / "config.pbtxt").read_bytes()
    server = start_server(ServerOptions(repository=str(tmp_path), load=("killed",)))
    with TritonClient.connect(server.grpc_url) as client:
        killer = threading.Timer(0.4, os.kill, (server.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(ServerUnreachableError, match="as it was before"):
            deploy(tmp_path, "killed", 2, client)
        killer.join()
    assert (tmp_path / "killed" / "config.pbtxt").read_bytes() == before
    again = start_server(ServerOptions(repository=str(tmp_path), load=("killed",)))
    with TritonClient.connect(again.grpc_url) as client:
        assert ready(client, "killed") == (1,)


def test_no_server_changes_nothing(repository: Path, model: str) -> None:
    before = (repository / model / "config.pbtxt").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with TritonClient.connect(f"grpc://127.0.0.1:{port}") as client, pytest.raises(ServerUnreachableError):
        deploy(repository, model, 1, client)
    assert (repository / model / "config.pbtxt").read_bytes() == before


def test_a_failed_way_back_says_what_to_do_by_hand(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    write_model(repository, model, None, {5: b"no model"})

    def sabotage(event: str) -> None:
        if event.startswith("failed"):
            client.unload(model)
            (repository / model / "1" / "model.onnx").write_bytes(b"gone")

    with pytest.raises(RollbackFailedError, match=r"(?s)Putting the previous state back failed") as caught:
        deploy(repository, model, 5, client, report=sabotage)
    assert "By hand: set version_policy" in str(caught.value)
    write_model(repository, model, None, {1: scaling_model(2.0)})
    set_served_versions(repository, model, [1])
    client.load(model)


@pytest.fixture
def fleet(start_server: StartServer, tmp_path: Path) -> list[EmbeddedServer]:
    """Three servers of one repository, serving version 1 of `m`; 2 is good and 3 is broken."""
    versions = {1: scaling_model(2.0), 2: scaling_model(3.0), 3: b"no model"}
    write_model(tmp_path, "m", SCALING_CONFIG + POLICY, versions)
    return [start_server(ServerOptions(repository=str(tmp_path), load=("m",))) for _ in range(3)]


def test_a_fleet_goes_forward_together_and_back_together(fleet: list[EmbeddedServer], tmp_path: Path) -> None:
    clients = [TritonClient.connect(each.grpc_url) for each in fleet]
    done = deploy(tmp_path, "m", 2, clients)
    assert [each.ready for each in done.servers] == [(2,)] * 3
    assert [answer(client, "m") for client in clients] == [3.0] * 3
    assert model_state(tmp_path, "m").deployments[-1].version == 2
    before = (tmp_path / "m" / "config.pbtxt").read_bytes()
    with pytest.raises(RolloutUndoneError, match=r"model\.onnx failed"):
        deploy(tmp_path, "m", 3, clients)
    assert [ready(client, "m") for client in clients] == [(2,)] * 3
    assert (tmp_path / "m" / "config.pbtxt").read_bytes() == before

    def kill_the_last(event: str) -> None:
        if event.startswith(fleet[1].grpc_url) and fleet[2].is_alive():
            os.kill(fleet[2].pid, signal.SIGKILL)
            fleet[2].wait(5.0)

    with pytest.raises(RolloutUndoneError, match="cannot be reached"):
        deploy(tmp_path, "m", 1, clients, report=kill_the_last)
    assert [ready(client, "m") for client in clients[:2]] == [(2,)] * 2
    with pytest.raises(ServerUnreachableError):
        deploy(tmp_path, "m", 1, clients)
    left = deploy(tmp_path, "m", 1, clients, options=RolloutOptions(max_unavailable=Amount(1)))
    assert left.unavailable == (fleet[2].grpc_url,)
    assert [ready(client, "m") for client in clients[:2]] == [(1,)] * 2
    for client in clients:
        client.close()


def test_undeploy_of_one_version_and_of_the_model(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    deploy(repository, model, 2, client, options=RolloutOptions(keep_previous=True))
    planned = undeploy(repository, model, 1, client, options=RolloutOptions(dry_run=True))
    assert (actions(planned), planned.changed, ready(client, model)) == (
        [(1, VersionFate.DROP), (2, VersionFate.KEEP)],
        False,
        (1, 2),
    )
    one = undeploy(repository, model, 1, client)
    assert (one.version, one.servers[0].proof, ready(client, model), answer(client, model)) == (2, "index", (2,), 3.0)
    assert find_model(repository, model).selected == (2,)
    all_of_it = undeploy(repository, model, None, client)
    assert (all_of_it.version, all_of_it.changed, all_of_it.servers[0].ready, ready(client, model)) == (
        None,
        True,
        (),
        (),
    )
    assert not undeploy(repository, model, None, client).changed
    state = model_state(repository, model)
    assert not state.is_deployed
    assert model not in {each.model for each in status(repository, client).models}
    assert [(each.action, each.version, each.before, each.outcome) for each in state.history] == [
        ("deploy", 1, (), "done"),
        ("deploy", 2, (1,), "done"),
        ("undeploy", 1, (1, 2), "done"),
        ("undeploy", None, (2,), "done"),
    ]
    assert rollback(repository, model, client).version == 2
    assert (ready(client, model), answer(client, model)) == ((2,), 3.0)


def test_a_fleet_undeploys_together_or_not_at_all(fleet: list[EmbeddedServer], tmp_path: Path) -> None:
    clients = [TritonClient.connect(each.grpc_url) for each in fleet]
    deploy(tmp_path, "m", 1, clients)

    def kill_the_last(event: str) -> None:
        if "no longer serves it" in event and fleet[2].is_alive():
            os.kill(fleet[2].pid, signal.SIGKILL)
            fleet[2].wait(5.0)

    with pytest.raises(RolloutUndoneError, match="m was not undeployed"):
        undeploy(tmp_path, "m", None, clients, report=kill_the_last)
    assert [(ready(client, "m"), answer(client, "m")) for client in clients[:2]] == [((1,), 2.0)] * 2
    assert model_state(tmp_path, "m").is_deployed
    assert model_state(tmp_path, "m").history[-1].outcome == "undone"
    assert undeploy(tmp_path, "m", None, clients[:2]).changed
    assert [ready(client, "m") for client in clients[:2]] == [()] * 2
    for client in clients:
        client.close()


def test_status_tells_every_difference(repository: Path, client: TritonClient, model: str) -> None:
    (before,) = status(repository, client, (model,)).models
    assert (before.ready, before.deployed, before.differences) == ((), None, ("it was never deployed",))
    deploy(repository, model, 1, client)
    (fine,) = status(repository, client, (model,)).models
    assert (fine.ready, fine.selected, fine.deployed, fine.differences) == ((1,), (1,), 1, ())
    path = repository / model / "config.pbtxt"
    path.write_text(path.read_text().replace("[1]", "[2]").replace("max_batch_size: 8", "max_batch_size: 4"))
    (drifted,) = status(repository, client, (model,)).models
    assert drifted.differences == (
        "version 1 is ready, the policy selects 2",
        "the server runs it with another max_batch_size than config.pbtxt says; deploy applies it",
    )


def test_changed_instances_reach_a_running_server(repository: Path, client: TritonClient, model: str) -> None:
    deploy(repository, model, 1, client)
    stays = client.statistics(model, 1)[0].success_count
    change = change_config(repository, model, {"instance_group.count": "3"})
    assert (change.served, change.reloaded) == ((1,), ())
    (before,) = status(repository, client, (model,)).models
    assert ["instance_group" in found for found in before.differences] == [True]
    applied = deploy(repository, model, 1, client)
    assert (applied.changed, actions(applied)) == (True, [(1, VersionFate.UPDATE)])
    assert [group.count for group in client.model_config(model).instance_group] == [3]
    assert client.statistics(model, 1)[0].success_count > stays  # a version loaded again counts from 0
    (after,) = status(repository, client, (model,)).models
    assert after.differences == ()
    assert not deploy(repository, model, 1, client).changed


def test_instances_that_the_server_refuses_leave_what_was_served(
    repository: Path, client: TritonClient, model: str
) -> None:
    deploy(repository, model, 1, client)
    change_config(repository, model, {"instance_group.kind": "KIND_GPU"})
    with pytest.raises(RolloutUndoneError, match="KIND_GPU"):
        deploy(repository, model, 1, client)
    assert (ready(client, model), answer(client, model)) == ((1,), 2.0)
    assert [group.count for group in client.model_config(model).instance_group] == [1]
