"""A large model runs without the layout optimisations: they would keep its weights twice more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import save_model


@pytest.mark.parametrize(("side", "stated"), [(64, "all optimisations"), (4200, "but those of the memory layout")])
def test_what_is_optimised_is_stated(tmp_path: Path, side: int, stated: str) -> None:
    weight = numpy_helper.from_array(np.zeros((side, side), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", side])],
        [weight],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "model.onnx"
    save_model(proto, path, external=side == 4200)
    for model in (path, load_model(path), proto):
        assert Session(model).optimisations.endswith(stated)
        assert Session(model, optimize=False).optimisations == "no optimisations"
