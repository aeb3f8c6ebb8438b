from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import onnx_models

from repo_manager.engine.control import control_twins, dense_twin
from repo_manager.errors import ModelError
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.sparsity import SparsityVerdict, sparsity_report
from repo_manager.types import Backend


@pytest.fixture
def sparse(tmp_path: Path) -> Model:
    return load_model(onnx_models.save(onnx_models.cnn(sparse=True), tmp_path / "m.onnx"))


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_the_twin_has_the_same_graph_and_no_valid_layer(sparse: Model, tmp_path: Path) -> None:
    before = sparsity_report(sparse)
    assert any(layer.verdict is SparsityVerdict.VALID for layer in before.layers)
    proto, filled = dense_twin(sparse)
    save_model(proto, tmp_path / "dense.onnx")
    twin = load_model(tmp_path / "dense.onnx")
    after = sparsity_report(twin)
    assert not any(layer.verdict is SparsityVerdict.VALID for layer in after.layers)
    assert set(filled) == {layer.weight for layer in before.layers if layer.verdict is SparsityVerdict.VALID}
    assert [(n.op_type, n.name, n.input, n.output) for n in proto.graph.node] == [
        (n.op_type, n.name, n.input, n.output) for n in sparse.proto.graph.node
    ]
    assert signature_of(twin) == signature_of(sparse)
    outputs = Session(twin).run(natural_inputs(signature_of(twin)))
    assert all(np.isfinite(array).all() for array in outputs.values())


def test_kept_values_stay_and_filled_ones_are_within_their_range(sparse: Model) -> None:
    proto, filled = dense_twin(sparse)
    for name in filled:
        old, new = weights(sparse.proto)[name], weights(proto)[name]
        kept = old != 0
        assert np.array_equal(new[kept], old[kept])
        assert np.abs(new).max() == np.abs(old).max()
        assert (new != 0).all()


def test_the_same_seed_gives_the_same_twin(sparse: Model) -> None:
    first, second, other = dense_twin(sparse)[0], dense_twin(sparse)[0], dense_twin(sparse, seed=1)[0]
    assert first.SerializeToString() == second.SerializeToString()
    assert first.SerializeToString() != other.SerializeToString()


def test_a_dense_model_has_no_denser_twin(tmp_path: Path) -> None:
    model = load_model(onnx_models.save(onnx_models.cnn(sparse=False), tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="no denser twin"):
        dense_twin(model)


def test_the_names_and_what_differs() -> None:
    dense, noflag = control_twins("m", Backend.TENSORRT)
    assert (dense.name, dense.dense, dense.sparse_flag) == ("m__dense", True, True)
    assert (noflag.name, noflag.dense, noflag.sparse_flag) == ("m__noflag", False, False)
    assert [twin.name for twin in control_twins("m", Backend.ONNXRUNTIME)] == ["m__dense"]
