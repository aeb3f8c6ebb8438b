"""The answers that count as proof, from a server that answers as told."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repo_manager.repository.golden import GOLDEN_FILE_NAME, Golden, write_golden
from repo_manager.repository.publish import publish
from repo_manager.rollout.smoke import SmokeFailedError, smoke_test
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import ModelConfig, parse_config

CONFIG = """backend: "onnxruntime" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: [2, 3] } output { name: "z" data_type: TYPE_INT64 dims: 2 }
"""
Y = {"name": "y", "datatype": "FP32", "shape": [1, 2, 3], "data": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
Z = {"name": "z", "datatype": "INT64", "shape": [1, 2], "data": [7, 8]}
OUTPUTS = [
    {"name": "y", "data_type": "TYPE_FP32", "dims": [2, 3]},
    {"name": "z", "data_type": "TYPE_INT64", "dims": [2]},
]


@contextlib.contextmanager
def lying(outputs: object, promised: object = OUTPUTS) -> Iterator[str]:
    """Run a server with given answers. Give its URL."""
    config = {"name": "m", "max_batch_size": 4, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]}
    answers: dict[str, Any] = {
        "config": {**config, "output": promised},
        "infer": {"model_name": "m", "model_version": "1", "outputs": outputs},
    }

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            content = json.dumps(answers[self.path.rpartition("/")[2]]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A published version with a recorded sample."""
    golden, model, root = tmp_path / GOLDEN_FILE_NAME, tmp_path / "model.onnx", tmp_path / "models"
    model.write_bytes(b"x")
    right = {
        "y": np.array(Y["data"], np.float32).reshape(1, 2, 3),
        "z": np.array(Z["data"], np.int64).reshape(1, 2),
    }
    write_golden(golden, Golden({"x": np.ones((1, 2), np.float32)}, right))
    files = {"model.onnx": model, GOLDEN_FILE_NAME: golden}
    publish(root, "m", files, parse_config(CONFIG, where="config.pbtxt"), {"precision": "fp32"})
    return root / "m" / "1"


def prove(version: Path, url: str, config: ModelConfig) -> object:
    with TritonClient.connect(url) as client:
        return smoke_test(client, version, "m", 1, config, timeout_s=10.0)


LIES: dict[str, tuple[object, str]] = {
    "no output": ([], "without its outputs y, z"),
    "one output is missing": ([Y], "without its outputs z"),
    "another output": ([Y, {**Z, "name": "zz"}], "without its outputs z"),
    "an output of another type": ([Y, {**Z, "datatype": "FP32"}], "z as float32, promised was TYPE_INT64"),
    "as many elements in another shape": ([{**Y, "shape": [1, 3, 2]}, Z], r"y with the shape \[1, 3, 2\]"),
    "without the batch axis": ([{**Y, "shape": [2, 3]}, Z], r"y with the shape \[2, 3\]"),
    "as many samples again": ([{**Y, "shape": [2, 2, 3], "data": [*Y["data"], *Y["data"]]}, Z], "y is off"),
    "no element": ([{**Y, "shape": [0, 2, 3], "data": []}, Z], "y is off"),
    "a wrong number": ([Y, {**Z, "data": [7, 9]}], "z is off"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("promised", [OUTPUTS, []], ids=["its configuration is right", "its configuration lies, too"])
def test_every_recorded_output_has_to_come(lie: str, promised: object, version: Path) -> None:
    outputs, reason = LIES[lie]
    config = parse_config(CONFIG if promised else CONFIG.partition("output")[0], where="config.pbtxt")
    with lying(outputs, promised) as url, pytest.raises(SmokeFailedError, match=reason):
        prove(version, url, config)


def test_a_type_that_was_recorded_is_noted_where_another_was_promised(version: Path) -> None:
    """Triton does not check it, so models serve it: NVIDIA's example bls_decoupled promises INT32 and sends INT64."""
    config = parse_config(CONFIG.replace("TYPE_INT64", "TYPE_INT32"), where="config.pbtxt")
    files = {name: version / name for name in ("model.onnx", GOLDEN_FILE_NAME)}
    root = version.parents[1].with_name("other")
    publish(root, "m", files, config, {"precision": "fp32"})
    version = root / "m" / "1"
    with lying([Y, Z]) as url:
        result = prove(version, url, config)
    assert "output z comes as int64, and config.pbtxt promises TYPE_INT32" in result.note  # type: ignore[attr-defined]
    with lying([Y, {**Z, "datatype": "FP32"}]) as url, pytest.raises(SmokeFailedError, match="z as float32"):
        prove(version, url, config)


def test_a_shape_that_was_recorded_is_noted_where_another_was_promised(tmp_path: Path) -> None:
    """Triton does not check it either: the server project's sequence_py leaves the batch axis out."""
    golden, model, root = tmp_path / GOLDEN_FILE_NAME, tmp_path / "model.onnx", tmp_path / "models"
    model.write_bytes(b"x")
    bare = {"y": np.array(Y["data"], np.float32).reshape(1, 2, 3), "z": np.array([7], np.int64)}
    write_golden(golden, Golden({"x": np.ones((1, 2), np.float32)}, bare))
    config = parse_config(CONFIG.replace("TYPE_INT64 dims: 2", "TYPE_INT64 dims: 1"), where="config.pbtxt")
    publish(root, "m", {"model.onnx": model, GOLDEN_FILE_NAME: golden}, config, {"precision": "fp32"})
    with lying([Y, {**Z, "shape": [1], "data": [7]}]) as url:
        result = prove(root / "m" / "1", url, config)
    assert "output z comes with the shape [1], and config.pbtxt promises [-1, 1]" in result.note  # type: ignore[attr-defined]
    for other in ({**Z, "shape": [2]}, {**Z, "shape": [1], "data": [8]}):
        with lying([Y, other]) as url, pytest.raises(SmokeFailedError, match=r"with the shape|z is off"):
            prove(root / "m" / "1", url, config)


def test_a_right_answer_is_proof(version: Path) -> None:
    with lying([Y, Z]) as url:
        result = prove(version, url, parse_config(CONFIG, where="config.pbtxt"))
    assert [(each.output, each.error) for each in result.outputs] == [("y", 0.0), ("z", 0.0)]  # type: ignore[attr-defined]
