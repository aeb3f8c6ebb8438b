"""Shapes at given sizes, through shapes computed by the graph, and without falling for hostile ones."""

from __future__ import annotations

import resource
import time

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.errors import ModelError
from repo_manager.onnx_model.shape_inference import infer_at, largest_value_bytes, static_shape

T = onnx.TensorProto


def shapes(proto: onnx.ModelProto, **given: tuple[int, ...]) -> dict[str, tuple[int, ...] | None]:
    inferred = infer_at(proto, given)
    assert inferred is not None
    values = [*inferred.graph.value_info, *inferred.graph.output]
    return {entry.name: shape for entry in values if (shape := static_shape(entry.type)) is not None}


def test_a_plain_network() -> None:
    proto = onnx_models.cnn(size=None)
    found = shapes(proto, x=(2, 4, 20, 12))
    assert (found["a"], found["c"], found["y"]) == ((2, 16, 20, 12), (2, 32, 20, 12), (2, 10))
    inferred = infer_at(proto, {"x": (2, 4, 20, 12)})
    assert inferred is not None
    assert largest_value_bytes(inferred) == 2 * 32 * 20 * 12 * 4
    assert not proto.graph.value_info, "its input was changed"


def test_a_reshape_computed_as_exporters_write_it() -> None:
    """Shape - Cast - Slice - Mul - Concat - Reshape: ONNX's own inference stops at the Cast to int32."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["s32"], to=T.INT32),
        helper.make_node("Slice", ["s32", "zero", "one"], ["n"]),
        helper.make_node("Slice", ["s32", "one", "two"], ["c"]),
        helper.make_node("Mul", ["c", "four"], ["c4"]),
        helper.make_node("Concat", ["n", "c4", "minus"], ["t32"], axis=0),
        helper.make_node("Cast", ["t32"], ["t"], to=T.INT64),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        name: np.array([number], np.int64) for name, number in (("zero", 0), ("one", 1), ("two", 2))
    }
    weights |= {"four": np.array([4], np.int32), "minus": np.array([-1], np.int32), "w": onnx_models.weight((5, 3))}
    proto = onnx_models.model(nodes, [value("x", ["N", "C", 20])], [value("y", [None, None, 3])], weights)
    found = shapes(proto, x=(2, 3, 20))
    assert (found["r"], found["y"]) == ((2, 12, 5), (2, 12, 3))


@pytest.mark.parametrize("taken", [True, False])
def test_the_branch_that_is_taken(taken: bool) -> None:
    def branch(name: str, repeats: int) -> onnx.GraphProto:
        node = helper.make_node("Concat", ["x"] * repeats, [name], axis=1)
        return helper.make_graph([node], name, [], [value(name, None)])

    node = helper.make_node("If", ["flag"], ["h"], then_branch=branch("t", 2), else_branch=branch("e", 3))
    nodes = [node, helper.make_node("Relu", ["h"], ["y"])]
    proto = onnx_models.model(nodes, [value("x", ["N", 4])], [value("y", None)], {"flag": np.array(taken)})
    assert shapes(proto, x=(5, 4))["y"] == ((5, 8) if taken else (5, 12))


def test_a_rank_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match="has 2 axes; the shape given has 3"):
        infer_at(onnx_models.mlp(), {"x": (1, 2, 3)})


@pytest.mark.parametrize("op", ["ConstantOfShape", "Range", "Expand", "Tile"])
def test_huge_values_are_never_made(op: str) -> None:
    huge = np.array([2**33, 2], np.int64)
    scalar = np.array(2**33, np.int64)
    inputs = {
        "ConstantOfShape": ["huge"],
        "Range": ["nil", "top", "step"],
        "Expand": ["step", "huge"],
        "Tile": ["pair", "huge"],
    }
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "huge": huge, "nil": np.array(0, np.int64), "top": scalar, "step": np.array(1, np.int64),
        "pair": np.ones((2, 2), np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node(op, inputs[op], ["big"]),
        helper.make_node("Shape", ["big"], ["s"]),
        helper.make_node("Concat", ["big", "big"], ["y"], axis=0),
    ]
    proto = onnx_models.model(nodes, [value("x", [2**40, "N"])], [value("y", None)], weights)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    infer_at(proto, {})
    infer_at(proto, {"x": (1, 1)})
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
