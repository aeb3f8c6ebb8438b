from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import Draft
from repo_manager.onnx_model.source import draft_of
from repo_manager.precision.candidate import Keep
from repo_manager.precision.passes.lower import Lowered, lower
from repo_manager.precision.passes.lowering_rules import to_low
from repo_manager.precision.passes.prepare import prepare
from repo_manager.precision.passes.value_types import infer_types, type_table

FP16 = TensorProto.FLOAT16
node = helper.make_node


def lowered(model: Any, *, keep: Keep | None = None, keep_io_types: bool = True, low: int = FP16) -> Lowered:
    return lower(prepare(draft_of(model), opset=1), low, keep_io_types=keep_io_types, keep=keep or Keep())


def types(draft: Draft) -> dict[str, int]:
    return {name: value.data_type for name, value in type_table(infer_types(draft).graph).items()}


def ops(draft: Draft) -> list[str]:
    return [node.op_type for graph in walk.graphs_of(draft.graph) for node in graph.node]


def is_sorted(draft: Draft) -> bool:
    known = set(draft.weights) | {value.name for value in draft.graph.input} | {""}
    for each in draft.graph.node:
        if not known.issuperset(each.input):
            return False
        known.update(each.output)
    return True


def test_cnn_computes_in_fp16_between_one_cast_in_and_one_out(draft, run):
    result = lower(prepare(draft, opset=1), FP16, keep_io_types=True, keep=Keep())
    assert ops(result.draft).count("Cast") == 2
    assert result.kept == {}
    assert all(weight.data_type == FP16 for weight in result.draft.weights.values())
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(result.draft, {"x": x})["y"], run(draft, {"x": x})["y"], rtol=0.02, atol=0.02)


def test_the_source_draft_is_not_changed(draft):
    before = draft.proto.SerializeToString()
    lower(draft, FP16, keep_io_types=True, keep=Keep(["Relu"]))
    assert draft.proto.SerializeToString() == before


def test_trap_unsorted_result(save):
    """A Cast for a kept node must stand before it, not at the end of the list as ONNX Runtime's converter puts it."""
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["b"], name="n"), node("Relu", ["b"], ["y"])]
    result = lowered(save(nodes, {"x": [2]}, {"y": [2]}), keep=Keep(["n"]))
    assert is_sorted(result.draft)


def test_trap_unsorted_source(save, run):
    nodes = [node("Relu", ["a"], ["y"]), node("Neg", ["x"], ["a"])]
    model = save(nodes, {"x": [2]}, {"y": [2]})
    assert model.reordered
    x = np.array([-1.5, 2], np.float32)
    np.testing.assert_array_equal(run(lowered(model).draft, {"x": x})["y"], [1.5, 0])


def test_trap_cast_there_and_back(save):
    """Between neighbours of one type there is no Cast, and one per value where types meet."""
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["b"], name="k1"),
        node("Abs", ["b"], ["c"], name="k2"),
        node("Exp", ["b"], ["d"], name="k3"),
        node("Add", ["c", "d"], ["e"]),
        node("Add", ["e", "c"], ["y"]),
    ]
    result = lowered(save(nodes, {"x": [2]}, {"y": [2]}), keep=Keep(["k?"]))
    casts = [n for n in result.draft.graph.node if n.op_type == "Cast"]
    assert len(casts) == len({(n.input[0], n.attribute[0].i) for n in casts}) == 5  # x, a, c, d, y
    producer = {n.output[0]: n for n in casts}
    assert not any(n.input[0] in producer for n in casts)


def test_trap_source_that_casts_to_float_anyway(save, run):
    nodes = [node("Cast", ["x"], ["a"], to=1), node("Relu", ["a"], ["b"]), node("Cast", ["b"], ["y"], to=1)]
    result = lowered(save(nodes, {"x": [3]}, {"y": [3]}))
    x = np.array([1, -2, 3], np.float32)
    np.testing.assert_array_equal(run(result.draft, {"x": x})["y"], [1, 0, 3])


