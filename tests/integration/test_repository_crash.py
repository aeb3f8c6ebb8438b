"""Every operation killed at every call to its store, Triton on the remains, and 64 writers at once; both stores."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.repository_suites.operations import CONTENT, OPERATIONS, SPOILT
from support.repository_suites.run import run_suite
from support.serving import onnx_model

from repo_manager.repository.scan import find_model
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]
AUTO_COMPLETE = False


def run(suite: str, store: str, *arguments: object) -> Any:
    if store == "objects":
        pytest.importorskip("obstore")
    done = run_suite(suite, store, "WORK", *arguments, timeout_s=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stderr.write(done.stderr)  # the failing child's output is shown with the failing test
    return json.loads(done.stdout.splitlines()[-1])


def served_model() -> bytes:
    """A model for the configurations of the operations: x[N, 3] to y[N, 2]."""
    return onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["N", 3])},
        {"y": (TensorProto.FLOAT, ["N", 2])},
        {"w": np.ones((3, 2), np.float32)},
    ).SerializeToString()


def make_real(folder: Path) -> None:
    """The operations use stand-ins, for speed: whole copies become a model here, and torn ones stay torn."""
    real = served_model()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "config.pbtxt" and path.read_bytes() == CONTENT:
            path.write_bytes(real)
    config = folder / "config.pbtxt"
    if config.exists():
        lines = config.read_text().replace('backend: "other"', 'backend: "onnxruntime"').splitlines()
        config.write_text("\n".join(line for line in lines if not line.startswith("name:")))


def is_damaged(folder: Path) -> bool:
    """Whether the damage repaired by an operation is there, or config.pbtxt is missing."""
    spoilt = any(path.read_bytes() == SPOILT for path in folder.rglob("*.onnx"))
    return spoilt or not (folder / "config.pbtxt").exists()


@pytest.mark.parametrize(("store", "stride", "least"), [("disk", 1, 1000), ("objects", 3, 130)])
def test_triton_loads_whatever_a_death_at_any_call_left(
    store: str, stride: int, least: int, repository: Path, server: EmbeddedServer, tmp_path: Path
) -> None:
    """After each death the operation's own checks hold; hundreds of deaths leave a dozen different models, and each
    loads as its config.pbtxt says.

    In object storage every third call: `test_repository_power_loss` tries each subset of the unanswered writes there.
    """
    left = tmp_path / "left"
    left.mkdir()
    points = run("crash_points", store, stride, left)
    assert points.keys() == OPERATIONS.keys()
    assert min(points.values()) > 3 // stride, points
    assert sum(points.values()) >= least, points
    folders = sorted(left.iterdir())
    whole = [folder for folder in folders if not is_damaged(folder)]
    assert len(whole) >= 10
    with TritonClient.connect(server.grpc_url) as client:
        for folder in whole:
            make_real(folder)
            shutil.copytree(folder, repository / folder.name)
            client.load(folder.name)
            ready = [number for number, entry in client.versions(folder.name).items() if entry.state == "READY"]
            served = find_model(repository, folder.name).selected
            assert tuple(sorted(ready)) == served != (), folder.name
            client.unload(folder.name)


@pytest.mark.parametrize(("store", "adds"), [("disk", 20), ("objects", 1)])
def test_64_writers_with_gc_and_verify(store: str, adds: int) -> None:
    result = run("many_writers", store, 64, adds)
    count = 64 * adds
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > count - 30] == list(range(count - 29, count + 1))
    assert result["contents"] == len(result["left"])
