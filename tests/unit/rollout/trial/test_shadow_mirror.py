"""Mirroring to a client with faults no server can be made to have. The integration tests have the real server."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.gates import Outcome
from repo_manager.rollout.options import ShadowOptions
from repo_manager.rollout.trial.mirror import Mirror
from repo_manager.server.exchange import ModelKind

X = {"x": np.ones((1, 2), np.float32)}
Answer = Callable[[int], dict[str, Any]]


class Client:
    """Answers as told, and counts who was asked first."""

    def __init__(self, answer: Answer, asked: list[int]) -> None:
        self._answer, self._asked = answer, asked

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None: ...

    def live(self) -> bool:
        return True

    def infer(self, name: str, version: int, inputs: object, *, options: object, timeout_s: float) -> dict[str, Any]:
        assert (name, inputs, timeout_s) == ("m", X, 0.5)
        self._asked.append(version)
        return self._answer(version)


def mirror(answer: Answer, asked: list[int] | None = None, workers: int = 1) -> Mirror:
    options = ShadowOptions(Path("r"), rate_per_s=2000.0, timeout_s=0.5, workers=workers)
    client = Client(answer, [] if asked is None else asked)
    return Mirror(lambda: client, "m", (1, 2), [(X,)], options, ModelKind())  # type: ignore[arg-type,return-value]


def run(mirrored: Mirror, pairs: int) -> None:
    mirrored.run(20.0, lambda: mirrored.sent >= pairs)


def good(version: int) -> dict[str, Any]:
    return {"y": np.array([[1.0, 2.0]], np.float32)}


def test_pairs_are_interleaved_in_random_order() -> None:
    asked: list[int] = []
    mirrored = mirror(good, asked)
    run(mirrored, 200)
    firsts = asked[::2]
    assert asked.count(1) == asked.count(2)
    assert 0.3 < firsts.count(1) / len(firsts) < 0.7
    seen = mirrored.evidence()
    assert seen.requests == mirrored.sent - 3  # three pairs warm up
    assert (seen.errors, seen.compared, seen.agreeing) == (0, seen.requests, seen.requests)
    assert seen.latencies_ns.shape == (seen.requests, 2)
    assert not seen.drifts.any()


def test_errors_are_counted_for_the_version_that_made_them() -> None:
    turn = itertools.count()

    def answer(version: int) -> dict[str, Any]:
        if version == 2 or next(turn) % 2:
            raise ServerRefusedError(f"version {version} cannot")
        return good(version)

    mirrored = mirror(answer)
    run(mirrored, 60)
    report = mirrored.report((), Outcome.FAIL)
    assert report.errors_new == report.pairs > 0
    assert report.errors_old == 0
    assert report.refused_by_both > 0
    assert report.first_error == "version 2 cannot"
    assert report.latency_new.p99_ns is None
    assert mirrored.evidence().latencies_ns.shape == (0, 2)


@pytest.mark.parametrize(
    ("other", "drift"),
    [
        ({"y": np.array([[1.0, 2.2]], np.float32)}, pytest.approx(0.2 / 5**0.5, rel=1e-3)),
        ({"y": np.array([[1.0, 2.0, 3.0]], np.float32)}, np.inf),
        ({"y": np.array([[np.nan, 2.0]], np.float32)}, np.inf),
        ({"z": np.array([[1.0, 2.0]], np.float32)}, np.inf),
    ],
)
def test_answers_that_differ(other: dict[str, Any], drift: object) -> None:
    mirrored = mirror(lambda version: good(1) if version == 1 else other)
    run(mirrored, 10)
    drifts = mirrored.evidence().drifts.tolist()
    assert drifts
    assert all(each == drift for each in drifts)


def test_the_other_top_class_is_no_agreement() -> None:
    scores = {1: np.array([[1.0, 2.0]]), 2: np.array([[2.0, 1.0]])}
    mirrored = mirror(lambda version: {"y": scores[version]})
    run(mirrored, 10)
    seen = mirrored.evidence()
    assert seen.compared > 0
    assert seen.agreeing == 0


def test_a_late_answer_is_an_error_while_the_server_lives() -> None:
    def answer(version: int) -> dict[str, Any]:
        if version == 2:
            raise ServerUnreachableError("grpc://h:1 did not answer within 0.5 s: inference on m")
        return good(version)

    mirrored = mirror(answer)
    run(mirrored, 10)
    assert mirrored.evidence().errors == mirrored.evidence().requests > 0


def test_a_server_that_is_gone_ends_it() -> None:
    def answer(version: int) -> dict[str, Any]:
        raise ServerUnreachableError("grpc://h:1 cannot be reached")

    with pytest.raises(ServerUnreachableError, match="cannot be reached"):
        run(mirror(answer, workers=3), 1000)


def test_a_fault_of_a_worker_is_not_lost() -> None:
    def answer(version: int) -> dict[str, Any]:
        raise UsageError("no such type")

    with pytest.raises(UsageError, match="no such type"):
        run(mirror(answer, workers=3), 1000)


def test_what_is_due_while_all_wait_is_left_out() -> None:
    gate = threading.Event()

    def answer(version: int) -> dict[str, Any]:
        gate.wait(10.0)
        return good(version)

    mirrored = mirror(answer)
    stop = threading.Timer(0.3, gate.set)
    stop.start()
    run(mirrored, 4)
    stop.join()
    assert mirrored.report((), Outcome.PASS).skipped > 50
