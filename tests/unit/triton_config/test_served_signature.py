from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models

from repo_manager.errors import ConfigError, ModelError
from repo_manager.onnx_model.batch_axis import BatchAxis
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.runtime import RuntimeProcess, SessionSource
from repo_manager.onnx_model.signature import signature_of
from repo_manager.triton_config.compare import check_config
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.served_signature import runtime_signature, served_signature
from repo_manager.types import Backend


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


FOLDED = onnx_models.folded()


@pytest.mark.parametrize("kind", FOLDED)
def test_output_shapes_are_those_after_constant_folding(kind: str, tmp_path: Path) -> None:
    """A server folds constants. A load without optimisations gives another shape, refused by both backends."""
    path = onnx_models.save(FOLDED[kind], tmp_path / "m.onnx")
    declared = signature_of(load_model(path))
    served = served_signature(declared, path)
    unfolded = runtime_signature(path, parse_config("optimization { graph { level: 2 } }"))
    assert served.outputs != unfolded.outputs
    axis = BatchAxis("batched" if kind.startswith("batched") else "unbatched", "by construction")
    config = derive_config("m", served, axis, Backend.ONNXRUNTIME)
    assert check_config(config, runtime_signature(path, config)) == []
    assert check_config(derive_config("m", declared, axis, Backend.ONNXRUNTIME), runtime_signature(path)) != []


@pytest.mark.parametrize(("level", "shape"), [(2, ("a", "b")), (-1, (2, 4)), (1, (2, 4)), (0, (2, 4))])
def test_the_configuration_decides_how_far_a_server_optimises(
    level: int, shape: tuple[object, ...], tmp_path: Path
) -> None:
    path = onnx_models.save(FOLDED["reshape"], tmp_path / "m.onnx")
    config = parse_config(f"optimization {{ graph {{ level: {level} }} }}")
    assert runtime_signature(path, config).outputs[0].shape == shape


def test_a_session_parameter_that_the_server_would_refuse_is_refused(tmp_path: Path) -> None:
    path = onnx_models.save(FOLDED["reshape"], tmp_path / "m.onnx")
    text = 'parameters { key: "session.graph_optimizations_loop_level" value { string_value: "x" } }'
    config: ModelConfig = parse_config(text)
    with pytest.raises(ModelError, match="does not take it"):
        runtime_signature(path, config)


def test_an_output_whose_first_axis_is_fixed_is_not_stated_as_batched(tmp_path: Path) -> None:
    path = onnx_models.save(FOLDED["reshape"], tmp_path / "m.onnx")
    served = served_signature(signature_of(load_model(path)), path)
    with pytest.raises(ConfigError, match="first dimension is 2"):
        derive_config("m", served, BatchAxis("batched", "claimed"), Backend.ONNXRUNTIME)


def test_a_large_model_is_loaded_without_another_copy_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout optimisations are left out there; its output's shape is the same."""
    path = onnx_models.save(onnx_models.cnn(), tmp_path / "m.onnx")
    expected = runtime_signature(path)
    monkeypatch.setattr(importlib.import_module("repo_manager.triton_config.served_signature"), "_LARGE_BYTES", 1)
    levels = []
    ask = RuntimeProcess.open

    def recorded(process: RuntimeProcess, source: SessionSource, where: str) -> object:
        levels.append(source.level)
        return ask(process, source, where)

    monkeypatch.setattr(RuntimeProcess, "open", recorded)
    assert runtime_signature(path) == expected
    assert levels == ["ORT_ENABLE_EXTENDED"]
