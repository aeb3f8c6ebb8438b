from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager import samples

Run = Callable[..., Any]


@pytest.fixture
def repository(run: Run, tmp_path: Path) -> Path:
    """One model with a plan for compute capability 8.0 of an unreleased TensorRT, and one ONNX model."""
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"ftrt" + bytes(20) + bytes((11, 2, 0, 5)) + bytes(100))
    root = tmp_path / "models"
    added = run("add", samples.sample_model(), "-n", "t", "-r", root, "--backend", "tensorrt", "--for", f"8.0={plan}")
    assert added.code == 0, added.err
    assert "engine      tensorrt 11.2.0.5, for compute capability 8.0" in added.out
    assert "no release is known to have it" in added.out
    assert run("add", samples.sample_model(), "-n", "o", "-r", root, "--backend", "onnxruntime").code == 0
    return root


def test_doctor_says_before_a_load_what_will_not_load(run: Run, repository: Path) -> None:
    (engine,) = json.loads(run("doctor", "-r", repository, "--for-server", "26.07:9.0", "--json").out)["engines"]
    assert (engine["model"], engine["built_with"], engine["compute_capabilities"]) == ("t:1", "11.2.0.5", ["8.0"])
    (problem,) = engine["problems"]
    assert problem["blocks"]
    assert "plans for compute capability 8.0; the server's GPU has 9.0" in problem["message"]
    (other,) = json.loads(run("doctor", "-r", repository, "--for-server", "26.07:8.0", "--json").out)["engines"]
    assert "the server's release 26.07 has TensorRT 11.1" in other["problems"][0]["message"]


def test_doctor_shows_it_as_a_table(run: Run, repository: Path) -> None:
    ended = run("doctor", "-r", repository, "--for-server", "26.07:9.0")
    assert ended.code == 0
    assert "Engines on Triton 26.07:9.0" in ended.out
    assert "will not load" in ended.out


def test_two_servers_are_one_too_many(run: Run, repository: Path) -> None:
    ended = run("doctor", "-r", repository, "--for-server", "26.07", "--to", "http://127.0.0.1:1")
    assert ended.code == 2
    assert "both name a server" in ended.err


def test_without_a_repository_doctor_looks_at_the_machine_alone(run: Run) -> None:
    assert json.loads(run("doctor", "--json").out)["engines"] == []
