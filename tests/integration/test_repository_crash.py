"""The repository's operations killed at every file-system call, Triton on what is left, and 64 writers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.serving import onnx_model

from repo_manager.repository import find_model
from repo_manager.server import EmbeddedServer, TritonClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SCRIPTS = Path(__file__).parents[1] / "unit" / "repository"


def run(script: str, *arguments: object) -> Any:
    memory = Path("/dev/shm")  # What a killed process leaves does not depend on the disk, and fsync takes its time.
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        (Path(folder) / "tests_conftest.py").write_text((SCRIPTS / "conftest.py").read_text())
        (Path(folder) / "work").mkdir()
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / script), str(Path(folder) / "work"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
            check=False,
            timeout=580,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stderr.write(done.stderr)  # what a failing child said is shown with the failing test
    return json.loads(done.stdout.splitlines()[-1])


AUTO_COMPLETE = False
SPOILT = b"spoilt"  # What the operations that repair find.


def served_model() -> bytes:
    """A model that fits the configurations of crash_points.py: x[N, 3] to y[N, 2]."""
    return onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["N", 3])},
        {"y": (TensorProto.FLOAT, ["N", 2])},
        {"w": np.ones((3, 2), np.float32)},
    ).SerializeToString()


@pytest.fixture(scope="module")
def crashed(repository: Path) -> dict[str, int]:
    """Crash every operation everywhere, and put what is left of models, once for each content, where a server serves.

    The operations work on stand-ins for speed: whole copies of these become a real model here. What is torn stays torn.
    """
    points = run("crash_points.py", 1, repository)
    whole, real = b"content " * 50, served_model()
    for folder in list(repository.iterdir()):
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "config.pbtxt" and path.read_bytes() == whole:
                path.write_bytes(real)
        config = folder / "config.pbtxt"
        if config.exists():
            lines = config.read_text().replace('backend: "other"', 'backend: "onnxruntime"').splitlines()
            config.write_text("\n".join(line for line in lines if not line.startswith("name:")))
    return points


def test_killed_at_every_call(crashed: dict[str, int]) -> None:
    assert sum(crashed.values()) >= 1000, crashed


def test_triton_loads_whatever_a_crash_left(crashed: dict[str, int], repository: Path, server: EmbeddedServer) -> None:
    """Over 1,000 crashes leave a dozen different models, and each loads as its config.pbtxt says."""
    folders = [folder for folder in sorted(repository.iterdir()) if folder.is_dir()]
    damaged = [folder.name for folder in folders if not (folder / "config.pbtxt").exists() or is_spoilt(folder)]
    assert len(folders) - len(damaged) >= 10
    with TritonClient.connect(server.grpc_url) as client:
        for folder in folders:
            if folder.name in damaged:
                continue
            client.load(folder.name)
            ready = [number for number, entry in client.versions(folder.name).items() if entry.state == "READY"]
            served = find_model(repository, folder.name).served_versions
            assert tuple(sorted(ready)) == served != (), folder.name
            client.unload(folder.name)


def is_spoilt(folder: Path) -> bool:
    return any(path.read_bytes() == SPOILT for path in folder.rglob("*.onnx"))


def test_64_writers_of_20_versions_with_gc_and_verify() -> None:
    result = run("many_writers.py", 64, 20)
    assert result["failed"] == 0
    assert result["numbers_right"]
    assert result["problems"] == []
    assert result["rest"] == []
    assert [version for version in result["left"] if version > 1250] == list(range(1251, 1281))
