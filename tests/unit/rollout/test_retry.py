from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from repo_manager.errors import ServerError, ServerRefusedError, ServerUnreachableError
from repo_manager.rollout import calls
from repo_manager.rollout.calls import Deadline, retried


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIRST_PAUSE_S", 0.001)


def failing(*errors: ServerError) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


CUT = ServerUnreachableError("cannot be reached: connection refused")
BUSY = ServerRefusedError("refused: inference: Exceeds maximum queue size")


def test_what_passes_is_asked_again_and_told() -> None:
    told: list[str] = []
    assert retried(failing(CUT, BUSY), retries=2, report=told.append) == "done"
    assert len(told) == 2
    assert "asking again" in told[0]
    assert "(2 of 2)" in told[1]


@pytest.mark.parametrize(
    ("errors", "retries"),
    [
        ((CUT, CUT), 1),  # bounded
        ((CUT,), 0),
        ((ServerRefusedError("refused: load m: model.onnx failed"),), 5),  # a failed load may leak: never again
        ((ServerUnreachableError("did not answer within 30 s"),), 5),  # has waited long enough
    ],
)
def test_what_does_not_pass_is_raised(errors: tuple[ServerError, ...], retries: int) -> None:
    with pytest.raises(ServerError) as caught:
        retried(failing(*errors), retries=retries, report=lambda _: None)
    assert caught.value is errors[-1]


def test_pauses_grow_and_never_go_past_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    monkeypatch.setattr(calls, "_FIRST_PAUSE_S", 0.1)
    retried(failing(*[CUT] * 8), retries=8, report=lambda _: None)
    assert all(later > earlier * 1.1 for earlier, later in itertools.pairwise(pauses[:4]))
    assert max(pauses) <= 2.4
    with pytest.raises(ServerUnreachableError):
        retried(failing(CUT), retries=5, report=lambda _: None, deadline=Deadline(0.01))


def test_a_deadline_gives_what_is_left_and_says_when_it_has_passed() -> None:
    assert Deadline(100.0).remaining_s(5.0) == 5.0
    assert 0 < Deadline(1.0).remaining_s(5.0) <= 1.0
    with pytest.raises(ServerUnreachableError, match=r"within the 0 s of --timeout"):
        Deadline(0.0).remaining_s(5.0)
