"""Versions on trial on a real tritonserver: in the shadow, and with a growing share of clients' traffic."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.proxies import TcpProxy
from support.python_models import write_python_model
from support.serving import SCALING_CONFIG, scaling_model, write_model
from support.waiting import PAUSE_S

from repo_manager.client import VersionedClient
from repo_manager.errors import (
    GateError,
    InconclusiveError,
    InputError,
    RepoManagerError,
    RolloutUndoneError,
    ServerRefusedError,
    UsageError,
)
from repo_manager.gates import Outcome
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import RolloutOptions, ShadowOptions, TrialOptions, parse_gates
from repo_manager.rollout.trial.shadow import ShadowReport
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
X = np.ones((1, 4), np.float32)
POLICY = "version_policy { specific { versions: [1] } }\n"
# Version 2 answers as version 1 does, version 3 almost, version 4 otherwise.
FACTORS = {1: 2.0, 2: 2.0, 3: 2.001, 4: 3.0}


@pytest.fixture
def model(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model with version 1 served. It is unloaded afterwards."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:60]
    versions = {version: scaling_model(factor) for version, factor in FACTORS.items()}
    write_model(repository, name, SCALING_CONFIG + POLICY, versions)
    client.load(name)
    yield name
    client.unload(name)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Twenty recorded requests."""
    path = tmp_path / "requests.jsonl"
    rows = np.random.default_rng(1).standard_normal((20, 1, 4)).astype(np.float32)
    path.write_text("\n".join(json.dumps({"x": row.tolist()}) for row in rows))
    return path


def shadow(requests: Path, duration_s: float = 20.0, rate_per_s: float = 400.0) -> ShadowOptions:
    return ShadowOptions(requests, rate_per_s=rate_per_s, duration_s=duration_s, workers=4)


def state_of(repository: Path, client: TritonClient, model: str) -> tuple[tuple[int, ...], str]:
    return observe(client, model).ready, (repository / model / "config.pbtxt").read_text()


