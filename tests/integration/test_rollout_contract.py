"""The contract of every roll-out on every target: after any fault at any step the previous state is back.

Triton servers are real; Kubernetes and KServe answer from a fake API server over real HTTP.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from support.fake_cluster import ServedCluster
from support.kserve_controller import Controller
from support.serving import SCALING_CONFIG, running_server, scaling_model, write_model
from support.triton_deployment import publish_scaling, triton_deployment
from support.waiting import PAUSE_S

from repo_manager.errors import (
    GateError,
    InconclusiveError,
    RepoManagerError,
    RepositoryError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
    ServerUnreachableError,
)
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.disk import DiskStore
from repo_manager.repository.tags import model_state
from repo_manager.rollout import engine
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import Amount, RolloutOptions, TrialOptions, parse_gates
from repo_manager.rollout.plan import VersionFate
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets import api as cluster_api
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.base import Target
from repo_manager.rollout.targets.kserve import KServeTarget
from repo_manager.rollout.targets.kubernetes import DeploymentPart
from repo_manager.rollout.targets.triton_part import TritonPart
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
X = np.ones((1, 4), np.float32)
TRAFFIC = "traffic"
POLICY = "version_policy { specific { versions: [1] } }\n"


class BoomError(Exception):
    """An error nobody expects."""


class Place(Protocol):
    """A target with version 1 of a model served, and a version 2."""

    repository: Path
    name: str
    part: type
    """The class of the target's parts."""

    def deploy(self, version: int, **how: Any) -> Rollout: ...

    def rollback(self) -> Rollout: ...

    def state(self) -> Any:
        """Return everything a roll-out may change, without the history of deployments."""


class Servers:
    """One or more Triton servers, with or without a trial."""

    part: type = TritonPart

    def __init__(self, repository: Path, name: str, clients: Sequence[TritonClient], options: RolloutOptions) -> None:
        self.repository, self.name = repository, name
        self._clients, self._options = clients, options
        self.trial: TrialOptions | None = None

    def deploy(self, version: int, **how: Any) -> Rollout:
        how.setdefault("options", self._options)
        return deploy(self.repository, self.name, version, self._clients, trial=how.pop("trial", self.trial), **how)

    def rollback(self) -> Rollout:
        return rollback(self.repository, self.name, self._clients, options=self._options)

    def answers(self) -> list[float]:
        """Each server's answer to a request without a version."""
        return [float(client.infer(self.name, None, {"x": X})["y"][0, 0]) for client in self._clients]

    def state(self) -> Any:
        config = (self.repository / self.name / "config.pbtxt").read_bytes()
        return config, [observe(client, self.name).ready for client in self._clients]


class InCluster:
    """A release, or an InferenceService."""

    def __init__(self, served: ServedCluster, repository: Path, to: str, trial: TrialOptions | None = None) -> None:
        self.repository, self.name, self._to, self._cluster = repository, "scale", to, served.cluster
        self.part: type = KServeTarget if to.startswith("kserve") else DeploymentPart
        self.trial = trial

    def deploy(self, version: int, **how: Any) -> Rollout:
        how.setdefault("options", RolloutOptions(load_timeout_s=20.0))
        return deploy(self.repository, self.name, version, self._to, trial=how.pop("trial", self.trial), **how)

    def rollback(self) -> Rollout:
        return rollback(self.repository, self.name, self._to, options=RolloutOptions(load_timeout_s=20.0))

    def state(self) -> Any:
        def kept(item: dict[str, Any]) -> Any:
            meta = {key: value for key, value in item["metadata"].items() if key in ("name", "labels")}
            annotations = {k: v for k, v in (item["metadata"].get("annotations") or {}).items() if v is not None}
            return copy.deepcopy((meta, annotations, item["spec"]))

        return [kept(item) for _, item in sorted(self._cluster.objects.items())]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[EmbeddedServer]]]:
    """An empty repository, and two servers of it."""
    root = tmp_path_factory.mktemp("contract")
    options = ServerOptions(repository=str(root), auto_complete=False)
    with running_server(options) as first, running_server(options) as second:
        yield root, [first, second]