def test_trap_integer_is_cast_once(save):
    nodes = [node("Cast", ["x"], ["a"], to=1), node("Mul", ["a", "w"], ["y"])]
    model = save(nodes, {"x": helper.make_tensor_value_info("x", TensorProto.INT64, [3])}, {"y": [3]},
                 {"w": np.float32([1, 2, 3])})  # fmt: skip
    casts = [n for n in lowered(model).draft.graph.node if n.op_type == "Cast"]
    assert (casts[0].input[0], casts[0].attribute[0].i) == ("x", FP16)
    assert len(casts) == 2


def test_trap_weight_shared_by_fp16_and_fp32_readers(save, run):
    nodes = [node("MatMul", ["x", "w"], ["a"], name="low"), node("MatMul", ["a", "w"], ["y"], name="high")]
    model = save(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"w": np.eye(4, dtype=np.float32) * 3})
    result = lowered(model, keep=Keep(["high"]))
    assert sorted(weight.data_type for weight in result.draft.weights.values()) == [TensorProto.FLOAT, FP16]
    np.testing.assert_array_equal(run(result.draft, {"x": np.ones((1, 4), np.float32)})["y"], np.full((1, 4), 9))


def test_a_weight_keeps_its_name(save):
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}, {"w": np.eye(4, dtype=np.float32)})
    assert list(lowered(model).draft.weights) == ["w"]


def test_trap_resize_scales_stay_fp32(save, run):
    model = save(
        [node("Resize", ["x", "", "s"], ["y"])], {"x": [1, 1, 2, 2]}, {"y": [1, 1, 4, 4]},
        {"s": np.float32([1, 1, 2, 2])},
    )  # fmt: skip
    result = lowered(model)
    assert result.draft.weights["s"].data_type == TensorProto.FLOAT
    assert run(result.draft, {"x": np.ones((1, 1, 2, 2), np.float32)})["y"].shape == (1, 1, 4, 4)


