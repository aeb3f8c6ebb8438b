from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repo_manager.errors import ModelError
from repo_manager.onnx_model import load_model, signature_of
from repo_manager.triton_config import runtime_signature, served_signature


def dense(path: Path, shape: tuple[object, ...]) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ones((4, 5), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def test_output_shapes_are_narrowed_as_onnxruntime_narrows_them(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx", ("N", None))
    declared = signature_of(load_model(path))
    assert declared.outputs[0].shape == ("N", None)
    assert served_signature(declared, path).outputs[0].shape == ("N", 5)
    assert served_signature(declared, path).inputs == declared.inputs


def test_what_onnxruntime_does_not_take_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"m\.onnx: ONNX Runtime"):
        runtime_signature(tmp_path / "m.onnx")