KINDS = (
    "one server",
    "two servers",
    "two servers at once",
    "canary",
    "k8s",
    "k8s, two kinds",
    "kserve",
    "kserve canary",
)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Every target in turn; version 1 is deployed."""
    with contextlib.ExitStack() as stack:
        if request.param.startswith(("k8s", "kserve")):
            made: Place = stack.enter_context(_in_cluster(request.param, tmp_path, monkeypatch))
        else:
            made = stack.enter_context(_on_servers(request.param, *request.getfixturevalue("servers")))
        made.deploy(1, trial=None)
        yield made


@contextlib.contextmanager
def _on_servers(kind: str, root: Path, running: list[EmbeddedServer]) -> Iterator[Servers]:
    count = 2 if kind.startswith("two") else 1
    name = f"m{len(list(root.glob('m*')))}"
    write_model(root, name, SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    options = RolloutOptions(batch=Amount(2 if kind.endswith("at once") else 1), reconnect_timeout_s=2.0)
    with contextlib.ExitStack() as stack:
        urls = [server.http_url if index else server.grpc_url for index, server in enumerate(running[:count])]
        clients = [stack.enter_context(TritonClient.connect(url)) for url in urls]
        made = Servers(root, name, clients, options)
        if kind == "canary":
            made.trial = TrialOptions((0.5, 1.0), step_s=0.6, gates=parse_gates("errors<60%"))
            stack.enter_context(_traffic(running[0].grpc_url, name))
        yield made
        for client in clients:
            client.unload(name)


@contextlib.contextmanager
def _traffic(url: str, name: str) -> Iterator[None]:
    """Ask for the model all the time. Requests without a version go to the highest one served."""
    stop = threading.Event()

    def ask() -> None:
        with TritonClient.connect(url) as client:
            while not stop.is_set():
                with contextlib.suppress(ServerRefusedError):  # not loaded yet
                    client.infer(name, None, {"x": X})
                stop.wait(PAUSE_S)

    thread = threading.Thread(target=ask, name=TRAFFIC)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _in_cluster(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InCluster]:
    publish_scaling(folder / "repository", "scale", [2.0, 3.0], folder)
    served = ServedCluster(folder)
    monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig))
    monkeypatch.setattr(cluster_api, "_POLL_S", 0.005)
    to, trial = "k8s://models/rel", None
    if kind.startswith("kserve"):
        Controller(served.cluster)
        to = "kserve://models/digits"
        trial = TrialOptions((0.1, 1.0), step_s=0.02) if kind.endswith("canary") else None
    else:
        for name in ("rel-a", "rel-b") if kind.endswith("kinds") else ("rel-triton",):
            served.cluster.add(triton_deployment(name))
    try:
        yield InCluster(served, folder / "repository", to, trial)
    finally:
        served.stop()


@contextlib.contextmanager
def broken(place: Place, step: str, error: BaseException, *, after: bool = False) -> Iterator[None]:
    """Let a step of the target's parts raise, before or after it has done its work; `record`: the engine's."""
    owner, name = (engine, "record_deployment") if step == "record" else (place.part, step)

    def fail() -> None:
        raise error

    with acting(owner, name, fail, after=after):
        yield


@contextlib.contextmanager
def acting(owner: Any, name: str, act: Callable[[], None], *, after: bool = False) -> Iterator[None]:
    """Do something before or after each call of a function."""
    real = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if not after:
            act()
        result = real(*arguments, **named)
        if after:
            act()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def tell(number: int, act: Callable[[], None], *, for_good: bool = False) -> Callable[[str], None]:
    """Make a report function that acts at the event of this number, and with `for_good` at every later one."""
    seen = iter(range(10**6))

    def report(_event: str) -> None:
        count = next(seen)
        if count == number or (for_good and count > number):
            act()

    return report


def boom() -> None:
    raise BoomError


def interrupt() -> None:
    raise KeyboardInterrupt


STEPS = [(step, after) for step in ("apply", "prove", "finish", "record") for after in (False, True)]


@pytest.mark.parametrize(("step", "after"), STEPS)
def test_an_unexpected_error_at_any_step_ends_in_undo(place: Place, step: str, after: bool) -> None:
    before = place.state()
    told: list[str] = []
    with broken(place, step, BoomError("a fault of ours"), after=after), pytest.raises(BoomError):
        place.deploy(2, report=told.append)
    assert place.state() == before
    assert any("previous state was put back" in event for event in told) or (step, after) == ("apply", False)
    assert place.deploy(2).ready == (2,)


class Calls:
    """Counts a roll-out's calls to servers, cluster and store, and lets one of them fail, once."""

    def __init__(self, fails: int = -1) -> None:
        self.count, self.failed, self._fails, self._lock = 0, False, fails, threading.Lock()

    def __enter__(self) -> Calls:
        self._patch = pytest.MonkeyPatch()
        for owner in (TritonClient, Api, DiskStore):
            for name, call in vars(owner).items():
                if inspect.isfunction(call) and not name.startswith("_") and name not in ("another", "close"):
                    self._patch.setattr(owner, name, self._counted(call))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread().name == TRAFFIC:
                return call(*arguments, **named)
            with self._lock:
                number, self.count = self.count, self.count + 1
            # It fails either before its effect or after it. The next one fails the other way.
            if number == self._fails and number % 2:
                self.failed = True
                raise BoomError(call.__qualname__)
            result = call(*arguments, **named)  # an error of the call itself, not ours
            if number == self._fails:
                self.failed = True
                raise BoomError(call.__qualname__)
            return result

        return counted


