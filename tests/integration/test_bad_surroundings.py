"""Expanding files and refusing machines: each is one clear error, never a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from fuzz.fuzz_files import findings
from support.forked_commands import Command, run_commands

from repo_manager.declared.document import parse_document
from repo_manager.errors import InputError
from repo_manager.loadtest.worker.schedule import load_replay
from repo_manager.request_data.read import read_rows
from repo_manager.request_data.tensors import InputFacts

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "model_repository/digits/1/model.onnx"


def test_an_archive_that_expands_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((100, 1 << 20), np.float32))
    with pytest.raises(InputError, match="unpacks to"):
        read_rows(path, [InputFacts("x", "FP32", (1 << 20,), False)])


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"data": [' + '{"x": ' * 100_000, '{"data": [{"x": {"b64": 7}}]}', "null"]
)
def test_odd_request_files_are_input_errors(text: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_rows(path, [InputFacts("x", "BYTES", (1,), False)])


@pytest.mark.parametrize(
    ("suffix", "text"),
    [("json", "[" * 200_000), ("json", '{"timestamps_ns": 5}'), ("json", "[1e400]"), ("csv", "a,timestamp\n1\n")],
)
def test_odd_replays_are_input_errors(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"moments.{suffix}"
    path.write_text(text)
    with pytest.raises(InputError):
        load_replay(path)


def _declared(models: int) -> str:
    lines = ["base: &b {a: 1, c: 2}", "models:"]
    return "\n".join([*lines, *(f"  m{number}: {{<<: *b, a: 3}}" for number in range(models))])


def test_a_declaration_with_merges_is_read_in_linear_time() -> None:
    def seconds(models: int) -> float:
        began = time.process_time()
        parse_document(_declared(models), name="x")
        return time.process_time() - began

    small, large = min(seconds(500) for _ in range(3)), min(seconds(4000) for _ in range(2))
    assert large < 30 * small  # eight times as many; a quadratic reading takes 64 times as long


def test_a_machine_that_refuses_is_told_as_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    homes = {"XDG_CACHE_HOME": str(tmp_path / "file"), "XDG_RUNTIME_DIR": str(tmp_path / "file")}
    root = ("--repository", str(tmp_path / "models"))
    commands = [
        Command(("add", str(MODEL), "--name", "m", "--precision", "fp32", *root), limits={"RLIMIT_FSIZE": 4096}),
        *(
            Command((*words, "--repository", str(MODEL.parents[2])), homes)
            for words in (("status",), ("logs",), ("infer", "digits"), ("deploy", "digits:1"))
        ),
        Command(("serve", "--detach", "--repository", str(MODEL.parents[2])), homes),
    ]
    for outcome in run_commands(commands, tmp_path / "output"):
        assert outcome.code in (3, 5), outcome.output
        assert "Traceback" not in outcome.output
    assert not (tmp_path / "models" / "m").exists()
    # A command that only reads needs no cache, so it reports what it sees: no server.
    looking = [("serve", "--stop"), ("deploy", "digits:1", "--dry-run"), ("undeploy", "digits", "--dry-run")]
    commands = [Command((*words, "--repository", str(MODEL.parents[2])), homes) for words in looking]
    for outcome in run_commands(commands, tmp_path / "output"):
        assert outcome.code == 0, outcome.output


def test_mutated_files_are_read_or_refused() -> None:
    """A quick part of tests/fuzz/fuzz_files.py."""
    found, outcomes = findings(330)
    assert found == []
    assert min(outcomes["read"], outcomes["refused"]) > 10
