from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repo_manager.engine.layers import EngineLayer, LayerPrecision, compare_precision, precision_mismatches

FLOAT, HALF, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8


def conv_graph(*, data: bool, weight: bool, dtype: int = FLOAT, between: str | None = None) -> onnx.ModelProto:
    """x -> [Q/DQ] -> Conv "conv" <- [DQ] <- w."""
    nodes, inits = [], []
    numpy_type = np.float16 if dtype == HALF else np.float32
    inits.append(numpy_helper.from_array(np.array(0.1, numpy_type), "s"))
    inits.append(numpy_helper.from_array(np.array(0, np.int8), "z"))
    x, w = "x", "w"
    if data:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"))
        x = "xd"
    if weight:
        inits.append(numpy_helper.from_array(np.ones((4, 4, 1, 1), np.int8), "w"))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], name="dqw"))
        w = "wd"
    else:
        inits.append(numpy_helper.from_array(np.ones((4, 4, 1, 1), numpy_type), "w"))
    if between is not None:
        attributes = {"to": dtype} if between == "Cast" else {}
        nodes.append(helper.make_node(between, [w], ["wb"], name="between", **attributes))
        w = "wb"
    nodes.append(helper.make_node("Conv", [x, w], ["y"], name="conv"))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("x", dtype, [1, 4, 2, 2])], [info("y", dtype, [1, 4, 2, 2])], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def layer(dtype: str, kind: str = "CaskConvolution") -> EngineLayer:
    return EngineLayer("conv + relu", kind, ("conv", "relu"), (dtype,), (dtype,), (dtype,), "")


def only(proto: onnx.ModelProto, *layers: EngineLayer) -> LayerPrecision:
    (row,) = compare_precision(proto, layers)
    return row


def test_quantised_on_both_sides_and_run_in_int8_is_kept() -> None:
    row = only(conv_graph(data=True, weight=True), layer("int8"))
    assert (row.asked, row.found, row.kept) == ("int8", "int8", True)


@pytest.mark.parametrize(
    ("data", "weight", "detail"),
    [(True, False, "only its data is quantised"), (False, True, "only its weight"), (True, True, "chose a wider type")],
)
def test_int8_asked_and_float_found_names_the_node_and_the_cause(data: bool, weight: bool, detail: str) -> None:
    (row,) = precision_mismatches(compare_precision(conv_graph(data=data, weight=weight), [layer("float32")]))
    assert row.node == "conv"
    assert detail in row.detail


@pytest.mark.parametrize("between", ["Cast", "Identity", "Transpose"])
def test_int8_is_asked_through_shape_changes_and_casts(between: str) -> None:
    assert only(conv_graph(data=True, weight=True, between=between), layer("int8")).asked == "int8"


def test_a_float16_weight_asks_for_float16() -> None:
    proto = conv_graph(data=False, weight=False, dtype=HALF)
    assert only(proto, layer("float16")).kept
    assert not only(proto, layer("float32")).kept


def test_a_narrower_type_than_asked_is_no_error() -> None:
    assert only(conv_graph(data=False, weight=False), layer("float16")).kept


def test_elementwise_work_around_a_node_does_not_speak_for_it() -> None:
    proto = conv_graph(data=True, weight=True)
    rows = compare_precision(proto, [layer("float32", kind="kgen"), layer("int8", kind="correlation")])
    assert [row.found for row in rows] == ["int8"]
    assert only(proto, layer("float32", kind="kgen")).found is None


def test_an_unlisted_node_is_unverified_not_wrong() -> None:
    other = EngineLayer("other", "CaskConvolution", ("other",), ("float32",), (), (), "")
    row = only(conv_graph(data=True, weight=True), other)
    assert row.found is None
    assert row.kept


def test_no_list_of_layers_gives_no_rows() -> None:
    assert compare_precision(conv_graph(data=True, weight=True), []) == ()


def test_nodes_inside_branches_are_compared_too() -> None:
    branch = conv_graph(data=False, weight=False, dtype=HALF).graph
    del branch.input[:]
    info = helper.make_tensor_value_info
    node = helper.make_node("If", ["c"], ["o"], name="if", then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [node], "g", [info("c", TensorProto.BOOL, []), info("x", HALF, [1, 4, 2, 2])], [info("o", HALF, None)]
    )
    rows = compare_precision(helper.make_model(graph), [layer("float32")])
    assert [row.kept for row in rows] == [False, False]


def test_weights_that_came_quantised_alone_are_no_wish_for_int8() -> None:
    rows = compare_precision(conv_graph(data=False, weight=True), [layer("float32")])
    assert precision_mismatches(rows, int8_wanted=False) == ()
    assert len(precision_mismatches(rows, int8_wanted=True)) == 1


def test_quantised_on_both_sides_is_a_wish_for_int8_whoever_wrote_it() -> None:
    rows = compare_precision(conv_graph(data=True, weight=True), [layer("float32")])
    assert len(precision_mismatches(rows, int8_wanted=False)) == 1