def test_an_unexpected_error_of_any_call_ends_in_undo(place: Place) -> None:
    before = place.state()
    with Calls() as all_:
        place.deploy(2)
    place.deploy(1, trial=None)
    assert place.state()[0] == before[0] or isinstance(place, InCluster)  # a cluster remembers its history
    before = place.state()
    for number in sorted({round(each) for each in np.linspace(0, all_.count - 1, 8)}):
        with Calls(number) as calls, contextlib.suppress(BoomError):
            place.deploy(2)
            assert not calls.failed
        if not calls.failed:  # one poll less than before, or an error of the call itself, as expected there
            place.deploy(1, trial=None)
            before = place.state()
        assert place.state() == before, number


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_an_unexpected_error_at_any_event_ends_in_undo(place: Place, for_good: bool) -> None:
    """The report function is the caller's: it may break, a closed pipe for instance, and stay broken."""
    before = place.state()
    events = len(place.deploy(2).events)
    place.deploy(1, trial=None)
    assert place.state()[0] == before[0] or events
    before = place.state()
    for number in range(min(events, 6)):
        with pytest.raises(BoomError):
            place.deploy(2, report=tell(number, boom, for_good=for_good))
        assert place.state() == before, number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_in_undo(place: Place, number: signal.Signals) -> None:
    before = place.state()
    left = [number]

    def send() -> None:
        if left:
            os.kill(os.getpid(), left.pop())

    undone = pytest.raises(RolloutUndoneError, match=r"(?s)interrupted.*previous state was put back")
    with acting(place.part, "prove", send, after=True), undone as caught:
        place.deploy(2)
    assert caught.value.exit_code == 5
    assert place.state() == before


def test_an_interruption_at_any_event_ends_in_undo(place: Place) -> None:
    before = place.state()
    events = len(place.deploy(2).events)
    place.deploy(1, trial=None)
    before = before if isinstance(place, Servers) else place.state()  # a cluster remembers its history
    for number in sorted({round(each) for each in np.linspace(0, events - 1, 4)}):
        told: list[str] = []
        act = tell(number, interrupt)
        # The plan is reported before anything is touched: then there is nothing to undo.
        with pytest.raises((RolloutUndoneError, KeyboardInterrupt)) as caught:
            place.deploy(2, report=lambda event, told=told, act=act: (told.append(event), act(event)))
        assert "interrupted" in str(caught.value) or all("plan: " in event for event in told)
        assert place.state() == before, number


