"""Signatures, made inputs, running, and the batch axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.errors import ModelError
from repo_manager.onnx_model.batch_axis import BatchAxis, find_batch_axis
from repo_manager.onnx_model.inputs import find_sizes, index_limits, natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import resolve_shape, signature_of
from repo_manager.types import TensorSpec

T = onnx.TensorProto


def loaded(proto: onnx.ModelProto, tmp_path: Path):
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    return model, signature_of(model)


def axis_of(proto: onnx.ModelProto, tmp_path: Path, **samples: np.ndarray) -> BatchAxis:
    return find_batch_axis(*loaded(proto, tmp_path), samples or None)


def one(node: onnx.NodeProto, inputs: list, outputs: list, weights: dict | None = None) -> onnx.ModelProto:
    return onnx_models.model([node] if isinstance(node, onnx.NodeProto) else node, inputs, outputs, weights)


def test_dynamic_dimensions_in_every_spelling(tmp_path: Path) -> None:
    proto = one(
        helper.make_node("Concat", ["a", "b", "c", "d"], ["y"], axis=0),
        [value("a", ["batch", 2]), value("b", ["?", 2]), value("c", [-1, 2]), value("d", [None, 2])],
        [value("y", None)],
    )
    signature = loaded(proto, tmp_path)[1]
    assert [spec.shape for spec in signature.inputs] == [("batch", 2), (None, 2), (None, 2), (None, 2)]
    assert signature.outputs[0].shape is None
    assert (signature.opset, signature.ir_version, signature.opsets) == (17, 8, {"": 17})


def test_initializers_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    proto = onnx_models.mlp()
    proto.ir_version = 3
    proto.graph.input.extend([value("w1", [64, 32]), value("b1", [64]), value("w2", [64, 8])])
    assert [spec.name for spec in loaded(proto, tmp_path)[1].inputs] == ["x"]


def test_element_types(tmp_path: Path) -> None:
    kinds = {T.FLOAT16: "float16", T.BFLOAT16: "bfloat16", T.STRING: "string", T.BOOL: "bool", T.INT64: "int64"}
    nodes = [helper.make_node("Identity", [f"x{kind}"], [f"y{kind}"]) for kind in kinds]
    proto = onnx_models.model(
        nodes, [value(f"x{kind}", ["N"], kind) for kind in kinds], [value(f"y{kind}", ["N"], kind) for kind in kinds]
    )
    assert [spec.dtype for spec in loaded(proto, tmp_path)[1].inputs] == list(kinds.values())


def test_a_sequence_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["s"])
    proto = one(node, [value("x", [1])], [helper.make_tensor_sequence_value_info("s", 1, None)])
    with pytest.raises(ModelError, match="output 's' is not a tensor \\(sequence\\)"):
        loaded(proto, tmp_path)


def test_resolve_shape() -> None:
    spec = TensorSpec("x", "float32", ("N", 3, "H", None))
    assert resolve_shape(spec, batch=0, default=5) == (0, 3, 5, 5)
    assert resolve_shape(spec, batch=2, sizes={"H": 7, "x:3": 9, "N": 4}) == (4, 3, 7, 9)
    assert resolve_shape(TensorSpec("s", "int64", ())) == ()
    cache = TensorSpec("mask", "int64", ("batch", "past + length", "2 * past"))
    assert resolve_shape(cache, batch=3, sizes={"past": 5}, default=4) == (3, 9, 10)
    with pytest.raises(ModelError, match="too large"):
        resolve_shape(spec, default=10**6)


def test_natural_inputs_are_seeded_and_typed() -> None:
    from repo_manager.onnx_model.signature import Signature

    specs = [("f", "float32"), ("h", "float16"), ("b", "bfloat16"), ("i", "int64"), ("u", "uint8"), ("q", "bool")]
    signature = Signature(
        tuple(TensorSpec(name, dtype, ("N", "T")) for name, dtype in [*specs, ("s", "string")]), (), 17, 8, {"": 17}
    )
    first, again = (natural_inputs(signature, batch=3, seed=5, sizes={"T": 4}) for _ in range(2))
    for name, dtype in specs:
        assert first[name].dtype.name == dtype
        np.testing.assert_array_equal(first[name], again[name])
    assert {array.shape for array in first.values()} == {(3, 4)}
    assert first["i"].min() >= 0
    assert first["i"].max() <= 1
    assert all(isinstance(item, str) for item in first["s"].reshape(-1))
    assert not np.array_equal(first["f"], natural_inputs(signature, batch=3, seed=6, sizes={"T": 4})["f"])


def test_indices_stay_inside_their_table(tmp_path: Path) -> None:
    model, signature = loaded(onnx_models.embedding(), tmp_path)
    limits = index_limits(model)
    assert limits == {"tokens": 100}
    tokens = natural_inputs(signature, batch=50, limits=limits)["tokens"]
    assert 90 < tokens.max() < 100
    assert tokens.min() >= 0
    assert index_limits(loaded(onnx_models.mlp(), tmp_path)[0]) == {}


def test_sizes_are_found_by_trying(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = onnx_models.model(
        nodes, [value("x", ["N", "F"])], [value("y", ["N", 3])], {"w": onnx_models.weight((224, 3))}
    )
    model, signature = loaded(proto, tmp_path)
    sizes = find_sizes(Session(model), signature)
    assert sizes["F"] == 224
    assert find_batch_axis(model, signature).batched


def test_session_errors_are_ours(tmp_path: Path) -> None:
    model, signature = loaded(onnx_models.mlp(), tmp_path)
    session = Session(model, optimize=False, threads=1)
    result = session.run(natural_inputs(signature, batch=4))
    assert result["y"].shape == (4, 8)
    with pytest.raises(ModelError, match="running it failed"):
        session.run({"x": np.zeros((1, 31), np.float32)})
    with pytest.raises(ModelError, match="running it failed"):
        session.run({"x": np.zeros((1, 32), np.int64)})
    with pytest.raises(ModelError, match="does not take it"):
        Session(onnx_models.model([helper.make_node("Relu", ["q"], ["y"], domain="no")], [], [value("y", [1])]))


@pytest.mark.parametrize("batch", ["N", None, "?"])
def test_batched(batch: str | None, tmp_path: Path) -> None:
    assert axis_of(onnx_models.mlp(batch=batch), tmp_path).kind == "batched"
    assert axis_of(onnx_models.cnn(batch=batch, size=None), tmp_path).kind == "batched"


def test_batched_integers_strings_bools(tmp_path: Path) -> None:
    assert axis_of(onnx_models.embedding(), tmp_path).batched
    for kind in (T.STRING, T.BOOL, T.INT32):
        proto = one(
            helper.make_node("Identity", ["x"], ["y"]), [value("x", ["N", 2], kind)], [value("y", ["N", 2], kind)]
        )
        assert axis_of(proto, tmp_path).batched


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (onnx_models.mlp(batch=1), "fixed first dimension of 1"),
        (onnx_models.lstm_with_state(), "'h' has a fixed first dimension of 1"),
        (
            one(
                helper.make_node("Mul", ["x", "s"], ["y"]),
                [value("x", ["N", 2]), value("s", [])],
                [value("y", ["N", 2])],
            ),
            "input 's' is a scalar",
        ),
        (
            one(
                helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0),
                [value("x", ["N", 2])],
                [value("y", [])],
            ),
            "output 'y' is a scalar",
        ),
        (
            one(
                helper.make_node("MatMul", ["a", "b"], ["y"]),
                [value("a", ["N", "K"]), value("b", ["K", 3])],
                [value("y", ["N", 3])],
            ),
            "different first dimensions",
        ),
        # The sum over the batch, the running sum along it, its softmax, a rotation of it: samples affect each other.
        (one(helper.make_node("CumSum", ["x", "z"], ["y"]), [value("x", ["N", 4])], [value("y", ["N", 4])],
             {"z": np.int64(0).reshape(())}), "node 'y' (CumSum) adds up along the batch axis"),
        (one(helper.make_node("Softmax", ["x"], ["y"], axis=0), [value("x", ["N", 4])], [value("y", ["N", 4])]),
         "node 'y' (Softmax) normalises over the batch axis"),
        (one(helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0]), [value("x", ["N", 4])], [value("y", [None, 1])]),
         "output 'y' has 4 rows for one sample"),
        (one(helper.make_node("Reshape", ["x", "s"], ["y"]), [value("x", ["N", 4])], [value("y", ["M", 2])],
             {"s": np.array([-1, 2], np.int64)}), "2 rows for one sample"),
        # Detections: as many rows as hits.
        (one([helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Transpose", ["i"], ["y"])],
             [value("x", ["N", 4])], [value("y", ["hits", 2], T.INT64)]), "rows for one sample"),
        (one([helper.make_node("Shape", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=1),
              helper.make_node("ReduceMax", ["f"], ["m"]), helper.make_node("Gather", ["f", "zero"], ["n"]),
              helper.make_node("Div", ["x", "n"], ["y"])],
             [value("x", ["N", 4])], [value("y", ["N", 4])], {"zero": np.array([0], np.int64)}),
         "node 'y' (Div) computes with the number of samples"),
    ],
)  # fmt: skip
def test_unbatched_with_reason(proto: onnx.ModelProto, reason: str, tmp_path: Path) -> None:
    found = axis_of(proto, tmp_path)
    assert (found.kind, found.batched) == ("unbatched", False)
    assert reason in found.reason


def test_samples_are_used(tmp_path: Path) -> None:
    """An index input no made-up values can satisfy: only the samples run."""
    node = helper.make_node("Gather", ["t", "x"], ["y"], axis=0)
    check = helper.make_node("Div", ["c", "x"], ["q"])
    proto = onnx_models.model(
        [check, node], [value("x", ["N"], T.INT64)], [value("y", ["N", 2])],
        {"t": onnx_models.weight((9, 2)), "c": np.array([8], np.int64)},
    )  # fmt: skip
    assert axis_of(proto, tmp_path, x=np.array([3, 4, 5])).batched


def test_sizes_are_found_where_one_axis_is_long_and_another_is_the_batch(tmp_path: Path) -> None:
    """A state's free axis is the batch; the signal's has to be longer than its padding."""
    if onnx_models.runtime_is_older_than("1.24"):
        pytest.skip("ONNX Runtime before 1.24 runs a reflection that is longer than its signal")
    weights = {"pads": np.array([0, 40, 0, 40]), "w": onnx_models.weight((8, 8))}
    nodes = [
        helper.make_node("Pad", ["signal", "pads"], ["padded"], mode="reflect"),
        helper.make_node("ReduceMean", ["padded"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("MatMul", ["state", "w"], ["s"]),
        helper.make_node("ReduceSum", ["s", "first"], ["rows"], keepdims=0),
        helper.make_node("Concat", ["mean", "rows"], ["y"], axis=1),
    ]
    weights["first"] = np.array([0])
    inputs = [value("signal", [None, None]), value("state", [2, None, 8])]
    path = onnx_models.save(onnx_models.model(nodes, inputs, [value("y", None)], weights), tmp_path / "m.onnx")
    signature = signature_of(load_model(path))
    sizes = find_sizes(Session(path), signature)
    assert (sizes["state:1"], sizes["signal:1"] > 40) == (1, True)
    Session(path).run(natural_inputs(signature, sizes=sizes))


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_the_batch_has_one_size_on_whatever_axis_it_is(batch: int | None, tmp_path: Path) -> None:
    inputs = [value("signal", ["batch", "time"]), value("state", [2, "batch", 8])]
    nodes = [
        helper.make_node("ReduceSum", ["signal"], ["a"], keepdims=0),
        helper.make_node("Add", ["state", "a"], ["y"]),
    ]
    _, signature = loaded(one(nodes, inputs, [value("y", None)]), tmp_path)
    arrays = natural_inputs(signature, batch=batch)
    assert arrays["signal"].shape[0] == arrays["state"].shape[1] == (batch or 1)
    assert natural_inputs(signature, batch=batch, sizes={"batch": 5})["state"].shape == (2, 5, 8)
