"""How a roll-out shows its proof, and the servers left out."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from repo_manager.report.rollout_tables import rollout_view
from repo_manager.rollout.result import Rollout, ServerResult
from repo_manager.rollout.smoke import SmokeResult


def shown(reference: str, unavailable: tuple[str, ...] = ()) -> str:
    smoke = SmokeResult(2, reference, (), 3_000_000)
    server = ServerResult("grpc://a:1", True, (2,), (1,), "inference", smoke)
    rollout = Rollout("m", 2, "grpc://a:1", (server,), unavailable, 1, True, False, None, 1.0, ())
    console = Console(file=io.StringIO(), width=200)
    for view in rollout_view(rollout):
        console.print(view)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reference", "proof"),
    [
        ("golden", "one inference in 3.0 ms against golden: outputs have"),
        ("none", "one inference in 3.0 ms, no reference: outputs have"),
    ],
)
def test_the_proof_names_its_reference(reference: str, proof: str) -> None:
    assert proof in shown(reference)


def test_a_fleet_says_so_where_there_is_no_reference() -> None:
    text = shown("none", unavailable=("grpc://b:1",))
    assert "no reference, 3.0 ms" in text
    assert "golden, 3.0 ms" in shown("golden", unavailable=("grpc://b:1",))


def test_a_reference_in_words() -> None:
    words = [SmokeResult(2, reference, (), 1).describe_reference() for reference in ("none", "golden", "onnxruntime")]
    assert words == ["no reference", "golden reference", "onnxruntime reference"]


def test_a_silent_server_needs_the_command_again() -> None:
    text = shown("golden", unavailable=("grpc://b:1",))
    assert "A silent server is left unchanged. Run the same command again once it answers" in text