def test_an_interruption_of_the_undo_says_how_to_go_on(place: Place) -> None:
    def report(event: str) -> None:
        if "plan: " not in event:  # reported before anything is touched
            interrupt()

    with pytest.raises(RepoManagerError, match="interrupted") as caught:
        place.deploy(2, report=report)
    assert caught.value.exit_code in (5, 7)
    if isinstance(place, Servers):
        assert set(place.answers()) == {2.0}
    assert place.deploy(2, trial=None).ready == (2,)


@pytest.mark.parametrize("step", ["prove", "finish"])
def test_a_refusal_ends_in_undo_and_is_told(place: Place, step: str) -> None:
    before = place.state()
    refused = ServerRefusedError("no room for it")
    with broken(place, step, refused), pytest.raises(RolloutUndoneError, match=r"(?s)no room for it.*put back"):
        place.deploy(2)
    assert place.state() == before


def test_a_gate_keeps_its_exit_code(place: Place) -> None:
    before = place.state()
    with broken(place, "prove", GateError("p99 is worse"), after=True), pytest.raises(GateError) as caught:
        place.deploy(2)
    assert "put back" in caught.value.message
    assert place.state() == before


def test_a_deadline_that_has_passed_ends_in_undo(place: Place) -> None:
    """It passes while the first event is told; the trial's time is no part of it."""
    before = place.state()
    options = RolloutOptions(deadline_s=0.4, load_timeout_s=20.0)
    passed = threading.Event()
    trial = None if isinstance(place, Servers) else getattr(place, "trial", None)
    with pytest.raises((RolloutUndoneError, ServerUnreachableError), match="of --timeout"):
        place.deploy(2, options=options, trial=trial, report=tell(0, lambda: bool(passed.wait(0.7))))  # type: ignore[func-returns-value]
    assert place.state() == before


def test_a_server_for_which_no_time_is_left_is_not_one_that_may_be_missing(
    servers: tuple[Path, list[EmbeddedServer]],
) -> None:
    def dawdle(event: str) -> None:
        if "serves it (1 of 2)" in event:  # the second server still has both versions
            time.sleep(options.deadline_s)

    options = RolloutOptions(deadline_s=4.0, max_unavailable=Amount(1))
    with _on_servers("two servers", *servers) as place:
        place.deploy(1)
        before = place.state()
        with pytest.raises(RolloutUndoneError, match=r"of --timeout|did not answer within"):
            place.deploy(2, options=options, report=dawdle)
        assert place.state() == before


def test_another_roll_out_of_the_model_is_refused(place: Place) -> None:
    refusals: list[RepositoryError] = []

    def again() -> None:
        with pytest.raises(RepositoryError, match="another roll-out") as caught:
            place.deploy(1, trial=None)
        refusals.append(caught.value)

    assert place.deploy(2, report=tell(0, again)).ready == (2,)
    assert len(refusals) == 1
    assert list(place.repository.glob(f".repo-manager.rollout.{place.name}.*")) == []


def test_a_lease_that_somebody_else_took_ends_it_and_leaves_theirs_alone(place: Place) -> None:
    """Somebody removed the lock by hand, and somebody else rolls the model out by now."""
    lock, before = place.repository / f".repo-manager.rollout.{place.name}.lock", place.state()
    with contextlib.ExitStack() as stack:

        def take() -> None:
            with one_at_a_time:
                if not taken:
                    lock.unlink()
                    stack.enter_context(open_store(place.repository).lease(place.name, timeout_s=0.0))
                    taken.append(True)

        one_at_a_time, taken = threading.Lock(), list[bool]()
        lost = pytest.raises(RollbackFailedError, match=r"(?s)lease of \S+ was lost.*Putting the previous.*lease")
        with acting(place.part, "prove", take, after=True), lost as caught:
            place.deploy(2)
        assert "By hand: " in str(caught.value.hint)
        assert place.state() != before
        assert lock.exists(), "theirs"
    assert place.deploy(1, trial=None).ready == (1,)


