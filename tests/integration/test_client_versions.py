"""VersionedClient against a real tritonserver, during real deployments."""

from __future__ import annotations

import collections
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.python_models import write_python_model
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.client import VersionedClient, VersionWeights, published_name
from repo_manager.errors import InputError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.rollout.deploy import deploy
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
X = np.ones((1, 4), np.float32)
FACTORS = {1: 2.0, 2: 3.0, 3: 4.0}
BOTH = "version_policy { specific { versions: [1, 2] } }\n"


@pytest.fixture
def model(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model of three versions (factors 2, 3, 4), 1 and 2 of them served; unloaded afterwards."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:60]
    write_model(
        repository, name, SCALING_CONFIG + BOTH, {version: scaling_model(by) for version, by in FACTORS.items()}
    )
    client.load(name)
    yield name
    client.unload(name)


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: EmbeddedServer) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


def asked(client: VersionedClient, requests: int, key: str | None = None) -> collections.Counter[int | None]:
    """Ask, hold every answer against its version's factor, and count the versions."""
    counts: collections.Counter[int | None] = collections.Counter()
    for _ in range(requests):
        answer = client.infer({"x": X}, key=key)
        if answer.version is not None:
            assert answer.outputs["y"][0, 0] == FACTORS[answer.version]
        counts[answer.version] += 1
    return counts


def test_fixed_weights_spread_the_requests(url: str, model: str) -> None:
    with VersionedClient(url, model, {1: 0.8, 2: 0.2}, seed=1) as client:
        counts = asked(client, 200)
        assert 20 < counts[2] < 60
        assert counts[1] + counts[2] == 200


def test_a_key_stays_with_its_version(url: str, model: str) -> None:
    with VersionedClient(url, model, {1: 0.5, 2: 0.5}) as client:
        counts = [asked(client, 5, key=f"user-{number}") for number in range(20)]
    assert all(len(count) == 1 for count in counts)
    assert len({next(iter(count)) for count in counts}) == 2


def test_without_weights_the_server_chooses(url: str, model: str) -> None:
    with VersionedClient(url, model) as client:
        answer = client.infer({"x": X})
        assert (answer.version, answer.outputs["y"][0, 0]) == (None, FACTORS[2])
        assert client.weights is None


def test_published_weights_are_followed(repository: Path, client: TritonClient, url: str, model: str) -> None:
    with VersionedClient(url, model, refresh_s=0.05) as versioned:
        for shares in ({1: 1.0, 2: 0.0}, {1: 0.0, 2: 1.0}):
            name = published_name("", VersionWeights.of(shares))
            change_config(repository, model, {"instance_group.name": f'"{name}"'})
            client.load(model)
            deadline = time.monotonic() + 10
            while versioned.weights != VersionWeights.of(shares):
                assert time.monotonic() < deadline
            assert asked(versioned, 10) == {max(shares, key=lambda version: shares[version]): 10}


def test_a_file_and_a_function_are_followed(url: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"1": 1}))
    with VersionedClient(url, model, path, refresh_s=0.0) as client:
        assert asked(client, 5) == {1: 5}
        path.write_text(json.dumps({model: {"2": 1}}))
        assert asked(client, 5) == {2: 5}
        path.write_text("half wri")
        assert asked(client, 5) == {2: 5}
    turn = iter([{1: 1.0}, {2: 1.0}])
    with VersionedClient(url, model, lambda: next(turn), refresh_s=0.0) as client:
        assert asked(client, 1) + asked(client, 1) == {1: 1, 2: 1}


def test_a_version_that_vanishes_costs_no_request(repository: Path, client: TritonClient, url: str, model: str) -> None:
    with VersionedClient(url, model, {1: 0.5, 2: 0.5}, refresh_s=30.0, seed=2) as versioned:
        assert set(asked(versioned, 30)) == {1, 2}
        set_served_versions(repository, model, [2])
        client.load(model)
        answers = [versioned.infer({"x": X}) for _ in range(30)]
        assert {answer.version for answer in answers} == {2}
        # Asked once, and then left alone until the weights are due again.
        assert [answer.not_there for answer in answers if answer.not_there] == [(1,)]


def test_no_version_of_the_weights_is_there(url: str, model: str) -> None:
    with VersionedClient(url, model, {7: 1.0, 9: 1.0}) as client:
        answer = client.infer({"x": X})
    assert answer.version is None
    assert sorted(answer.not_there) == [7, 9]
    assert answer.outputs["y"][0, 0] == FACTORS[2]


def test_other_errors_are_not_tried_again(url: str, model: str) -> None:
    with VersionedClient(url, model, {1: 0.5, 2: 0.5}) as client, pytest.raises(ServerRefusedError, match="shape"):
        client.infer({"x": np.ones((1, 5), np.float32)})
    with VersionedClient(url, "none", {1: 1.0}) as client, pytest.raises(ServerRefusedError, match="unknown model"):
        client.infer({"x": X})
    with VersionedClient("grpc://127.0.0.1:1", model) as client, pytest.raises(ServerUnreachableError):
        client.infer({"x": X}, timeout_s=1.0)
    with pytest.raises(InputError):
        VersionedClient(url, model, {1: 0.0})


def test_streams_follow_the_weights_and_pass_over_a_version_that_is_not_there(
    repository: Path, client: TritonClient, server: EmbeddedServer
) -> None:
    write_python_model(repository, "streamed", kind="repeat", versions=(1, 2), extra="version_policy { all { } }")
    client.load("streamed")
    request = {"IN": np.array([3, 5], np.int32)}
    try:
        with VersionedClient(server.grpc_url, "streamed", {1: 0.5, 2: 0.5}, seed=1) as versioned:
            for key in ("a", "b", "c", "d", "e"):
                answers = list(versioned.stream(request, key=key))
                version = answers[0].version
                assert version in (1, 2)
                assert [int(each.outputs["OUT"][0]) for each in answers] == [3 * version, 5 * version]
                assert versioned.weights is not None
                assert version == versioned.weights.choose(random.Random(), key=key)
        with VersionedClient(server.grpc_url, "streamed", {9: 1.0}) as versioned:
            answers = list(versioned.stream(request))
            assert [(each.version, each.not_there) for each in answers] == [(None, (9,))] * 2
            with pytest.raises(ServerRefusedError, match="unexpected"):
                list(versioned.stream({"NO": request["IN"]}))
        with VersionedClient(server.http_url, "streamed") as versioned, pytest.raises(UsageError, match="gRPC"):
            list(versioned.stream(request))
    finally:
        client.unload("streamed")


def in_threads(work: Callable[[], None], threads: int, errors: list[str]) -> list[threading.Thread]:
    def run() -> None:
        try:
            work()
        except (ServerRefusedError, ServerUnreachableError, AssertionError) as exc:
            errors.append(str(exc))

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started


def test_deployments_under_load_cost_no_request(repository: Path, client: TritonClient, url: str, model: str) -> None:
    """Four threads share one client with stale weights while versions come and go beneath them."""
    errors: list[str] = []
    seen: collections.Counter[int | None] = collections.Counter()
    stop = threading.Event()
    with VersionedClient(url, model, {1: 0.4, 2: 0.3, 3: 0.3}, refresh_s=0.2) as versioned:

        def work() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                seen.update(asked(versioned, 1, key=f"user-{number}" if number % 2 else None))

        threads = in_threads(work, 4, errors)
        try:
            for version in (3, 1, 2, 3, 1):
                deploy(repository, model, version, client)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert errors == []
    assert {1, 2, 3} <= set(seen)