def test_a_version_that_answers_alike_is_deployed(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    gates = parse_gates("p95<2s, errors<5%, agreement>90%, drift<1e-2")
    reports: list[ShadowReport] = []
    trial = TrialOptions(gates=gates, shadow=shadow(requests), on_shadow=reports.append)
    done = deploy(repository, model, 2, client, trial=trial)
    assert done.trial is not None
    assert done.changed
    assert observe(client, model).ready == (2,)
    assert [each.version for each in model_state(repository, model).deployments][-1] == 2
    assert done.trial is not None
    assert done.trial.shadow is not None
    assert reports == [done.trial.shadow]
    assert done.trial.shadow.outcome is Outcome.PASS
    assert {result.gate for result in done.trial.shadow.gates} == {gate.text for gate in gates}
    # It ends when every gate is decided, long before the 20 s.
    assert done.trial.shadow.pairs >= 50
    assert done.trial.shadow.seconds < 15
    assert (done.trial.shadow.errors_old, done.trial.shadow.errors_new, done.trial.shadow.refused_by_both) == (0, 0, 0)
    (output,) = done.trial.shadow.outputs
    assert (output.output, output.relative_error, output.top1_agreement) == ("y", 0.0, 1.0)


@pytest.mark.parametrize(
    ("version", "gate", "found"), [(4, "drift<1e-2", "drift by 0.01 or more"), (3, "drift<1e-5", "1e-05")]
)
def test_a_version_that_answers_otherwise_is_undone(
    repository: Path, client: TritonClient, model: str, requests: Path, version: int, gate: str, found: str
) -> None:
    before = state_of(repository, client, model)
    canary = TrialOptions(gates=parse_gates(gate), shadow=shadow(requests))
    with pytest.raises(GateError, match="failed") as caught:
        deploy(repository, model, version, client, trial=canary)
    assert found in str(caught.value)
    assert "previous state was put back" in str(caught.value)
    assert state_of(repository, client, model) == before


def test_a_small_drift_passes_a_wide_gate(repository: Path, client: TritonClient, model: str, requests: Path) -> None:
    canary = TrialOptions(gates=parse_gates("drift<1e-2"), shadow=shadow(requests))
    done = deploy(repository, model, 3, client, trial=canary)
    assert done.trial is not None
    assert done.trial.shadow is not None
    assert 1e-4 < done.trial.shadow.outputs[0].relative_error < 1e-2
    assert observe(client, model).ready == (3,)


def test_too_few_requests_are_undecided_and_say_how_many_are_missing(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    before = state_of(repository, client, model)
    canary = TrialOptions(gates=parse_gates("errors<0.01%"), shadow=shadow(requests, duration_s=2.0))
    with pytest.raises(InconclusiveError, match="undecided") as caught:
        deploy(repository, model, 2, client, trial=canary)
    assert "requests in all would decide" in str(caught.value)
    assert caught.value.exit_code == 6
    assert state_of(repository, client, model) == before


def test_a_latency_gate_is_judged_against_the_old_version(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    canary = TrialOptions(gates=parse_gates("p50<3x, mean<100x"), shadow=shadow(requests))
    done = deploy(repository, model, 2, client, trial=canary)
    assert done.trial is not None
    assert done.trial.shadow is not None
    assert [result.outcome for result in done.trial.shadow.gates] == [Outcome.PASS, Outcome.PASS]
    assert done.trial.shadow.latency_new.p50_ns is not None
    assert done.trial.shadow.latency_old.p50_ns is not None


def test_over_http(repository: Path, server: EmbeddedServer, model: str, requests: Path) -> None:
    with TritonClient.connect(server.http_url) as http:
        done = deploy(
            repository, model, 2, http, trial=TrialOptions(gates=parse_gates("errors<5%"), shadow=shadow(requests))
        )
        assert observe(http, model).ready == (2,)
    assert done.trial is not None
    assert done.trial.shadow is not None
    assert done.trial.shadow.pairs > 20


def test_requests_that_do_not_fit_change_nothing(
    repository: Path, client: TritonClient, model: str, tmp_path: Path
) -> None:
    before = state_of(repository, client, model)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"x": [1, 2, 3]}\n')
    with pytest.raises(InputError, match=r"request 1, input x: the shape is \[3\], expected \[4\]"):
        deploy(repository, model, 2, client, trial=TrialOptions(shadow=shadow(path)))
    assert state_of(repository, client, model) == before


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("acc", {"steps": (0.5, 1.0)}, "have to reach one version"),
        ("ens", {"steps": (0.5, 1.0)}, "is an ensemble, which has none"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_kind_that_cannot_be_tried_is_refused_by_name(
    repository: Path, client: TritonClient, kind: str, options: dict[str, Any], why: str, dry_run: bool
) -> None:
    name = f"{kind}_tried"
    for part in ("scale", "opt") if kind == "ens" else ():
        write_python_model(repository, part)
    write_python_model(repository, name, kind=kind, versions=(1, 2), extra=POLICY)
    client.load(name)
    before = state_of(repository, client, name)
    with pytest.raises(UsageError, match=why) as refused:
        deploy(repository, name, 2, client, options=RolloutOptions(dry_run=dry_run), trial=TrialOptions(**options))
    assert name in refused.value.message
    assert state_of(repository, client, name) == before
    client.unload(name)


@pytest.mark.parametrize(
    ("kind", "lines", "rows"),
    [
        ("acc", ['{"X": [[1]]}', '{"X": [[2]]}', '{"X": [[3]]}'], 3),  # one sequence
        ("repeat", ['{"IN": [1, 2, 3]}', '{"IN": [4, 5]}'], 1),
    ],
)
def test_whole_sequences_and_streams_are_tried_in_the_shadow(
    repository: Path, client: TritonClient, tmp_path: Path, kind: str, lines: list[str], rows: int
) -> None:
    name = f"{kind}_shadowed"
    folder = write_python_model(repository, name, kind=kind, versions=(1, 2, 3, 4), extra=POLICY)
    code = (folder / "1" / "model.py").read_text()
    (folder / "2" / "model.py").write_text(code)
    # Version 3 answers otherwise by design. Version 4 forgets the sequence so far, or the last response.
    forgetful = code.replace("+= int(", "= int(").replace('read(request, "IN"):', 'read(request, "IN")[:-1]:')
    (folder / "4" / "model.py").write_text(forgetful)
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(lines))
    client.load(name)
    trial = TrialOptions(gates=parse_gates("drift<1e-2, errors<5%"), shadow=shadow(path))
    for wrong in (3, 4):
        with pytest.raises(GateError, match="drift<1e-2 failed"):
            deploy(repository, name, wrong, client, trial=trial)
        assert observe(client, name).ready == (1,)
    done = deploy(repository, name, 2, client, trial=trial)
    assert done.trial is not None
    seen = done.trial.shadow
    assert seen is not None
    assert (seen.errors_new, seen.errors_old, seen.refused_by_both) == (0, 0, 0)
    assert seen.pairs >= 50
    assert [output.relative_error for output in seen.outputs] == [0.0]
    assert [output.samples for output in seen.outputs] >= [seen.pairs * rows]
    assert done.trial.notes == ()  # every request in the server's counters was one of the trial's
    assert observe(client, name).ready == (2,)
    client.unload(name)


def test_streams_are_not_tried_over_http(repository: Path, server: EmbeddedServer, requests: Path) -> None:
    write_python_model(repository, "repeat_http", kind="repeat", versions=(1, 2), extra=POLICY)
    with TritonClient.connect(server.http_url) as http:
        http.load("repeat_http")
        before = state_of(repository, http, "repeat_http")
        with pytest.raises(UsageError, match="does not send over HTTP"):
            deploy(repository, "repeat_http", 2, http, trial=TrialOptions(shadow=shadow(requests)))
        assert state_of(repository, http, "repeat_http") == before
        http.unload("repeat_http")


def test_an_ensemble_is_tried_in_the_shadow(repository: Path, client: TritonClient, tmp_path: Path) -> None:
    for part in ("scale", "opt"):
        write_python_model(repository, part)
    write_python_model(repository, "ens", versions=(1, 2), extra=POLICY)
    client.load("ens")
    path = tmp_path / "requests.jsonl"
    path.write_text('{"IN": [[1.5, 2.0]]}\n{"IN": [[3.0, 4.0]]}\n')
    trial = TrialOptions(gates=parse_gates("drift<1e-2"), shadow=shadow(path))
    done = deploy(repository, "ens", 2, client, trial=trial)
    assert done.trial is not None
    assert done.trial.shadow is not None
    assert (done.trial.shadow.outcome, observe(client, "ens").ready) == (Outcome.PASS, (2,))
    for name in ("ens", "opt", "scale"):
        client.unload(name)


def test_a_version_that_does_not_load_is_undone(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    (repository / model / "2" / "model.onnx").write_bytes(b"broken")
    before = state_of(repository, client, model)
    with pytest.raises(RolloutUndoneError):
        deploy(repository, model, 2, client, trial=TrialOptions(shadow=shadow(requests)))
    assert state_of(repository, client, model) == before


def test_the_first_version_has_nothing_to_be_compared_with(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    client.unload(model)
    done = deploy(repository, model, 1, client, trial=TrialOptions(shadow=shadow(requests)))
    assert done.trial.notes == ("no trial: nothing is served beside it",)
    assert observe(client, model).ready == (1,)
    with pytest.raises(InconclusiveError, match="is served already"):
        deploy(repository, model, 1, client, trial=TrialOptions(shadow=shadow(requests)))
    assert observe(client, model).ready == (1,)


def test_a_version_that_is_loaded_already_is_tried_all_the_same(
    repository: Path, client: TritonClient, model: str, requests: Path
) -> None:
    deploy(repository, model, 4, client, options=RolloutOptions(keep_previous=True))
    assert observe(client, model).ready == (1, 4)
    before = state_of(repository, client, model)
    trial = TrialOptions(shadow=shadow(requests), gates=parse_gates("drift<1e-2"))
    with pytest.raises(GateError, match="drift"):
        deploy(repository, model, 4, client, options=RolloutOptions(keep_previous=True), trial=trial)
    assert state_of(repository, client, model) == before


class Traffic:
    """Clients that follow the published weights, and their answers."""

    def __init__(self, url: str, model: str, weights: Path | None = None) -> None:
        self.errors: list[str] = []
        self.versions: list[int | None] = []
        self._client = VersionedClient(url, model, weights, refresh_s=0.05)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.versions.append(self._client.infer({"x": X}).version)
            except RepoManagerError as exc:
                self.errors.append(str(exc))
            self._stop.wait(PAUSE_S)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


def test_a_canary_moves_the_traffic_step_by_step(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str
) -> None:
    told: list[str] = []
    begun: list[int] = []  # how many requests had been answered when a step began

    def report(text: str) -> None:
        told.append(text)
        if " % of the traffic to the new version" in text:
            begun.append(len(traffic.versions))

    canary = TrialOptions(steps=(0.2, 0.6, 1.0), step_s=1.5, gates=parse_gates("errors<5%, mean<1s"))
    with Traffic(server.grpc_url, model) as traffic:
        done = deploy(repository, model, 2, client, trial=canary, report=report)
    assert traffic.errors == []
    assert [step.fraction for step in done.trial.steps] == [0.2, 0.6, 1.0]
    assert all(step.outcome is Outcome.PASS for step in done.trial.steps)
    assert all(step.requests > 0 for step in done.trial.steps)
    parts = [traffic.versions[start:end] for start, end in zip(begun, [*begun[1:], None], strict=True)]
    shares = [part.count(2) / len(part) for part in parts]
    assert 0 < shares[0] < shares[1] < shares[2]
    assert set(traffic.versions) >= {1, 2}
    ready, config = state_of(repository, client, model)
    assert ready == (2,)
    assert "@" not in config
    assert "@" not in client.model_config(model).instance_group[0].name
    assert any("20 % of the traffic" in line for line in told)


def test_a_canary_that_fails_goes_back_to_nothing(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str
) -> None:
    before = state_of(repository, client, model)
    canary = TrialOptions(steps=(0.5, 1.0), step_s=20.0, gates=parse_gates("mean<1us"))
    began = time.monotonic()
    with Traffic(server.grpc_url, model) as traffic, pytest.raises(GateError, match="mean"):
        deploy(repository, model, 2, client, trial=canary)
    assert time.monotonic() - began < 15  # it does not wait for the step's end
    assert traffic.errors == []
    assert state_of(repository, client, model) == before
    assert "@" not in client.model_config(model).instance_group[0].name


def test_a_canary_without_traffic_is_undecided(repository: Path, client: TritonClient, model: str) -> None:
    before = state_of(repository, client, model)
    with pytest.raises(InconclusiveError, match="too few requests reached the new version"):
        deploy(repository, model, 2, client, trial=TrialOptions(steps=(0.5, 1.0), step_s=0.3))
    assert state_of(repository, client, model) == before


def test_a_weights_file_is_written_instead(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.json"
    path.write_text('{"1": 1}')
    canary = TrialOptions(steps=(0.5, 1.0), step_s=1.5, gates=parse_gates("errors<5%"), weights_file=path)
    with Traffic(server.grpc_url, model, path) as traffic:
        deploy(repository, model, 2, client, trial=canary)
    assert traffic.errors == []
    assert json.loads(path.read_text()) == {model: {"1": 0.0, "2": 1.0}}


def test_a_canary_that_is_undone_after_its_last_step_takes_the_weights_back(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str, tmp_path: Path
) -> None:
    before = state_of(repository, client, model)
    path = tmp_path / "weights.json"
    path.write_text('{"1": 1}')
    canary = TrialOptions(steps=(0.5, 1.0), step_s=1.5, gates=parse_gates("errors<50%"), weights_file=path)

    def refuse(event: str) -> None:
        if event == "serving version 2":  # the last load, when all of the traffic is at version 2 already
            raise ServerRefusedError("no")

    with Traffic(server.grpc_url, model, path) as traffic, pytest.raises(RolloutUndoneError):
        deploy(repository, model, 2, client, trial=canary, report=refuse)
    assert json.loads(path.read_text()) == {model: {"1": 1.0, "2": 0.0}}
    assert traffic.errors == []
    assert state_of(repository, client, model) == before


def test_a_network_that_is_cut_at_the_last_load_is_only_a_retry(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str
) -> None:
    events: list[str] = []
    port = int(server.grpc_url.rpartition(":")[2])
    canary = TrialOptions(steps=(0.5, 1.0), step_s=1.5, gates=parse_gates("errors<50%"))
    with (
        TcpProxy(port) as proxy,
        TritonClient.connect(f"grpc://127.0.0.1:{proxy.port}", server.client_options) as through,
    ):

        def report(event: str) -> None:
            events.append(event)
            if event == "serving version 2":
                proxy.cut()
            if "asking again in" in event:
                proxy.heal()

        with Traffic(server.grpc_url, model) as traffic:
            options = RolloutOptions(retries=4)
            done = deploy(repository, model, 2, through, trial=canary, options=options, report=report)
    assert (done.ready, traffic.errors) == ((2,), [])
    assert any("asking again in" in event for event in events[events.index("serving version 2") :])


def test_gates_that_the_counters_cannot_tell(repository: Path, client: TritonClient, model: str) -> None:
    with pytest.raises(UsageError, match=r"cannot tell p99<1ms"):
        deploy(repository, model, 2, client, trial=TrialOptions(steps=(0.5, 1.0), gates=parse_gates("p99<1ms")))


def test_requests_that_name_no_version_are_told(
    repository: Path, client: TritonClient, server: EmbeddedServer, model: str, requests: Path
) -> None:
    stop = threading.Event()

    def ask() -> None:
        with TritonClient.connect(server.grpc_url) as other:
            while not stop.is_set():
                other.infer(model, None, {"x": X})
                stop.wait(PAUSE_S)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        done = deploy(
            repository, model, 2, client, trial=TrialOptions(gates=parse_gates("errors<5%"), shadow=shadow(requests))
        )
    finally:
        stop.set()
        thread.join()
    (note,) = done.trial.notes
    assert "name no version" in note
