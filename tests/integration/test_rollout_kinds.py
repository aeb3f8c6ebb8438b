"""Roll-outs of every kind of model, each proven by its own kind of request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.python_models import write_python_model

from repo_manager.errors import RolloutUndoneError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.repository.golden import Exchange, Golden, read_golden, write_golden
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.smoke import SmokeResult
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
NONE_SERVED = "version_policy { specific { versions: [99] } }\n"
SEQUENCE = [np.array([[value]], np.int32) for value in (2, 3, 4)]


def smoke_of(rollout: Rollout) -> SmokeResult:
    smoke = rollout.servers[0].smoke
    assert smoke is not None
    return smoke


def recorded_sequence(*sums: int) -> Golden:
    return Golden.of(
        Exchange({"X": x}, ({"SUM": np.array([[value]], np.int32)},)) for x, value in zip(SEQUENCE, sums, strict=True)
    )


def recorded_stream(*values: int) -> Golden:
    responses = tuple({"OUT": np.array([value], np.int32)} for value in values)
    return Golden.of([Exchange({"IN": np.array([1, 2, 3], np.int32)}, responses)])


@pytest.fixture
def grpc(server: EmbeddedServer) -> Iterator[TritonClient]:
    with TritonClient.connect(server.grpc_url) as client:
        yield client


def test_golden_samples_of_every_kind_are_read_as_written(tmp_path: Path) -> None:
    text = np.array([b"a", "é", b"\xff"], dtype=object)
    for number, golden in enumerate(
        (
            recorded_sequence(2, 5, 9),
            recorded_stream(1, 2, 3),
            recorded_stream(),
            Golden({"t": text}, {"u": text}),
            Golden.of([Exchange({"a": np.ones(1)}, ({}, {"b": np.ones(2)})), Exchange({}, ())]),
        )
    ):
        path = tmp_path / f"{number}.npz"
        write_golden(path, golden)
        found = read_golden(path)
        assert [len(each.responses) for each in found.exchanges] == [len(e.responses) for e in golden.exchanges]
        for one, other in zip(found.exchanges, golden.exchanges, strict=True):
            for read, written in zip((one.inputs, *one.responses), (other.inputs, *other.responses), strict=True):
                assert read.keys() == written.keys()
    assert read_golden(tmp_path / "3.npz").inputs["t"].tolist() == ["a", "é", "\udcff"]


def test_a_sequence_is_proven_with_its_state(repository: Path, grpc: TritonClient) -> None:
    folder = write_python_model(repository, "acc", versions=(1, 2), extra=NONE_SERVED)
    write_golden(folder / "1" / "golden.npz", recorded_sequence(2, 5, 9))
    write_golden(folder / "2" / "golden.npz", recorded_sequence(4, 10, 17))  # the last one is 18

    done = deploy(repository, "acc", 1, grpc)
    assert (smoke_of(done).reference, smoke_of(done).requests) == ("golden", 3)
    assert done.servers[0].proof == "inference"
    with pytest.raises(RolloutUndoneError, match=r"SUM \(request 3\) is off by 1"):
        deploy(repository, "acc", 2, grpc)
    assert set(grpc.versions("acc")) == {1, 2}
    assert grpc.versions("acc")[1].state == "READY"

    write_golden(folder / "2" / "golden.npz", recorded_sequence(4, 10, 18))
    assert deploy(repository, "acc", 2, grpc).ready == (2,)
    assert rollback(repository, "acc", grpc).ready == (1,)


def test_a_sequence_without_a_sample_is_made_up(repository: Path, grpc: TritonClient) -> None:
    write_python_model(repository, "acc_plain", kind="acc", extra=NONE_SERVED)
    done = smoke_of(deploy(repository, "acc_plain", 1, grpc))
    assert (done.reference, done.requests, done.responses) == ("none", 2, 2)


def test_every_response_of_a_decoupled_model_is_compared_in_order(
    repository: Path, grpc: TritonClient, server: EmbeddedServer
) -> None:
    folder = write_python_model(repository, "repeat", versions=(1, 2), extra=NONE_SERVED)
    write_golden(folder / "1" / "golden.npz", recorded_stream(1, 2, 3))
    done = smoke_of(deploy(repository, "repeat", 1, grpc))
    assert (done.reference, done.requests, done.responses) == ("golden", 1, 3)

    write_golden(folder / "2" / "golden.npz", recorded_stream(2, 4))
    with pytest.raises(RolloutUndoneError, match="with 3 responses, recorded were 2"):
        deploy(repository, "repeat", 2, grpc)
    write_golden(folder / "2" / "golden.npz", recorded_stream(2, 6, 4))
    with pytest.raises(RolloutUndoneError, match=r"OUT \(response 2\) .* OUT \(response 3\)"):
        deploy(repository, "repeat", 2, grpc)

    with TritonClient.connect(server.http_url) as http:
        over_http = deploy(repository, "repeat", 2, http)  # Triton does not stream over HTTP
    assert over_http.servers[0].proof == "readiness"
    assert "over gRPC only" in smoke_of(over_http).note


def test_triton_makes_the_sequences_of_an_iterative_model(
    repository: Path, grpc: TritonClient, server: EmbeddedServer
) -> None:
    folder = write_python_model(repository, "iterative", versions=(1, 2), extra=NONE_SERVED)
    responses = tuple({"OUT": np.array([value], np.int32)} for value in (2, 1, 0))
    for version in ("1", "2"):
        golden = Golden.of([Exchange({"IN": np.array([3], np.int32)}, responses)])
        write_golden(folder / version / "golden.npz", golden)
        done = smoke_of(deploy(repository, "iterative", int(version), grpc))
        assert (done.reference, done.requests, done.responses) == ("golden", 1, 3)
    assert rollback(repository, "iterative", grpc).ready == (1,)
    options = LoadTestOptions(server.grpc_url, "iterative", concurrency=(2,), duration_s=2.0, warmup_s=0.2)
    (point,) = run_load_test(options).points
    assert (point.errors, point.requests > 3) == (0, True)
    assert "sequence" not in point.details


@pytest.mark.parametrize("name", ["upper", "opt", "warm", "plus_one"])
def test_strings_optional_inputs_warm_up_and_reshape(repository: Path, any_client: TritonClient, name: str) -> None:
    write_python_model(repository, name)
    assert smoke_of(deploy(repository, name, 1, any_client)).reference == "none"
    any_client.unload(name)


def test_a_model_that_refuses_made_up_requests(repository: Path, grpc: TritonClient) -> None:
    folder = write_python_model(repository, "strict", extra=NONE_SERVED)
    with pytest.raises(RolloutUndoneError, match="AttributeError") as undone:
        deploy(repository, "strict", 1, grpc)
    assert "--proof readiness" in undone.value.message

    done = deploy(repository, "strict", 1, grpc, options=RolloutOptions(proof="readiness"))
    assert done.servers[0].proof == "readiness"
    assert "AttributeError" in smoke_of(done).note

    sample = Golden({"JSON": np.array([b'{"a": 1, "b": 2}'], object)}, {"KEYS": np.array([2], np.int32)})
    write_golden(folder / "1" / "golden.npz", sample)
    assert deploy(repository, "strict", 1, grpc).servers[0].proof == "inference"