def test_trap_positions_computed_from_shapes_stay_fp32(save, run):
    """Above 2048 FP16 has no odd integers: a grid of positions would lose every other cell."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["sf"], to=1),
        node("Mul", ["sf", "half"], ["h"], name="arithmetic"),
        node("Cast", ["h"], ["hi"], to=7),
        node("Slice", ["x", "zero", "hi"], ["y"]),
    ]
    model = save(nodes, {"x": ["N"]}, {"y": ["M"]}, {"half": np.float32(0.5), "zero": np.int64([0])})
    result = lowered(model)
    assert result.kept["arithmetic"] == ("Mul", "computes shapes or positions")
    assert run(result.draft, {"x": np.zeros(5002, np.float32)})["y"].shape == (2501,)


def test_trap_tiny_epsilon_does_not_become_zero(save, run):
    nodes = [node("Abs", ["x"], ["a"]), node("Add", ["a", "eps"], ["b"]), node("Div", ["x", "b"], ["y"])]
    model = save(nodes, {"x": [2]}, {"y": [2]}, {"eps": np.float32(1e-12)})
    assert np.isfinite(run(lowered(model).draft, {"x": np.float32([0, 1])})["y"]).all()


def test_trap_mask_constants_become_the_largest_number(save, run):
    nodes = [node("Mul", ["x", "big"], ["m"]), node("Softmax", ["m"], ["y"], axis=-1)]
    model = save(nodes, {"x": [1, 3]}, {"y": [1, 3]}, {"big": np.float32(-3.4e38)})
    result = lowered(model)
    assert result.kept == {}
    np.testing.assert_allclose(run(result.draft, {"x": np.float32([[0, 1, 1]])})["y"], [[1, 0, 0]], atol=1e-3)


def test_trap_weight_beyond_fp16_keeps_its_node(save):
    model = save([node("Mul", ["x", "w"], ["y"], name="m")], {"x": [2]}, {"y": [2]}, {"w": np.float32([1e5, 1])})
    assert "exceeds FP16's largest number" in lowered(model).kept["m"][1]


def test_trap_variance_of_a_written_out_layer_norm_stays_fp32(save, run):
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[-1], name="mean"),
        node("Sub", ["x", "m"], ["d"], name="sub"),
        node("Pow", ["d", "two"], ["q"], name="square"),
        node("ReduceMean", ["q"], ["v"], axes=[-1], name="variance"),
        node("Add", ["v", "eps"], ["e"], name="add"),
        node("Sqrt", ["e"], ["r"], name="root"),
        node("Div", ["d", "r"], ["y"], name="div"),
    ]
    model = save(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"two": np.float32(2), "eps": np.float32(1e-12)})
    result = lowered(model)
    assert set(result.kept) == {"square", "variance", "add", "root"}
    x = np.float32([[900, -900, 300, -300]])  # squares beyond FP16
    np.testing.assert_allclose(run(result.draft, {"x": x})["y"], x / x.std(), rtol=2e-3)


def test_trap_variance_as_difference_of_means_stays_fp32(save):
    nodes = [
        node("ReduceSum", ["x", "axis"], ["s"], name="sum"),
        node("Mul", ["s", "n"], ["m"], name="mean"),
        node("Mul", ["m", "m"], ["mm"], name="square of mean"),
        node("Mul", ["x", "x"], ["xx"], name="square"),
        node("ReduceSum", ["xx", "axis"], ["ss"], name="sum of squares"),
        node("Mul", ["ss", "n"], ["ms"], name="mean of squares"),
        node("Sub", ["ms", "mm"], ["v"], name="variance"),
        node("Sqrt", ["v"], ["r"], name="root"),
        node("Reciprocal", ["r"], ["i"], name="reciprocal"),
        node("Mul", ["x", "i"], ["y"], name="scale"),
    ]
    model = save(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"axis": np.int64([-1]), "n": np.float32(0.25)})
    assert set(lowered(model).kept) == {n.name for n in nodes} - {"scale"}


def test_trap_operator_without_fp16_form_is_listed(save, run):
    nodes = [
        node("Relu", ["b"], ["r"]),
        node("NonMaxSuppression", ["r", "s", "k"], ["y"], name="nms"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [None, 3])
    model = save(nodes, {"b": [1, 4, 4], "s": [1, 1, 4]}, {"y": y}, {"k": np.int64([2])})
    assert "no float16 form in ONNX" in lowered(model).kept["nms"][1]


def test_trap_unknown_domain_is_listed(save):
    nodes = [node("Relu", ["x"], ["a"]), node("Gelu", ["a"], ["y"], name="g", domain="com.microsoft")]
    model = save(nodes, {"x": [2]}, {"y": [2]}, domains={"com.microsoft": 1})
    result = lowered(model)
    assert "no ONNX schema" in result.kept["g"][1]
    assert types(result.draft)["a"] == FP16


def test_trap_sequences_stay_fp32(save, run):
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("SplitToSequence", ["a", "one"], ["s"], axis=0),
        node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    model = save(nodes, {"x": [2, 3]}, {"y": [2, 3]}, {"one": np.int64(1)})
    np.testing.assert_array_equal(run(lowered(model).draft, {"x": np.ones((2, 3), np.float32)})["y"], np.ones((2, 3)))


def test_trap_bodies_of_if_are_lowered_and_keep_their_types_outside(save, run):
    def body(name: str, op: str) -> onnx.GraphProto:
        nodes = [
            node("Constant", [], [f"{name}k"], value=onnx.numpy_helper.from_array(np.float32(2), "k")),
            node("Mul", ["a", f"{name}k"], [f"{name}m"]),
            node(op, [f"{name}m"], [f"{name}o"]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}o", 1, [3])])

    nodes = [
        node("Relu", ["x"], ["a"]),
        node("If", ["c"], ["b"], then_branch=body("t", "Neg"), else_branch=body("e", "Abs")),
        node("Relu", ["b"], ["y"]),
    ]
    inputs = {"x": [3], "c": helper.make_tensor_value_info("c", TensorProto.BOOL, [])}
    result = lowered(save(nodes, inputs, {"y": [3]}))
    graphs = [g for g in walk.graphs_of(result.draft.graph) if g is not result.draft.graph]
    for graph in graphs:
        assert any(n.op_type == "Constant" and n.attribute[0].t.data_type == FP16 for n in graph.node)
        assert not any(n.op_type == "Constant" and n.attribute[0].t.data_type == 1 for n in graph.node)
        assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    x = np.float32([1, -2, 3])
    np.testing.assert_array_equal(run(result.draft, {"x": x, "c": np.array(False)})["y"], [2, 0, 6])


def test_trap_loop_state_and_captured_values(save, run):
    body = helper.make_graph(
        [node("Add", ["s", "a"], ["s2"]), node("Identity", ["c"], ["c2"])],
        "body",
        [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("c", 9, []),
         helper.make_tensor_value_info("s", 1, [2])],
        [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("s2", 1, [2])],
    )  # fmt: skip
    nodes = [node("Relu", ["x"], ["a"]), node("Loop", ["n", "", "x"], ["l"], body=body), node("Neg", ["l"], ["y"])]
    model = save(nodes, {"x": [2]}, {"y": [2]}, {"n": np.int64(3)})
    np.testing.assert_array_equal(run(lowered(model).draft, {"x": np.float32([1, 2])})["y"], [-4, -8])


def test_trap_output_that_is_read_inside_too(save, run):
    nodes = [node("Relu", ["x"], ["y"]), node("Neg", ["y"], ["z"], name="kept")]
    result = lowered(save(nodes, {"x": [2]}, {"y": [2], "z": [2]}), keep=Keep(["kept"]))
    assert ops(result.draft).count("Cast") == 2  # x in, y out: the kept node reads an output
    np.testing.assert_array_equal(run(result.draft, {"x": np.float32([1, -1])})["z"], [-1, 0])


def test_io_types_can_change(draft, run):
    result = lower(prepare(draft, opset=1), FP16, keep_io_types=False, keep=Keep())
    assert "Cast" not in ops(result.draft)
    x = np.ones((1, 3, 8, 8), np.float16)
    assert run(result.draft, {"x": x})["y"].dtype == np.float16


def test_pattern_names_operators_nodes_and_outputs(draft):
    result = lower(prepare(draft, opset=1), FP16, keep_io_types=True, keep=Keep(["Gemm", "ste*", "a"]))
    assert set(result.kept) == {"head", "stem", "residual"}


def test_bf16_types(draft):
    result = lower(prepare(draft, opset=22), TensorProto.BFLOAT16, keep_io_types=True, keep=Keep())
    assert types(result.draft)["r1"] == TensorProto.BFLOAT16
    assert result.kept == {}


def test_bf16_before_opset_22_has_no_convolution(draft):
    result = lower(prepare(draft, opset=1), TensorProto.BFLOAT16, keep_io_types=True, keep=Keep())
    assert "no bfloat16 form" in result.kept["stem"][1]


@pytest.mark.parametrize("low", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_to_low_keeps_zero_sign_and_finiteness(low, values):
    array = np.array(values, np.float32)
    if low != np.float16:
        array = np.clip(array, -3e38, 3e38)
    result = to_low(array, low).astype(np.float32)
    assert (result[array == 0] == 0).all()
    assert np.isfinite(result[np.isfinite(array)]).all()
    inside = np.abs(array) <= 65000
    np.testing.assert_allclose(result[inside], array[inside], rtol=2**-8, atol=1e-7)


OPERATORS = ["Relu", "Neg", "Abs", "Sigmoid", "Add", "Mul", "MatMul"]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[onnx.NodeProto], set[str]]:
    """A random graph of float operators over [2, 2] values, and the names of some nodes to keep."""
    nodes, values = [], ["x", "w"]
    for index in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(OPERATORS))
        inputs = [draw(st.sampled_from(values)) for _ in range(2 if op in ("Add", "Mul", "MatMul") else 1)]
        nodes.append(node(op, inputs, [f"v{index}"], name=f"n{index}"))
        values.append(f"v{index}")
    return nodes, draw(st.sets(st.sampled_from([n.name for n in nodes])))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=graphs())
def test_any_graph_with_any_kept_nodes_is_valid_sorted_and_near(save, run, case):
    nodes, kept = case
    output = nodes[-1].output[0]
    rng = np.random.default_rng(0)
    model = save(nodes, {"x": [2, 2]}, {output: [2, 2]}, {"w": rng.standard_normal((2, 2)).astype(np.float32) * 0.4})
    source = draft_of(model)
    result = lower(source, FP16, keep_io_types=True, keep=Keep(names=dict.fromkeys(kept, "asked")))
    assert is_sorted(result.draft)
    x = rng.standard_normal((2, 2)).astype(np.float32) * 0.4
    before, after = run(source, {"x": x})[output], run(result.draft, {"x": x})[output]
    np.testing.assert_allclose(after, before, rtol=0.05, atol=0.05)
    casts = [(n.input[0], n.attribute[0].i) for n in result.draft.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts))