@pytest.mark.parametrize("error", [BoomError("the undo is broken"), ServerRefusedError("no"), OSError("disk")])
def test_an_undo_that_fails_says_what_to_do(place: Place, error: Exception) -> None:
    with (
        broken(place, "finish", ServerRefusedError("no room for it")),
        broken(place, "undo", error),
        pytest.raises(RollbackFailedError, match="Putting the previous state back failed") as caught,
    ):
        place.deploy(2)
    assert caught.value.exit_code == 7
    assert "no room for it" in caught.value.message
    assert "By hand: " in str(caught.value.hint)
    # To go on, run the same command again.
    assert place.deploy(2, trial=None).ready == (2,)


def test_an_undo_that_fails_after_an_unexpected_error_is_told_as_such(place: Place) -> None:
    with (
        broken(place, "finish", BoomError("a fault of ours")),
        broken(place, "undo", BoomError("and another")),
        pytest.raises(RollbackFailedError, match=r"(?s)a fault of ours.*and another") as caught,
    ):
        place.deploy(2)
    assert isinstance(caught.value.__cause__, BoomError)


def test_one_shape_for_every_target(place: Place) -> None:
    before = place.state()
    planned = place.deploy(2, options=RolloutOptions(dry_run=True))
    assert (planned.dry_run, planned.changed) == (True, False)
    assert [server.smoke for server in planned.servers] == [None] * len(planned.servers)
    if isinstance(place, Servers):
        plans = [[(step.version, step.action) for step in server.plan.steps] for server in planned.servers]  # type: ignore[union-attr]
        assert plans == [[(1, VersionFate.DROP), (2, VersionFate.LOAD)]] * len(plans)
    assert place.state() == before
    done = place.deploy(2)
    assert (done.changed, done.ready, done.target) == (True, (2,), planned.target)
    assert all(server.proof in ("inference", "readiness", "conditions") for server in done.servers)
    assert (done.trial is None) == (planned.trial is None)
    assert model_state(place.repository, place.name).deployments[-1].version == 2
    if done.trial is not None:  # a version served alone already cannot be tried
        with pytest.raises(InconclusiveError, match="cannot be tried"):
            place.deploy(2)
    again = place.deploy(2, trial=None)
    assert (again.changed, again.ready) == (False, (2,))
    assert place.state() != before


def test_what_is_served_and_does_not_prove_itself_is_left_alone(place: Place) -> None:
    before = place.state()
    with broken(place, "prove", BoomError("a fault of ours")), pytest.raises(BoomError):
        place.deploy(1, trial=None)
    assert place.state() == before


def test_a_model_or_version_that_is_not_there_is_refused(place: Place) -> None:
    with pytest.raises(RepositoryError, match="no version 9"):
        place.deploy(9)


def test_going_back_is_a_roll_out_to_the_version_before(place: Place) -> None:
    with pytest.raises(RepositoryError, match="no earlier"):
        place.rollback()
    place.deploy(2)
    back = place.rollback()
    assert (back.changed, back.version, back.ready) == (True, 1, (1,))
    assert [each.version for each in model_state(place.repository, place.name).deployments] == [1, 2, 1]
    if isinstance(place, Servers):
        assert set(place.answers()) == {2.0}


def test_going_back_after_somebody_elses_roll_out_is_told_and_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous version is looked up first, and another one is deployed before the roll-out begins."""
    for version in (2, 1):
        place.deploy(version, trial=None)
    real, between = engine.run, [2]

    def late(target: Target, context: RolloutContext) -> Rollout:
        if between:
            place.deploy(between.pop(), trial=None)
        return real(target, context)

    monkeypatch.setattr(engine, "run", late)
    with pytest.raises(
        RepositoryError, match="deployed by somebody else at the same time: the version before is 1 now, not 2"
    ):
        place.rollback()
    assert model_state(place.repository, place.name).deployments[-1].version == 2
