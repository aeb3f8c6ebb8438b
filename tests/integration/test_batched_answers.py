"""No answer of a server holds other clients' data, unless somebody asked for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import onnx_models

from repo_manager.onnx_model.session import Session
from repo_manager.pipeline.add_types import AddOptions
from repo_manager.pipeline.adding import add
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.triton_config.options import ConfigOptions

pytestmark = pytest.mark.integration

_ASKS = 40


def floor() -> onnx.ModelProto:
    """A log spectrum with a floor below the loudest value of the whole batch, as audio front ends are exported."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Mul", ["m", "m"], ["power"]),
        helper.make_node("Add", ["power", "tiny"], ["positive"]),
        helper.make_node("Log", ["positive"], ["log"]),
        helper.make_node("ReduceMax", ["log"], ["loudest"], name="loudest", keepdims=0),
        helper.make_node("Sub", ["loudest", "range"], ["floor"]),
        helper.make_node("Max", ["log", "floor"], ["y"]),
    ]
    weights = {"w": onnx_models.weight((64, 32)), "tiny": np.float32(1e-20), "range": np.float32(6)}
    return onnx_models.model(
        nodes,
        [onnx_models.value("x", ["N", 64])],
        [onnx_models.value("y", ["N", 32])],
        {name: np.asarray(value) for name, value in weights.items()},
    )


def quantised() -> onnx.ModelProto:
    """A MatMul as `quantize_dynamic` writes it: one scale for the whole batch."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"], name="quantise"),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    weight = np.random.default_rng(0).integers(-100, 101, (64, 16)).astype(np.int8)
    return onnx_models.model(
        nodes, [onnx_models.value("x", ["N", 64])], [onnx_models.value("y", ["N", 16])], {"w": weight}
    )


def worst_error(server: EmbeddedServer, name: str, path: Path) -> float:
    """Ask for a quiet and a loud sample from eight clients at once; return the largest error of a quiet answer."""
    random = np.random.default_rng(1)
    samples = [random.standard_normal((1, 64)).astype(np.float32) * scale for scale in (np.float32(0.05), 100)]
    samples = [sample.astype(np.float32) for sample in samples]
    session = Session(path)
    wanted = session.run({"x": samples[0]})["y"]

    def ask(client_number: int) -> float:
        errors = [0.0]
        with TritonClient.connect(server.grpc_url) as client:
            for _ in range(_ASKS):
                answer = client.infer(name, 1, {"x": samples[client_number % 2]})["y"]
                if client_number % 2 == 0:
                    errors.append(float(np.linalg.norm(answer - wanted) / np.linalg.norm(wanted)))
        return max(errors)

    with ThreadPoolExecutor(8) as pool:
        return max(pool.map(ask, range(8)))


@pytest.mark.parametrize("make", [floor, quantised])
def test_answers_are_those_of_a_request_alone(
    make: object, repository: Path, server: EmbeddedServer, client: TritonClient, tmp_path: Path
) -> None:
    assert callable(make)
    path = onnx_models.save(make(), tmp_path / "m.onnx")
    name = make.__name__
    plain = add(path, name, repository, AddOptions(backend="onnxruntime"))
    assert "max_batch_size: 0" in plain.config
    client.load(name)
    assert worst_error(server, name, path) < 1e-5
    # Forced into batches, requests meet: the server joins them, and the error shows it.
    waiting = ConfigOptions(max_batch_size=8, max_queue_delay_us=200_000, preferred_batch_sizes=(8,))
    forced = add(path, f"{name}_forced", repository, AddOptions(backend="onnxruntime", config=waiting))
    assert forced.batch_axis.forced
    client.load(f"{name}_forced")
    assert worst_error(server, f"{name}_forced", path) > 0.05
