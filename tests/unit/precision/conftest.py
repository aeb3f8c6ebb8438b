from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repo_manager.onnx_model.draft import Draft
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import write_draft

Save = Callable[..., Model]


def tensor_value(name: str, shape: Sequence[Any] | None, data_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, shape)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(nodes, inputs, outputs, weights, opset=17) -> a loaded model; inputs and outputs map names to shapes."""

    def make(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        weights: Mapping[str, Any] | None = None,
        *,
        opset: int = 17,
        name: str = "model.onnx",
        functions: Sequence[onnx.FunctionProto] = (),
        domains: Mapping[str, int] | None = None,
    ) -> Model:
        def values(given: Mapping[str, Any]) -> list[onnx.ValueInfoProto]:
            return [v if isinstance(v, onnx.ValueInfoProto) else tensor_value(k, v) for k, v in given.items()]

        tensors = [numpy_helper.from_array(np.asarray(array), key) for key, array in (weights or {}).items()]
        graph = helper.make_graph(list(nodes), "test", values(inputs), values(outputs), tensors)
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*item) for item in (domains or {}).items())]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=list(functions))
        onnx.save(proto, tmp_path / name)
        return load_model(tmp_path / name)

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Draft, Mapping[str, Any]], dict[str, Any]]:
    """run(draft, inputs) -> outputs, after ONNX's full checker."""

    def of(draft: Draft, inputs: Mapping[str, Any], *, optimize: bool = True) -> dict[str, Any]:
        path = write_draft(draft, tmp_path / "draft.onnx").files[0]
        onnx.checker.check_model(str(path), full_check=True)
        return Session(path, optimize=optimize).run(inputs)

    return of


@pytest.fixture
def cnn(save: Save) -> Model:
    """Conv (2:4 along C) - BatchNormalization - Relu - Conv - residual Add - Relu - GlobalAveragePool - Gemm."""
    rng = np.random.default_rng(7)

    def weight(*shape: int) -> Any:
        values = rng.standard_normal(shape).astype(np.float32) * (2.0 / np.prod(shape[1:])) ** 0.5
        return values.astype(np.float32)

    sparse = weight(8, 8, 3, 3)
    sparse[:, 0::4] = 0
    sparse[:, 1::4] = -0.0
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0", "b"], ["c0"], name="stem", pads=[1] * 4),
        node("BatchNormalization", ["c0", "s", "o", "m", "v"], ["n0"], name="bn"),
        node("Relu", ["n0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1", "b"], ["c1"], name="body", pads=[1] * 4),
        node("Add", ["c1", "r0"], ["a"], name="residual"),
        node("Relu", ["a"], ["r1"], name="relu1"),
        node("GlobalAveragePool", ["r1"], ["g"], name="pool"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "wh", "bh"], ["y"], name="head", transB=1),
    ]
    weights = {
        "w0": weight(8, 3, 3, 3), "w1": sparse, "wh": weight(5, 8), "bh": weight(5, 1).reshape(-1),
        "b": rng.standard_normal(8).astype(np.float32), "s": np.full(8, 1.5, np.float32),
        "o": np.full(8, 0.1, np.float32), "m": rng.standard_normal(8).astype(np.float32),
        "v": np.full(8, 2.0, np.float32),
    }  # fmt: skip
    return save(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 5]}, weights)


@pytest.fixture
def draft(cnn: Model) -> Draft:
    return draft_of(cnn)
