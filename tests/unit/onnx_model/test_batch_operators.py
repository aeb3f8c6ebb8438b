"""Single operators and short idioms whose effect on the samples of a batch is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.onnx_model.batch_axis import find_batch_axis
from repo_manager.onnx_model.batch_graph import judge_graph
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of

I64 = TensorProto.INT64
MICROSOFT = "com.microsoft"
X2, X3, X4 = ["N", 8], ["N", 5, 8], ["N", 4, 8, 8]
FOUR = {name: np.ones(4, np.float32) for name in "sbmv"}


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node named after its first output. `_` is a missing input."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=outputs.split()[0], **attributes)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def built(
    nodes: list[onnx.NodeProto],
    shape: list[Any],
    out: list[Any],
    weights: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    more: dict[str, tuple[list[Any], int]] | None = None,
    kinds: tuple[int, int] = (TensorProto.FLOAT, TensorProto.FLOAT),
) -> onnx.ModelProto:
    inputs = [value("x", shape, kinds[0]), *(value(name, *spec) for name, spec in (more or {}).items())]
    arrays = {name: np.asarray(array) for name, array in (weights or {}).items()}
    return onnx_models.model(nodes, inputs, [value("y", out, kinds[1])], arrays, opset=opset, domains=[(MICROSOFT, 1)])


KEPT: dict[str, onnx.ModelProto] = {
    "BatchNormalization": built([node("BatchNormalization", "x s b m v")], X4, X4, FOUR),
    "MeanVarianceNormalization of a sample": built([node("MeanVarianceNormalization", "x", axes=[1, 2, 3])], X4, X4),
    "InstanceNormalization": built([node("InstanceNormalization", "x s b")], X4, X4, {k: FOUR[k] for k in "sb"}),
    "GroupNormalization": built(
        [node("GroupNormalization", "x s b", num_groups=2)], X4, X4, {k: FOUR[k] for k in "sb"}, opset=21
    ),
    "LRN": built([node("LRN", "x", size=3)], X4, X4),
    "Softmax before 13, axis 1": built([node("Softmax", "x", axis=1)], X4, X4, opset=11),
    "Compress of features": built(
        [node("Compress", "x c", axis=1)], X2, ["N", 3], {"c": np.array([1, 0, 1, 0, 0, 0, 0, 1], bool)}
    ),
    "FusedMatMul": built([node("FusedMatMul", "x w", domain=MICROSOFT, transB=1)], X2, ["N", 6], {"w": normal(6, 8)}),
    "FastGelu": built([node("FastGelu", "x b", domain=MICROSOFT)], X2, X2, {"b": normal(8)}),
    "SkipLayerNormalization": built(
        [node("SkipLayerNormalization", "x x g b", domain=MICROSOFT)], X3, X3, {"g": normal(8), "b": normal(8)}
    ),
    "Attention of ONNX Runtime": built(
        [node("Attention", "x w b", domain=MICROSOFT, num_heads=2)], X3, X3, {"w": normal(8, 24), "b": normal(24)}
    ),
    "ConvTranspose": built(
        [node("ConvTranspose", "x w", strides=[2, 2])], X4, ["N", 3, 16, 16], {"w": normal(4, 3, 2, 2)}
    ),
    "samples as channels, and back": built(
        [
            node("Reshape", "x one_image", "a"),
            node("MaxPool", "a", "b", kernel_shape=[2, 2], strides=[2, 2]),
            node("Reshape", "b images"),
        ],
        X4,
        ["N", 4, 4, 4],
        {"one_image": numbers(1, -1, 8, 8), "images": numbers(-1, 4, 4, 4)},
    ),
    "DepthToSpace": built([node("DepthToSpace", "x", blocksize=2)], X4, ["N", 1, 16, 16]),
    "Resize to sizes from Shape": built(
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape zero two", "nc"),
            node("Concat", "nc hw", "sizes", axis=0),
            node("Resize", "x _ _ sizes", mode="linear"),
        ],
        X4,
        ["N", 4, 16, 16],
        {"zero": numbers(0), "two": numbers(2), "hw": numbers(16, 16)},
    ),
    "beams, and their mean": built(
        [
            node("Unsqueeze", "x one", "u"),
            node("Tile", "u repeats", "t"),
            node("Reshape", "t flat", "f"),
            node("Reshape", "f beams", "b"),
            node("ReduceMean", "b", axes=[1], keepdims=0),
        ],
        X2,
        X2,
        {"one": numbers(1), "repeats": numbers(1, 3, 1), "flat": numbers(-1, 8), "beams": numbers(-1, 3, 8)},
    ),
    "argsort": built(
        [node("TopK", "x k", "v i", axis=1), node("GatherElements", "x i", axis=1)], X2, ["N", 3], {"k": numbers(3)}
    ),
    "size of a sample from all elements": built(
        [
            node("Shape", "x", "shape"),
            node("ReduceProd", "shape", "all", keepdims=1),
            node("Div", "all eight", "n"),
            node("Concat", "n eight", "target", axis=0),
            node("Reshape", "x target"),
        ],
        X2,
        X2,
        {"eight": numbers(8)},
    ),
    "a choice among one": built(
        [
            node("ReduceMean", "x", "mean", axes=[0], keepdims=1),
            node("Add", "x mean", "mixed"),
            node("ReduceMax", "mixed", "one", axes=[1], keepdims=1),
            node("Softmax", "one", "sure", axis=1),
            node("Mul", "x sure"),
        ],
        X2,
        X2,
    ),
    "sequence of samples": built(
        [node("SplitToSequence", "x one", "q", axis=0), node("ConcatFromSequence", "q", axis=0)],
        X2,
        X2,
        {"one": np.int64(1)},
    ),
    "LSTM with a state of zeros": built(
        [
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("Shape", "x", "shape"),
            node("Gather", "shape zero", "n"),
            node("Concat", "one n six", "size", axis=0),
            node("ConstantOfShape", "size", "h"),
            node("LSTM", "t w r _ _ h h", "all last", hidden_size=6),
            node("Squeeze", "last zero"),
        ],
        X3,
        ["N", 6],
        {
            "zero": numbers(0),
            "one": numbers(1),
            "six": numbers(6),
            "w": normal(1, 24, 8),
            "r": normal(1, 24, 6),
        },
    ),
    "last token by a mask": built(
        [
            node("ReduceSum", "mask one", "length", keepdims=0),
            node("Sub", "length step", "last"),
            node("Shape", "x", "shape"),
            node("Gather", "shape start", "n"),
            node("Range", "start n step", "rows"),
            node("Unsqueeze", "rows one", "row"),
            node("Unsqueeze", "last one", "column"),
            node("Concat", "row column", "index", axis=1),
            node("GatherND", "x index"),
        ],
        X3,
        ["N", 8],
        {"one": numbers(1), "step": np.int64(1), "start": np.int64(0)},
        more={"mask": (["N", 5], I64)},
    ),
}
RUN: dict[str, onnx.ModelProto] = {
    "masked update": built(
        [
            node("Greater", "x zero", "mask"),
            node("NonZero", "mask", "hits"),
            node("Transpose", "hits", "index"),
            node("GatherND", "x index", "picked"),
            node("Exp", "picked", "new"),
            node("ScatterND", "x index new"),
        ],
        X2,
        X2,
        {"zero": np.float32(0)},
    ),
    "an operator without a rule": built([node("Inverse", "x", domain=MICROSOFT)], ["N", 3, 3], ["N", 3, 3]),
    "row index times length": built(
        [
            node("ReduceSum", "mask one", "length", keepdims=0),
            node("Mod", "length five", "place"),
            node("Shape", "x", "shape"),
            node("Gather", "shape start", "n"),
            node("Range", "start n step", "rows"),
            node("Mul", "rows five", "base"),
            node("Add", "base place", "index"),
            node("Reshape", "x flat", "all"),
            node("Gather", "all index"),
        ],
        X3,
        ["N", 8],
        {
            "one": numbers(1),
            "step": np.int64(1),
            "start": np.int64(0),
            "five": np.int64(5),
            "flat": numbers(-1, 8),
        },
        more={"mask": (["N", 5], I64)},
    ),
}
MIXED: dict[str, tuple[str, onnx.ModelProto]] = {
    "BatchNormalization in training": (
        "node 'y' (BatchNormalization) is in training mode",
        built([node("BatchNormalization", "x s b m v", "y rm rv", training_mode=1)], X4, X4, FOUR),
    ),
    "BatchNormalization of old models in training": (
        "node 'y' (BatchNormalization) is in training mode",
        built([node("BatchNormalization", "x s b m v", "y rm rv sm sv")], X4, X4, FOUR, opset=9),
    ),
    "MeanVarianceNormalization": (
        "node 'y' (MeanVarianceNormalization) normalises",
        built([node("MeanVarianceNormalization", "x")], X4, X4),
    ),
    "Softmax before 13, axis 0": (
        "node 'y' (Softmax) normalises",
        built([node("Softmax", "x", axis=0)], X4, X4, opset=11),
    ),
    "Unique": (
        "(Unique) compares the elements of all samples",
        built(
            [node("Unique", "x", "u i v c"), node("Reshape", "v rows")],
            X2,
            X2,
            {"rows": numbers(-1, 8)},
            kinds=(TensorProto.FLOAT, I64),
        ),
    ),
    "count of hits": (
        "node 'shape' (Shape)",
        built(
            [
                node("Greater", "x zero", "mask"),
                node("NonZero", "mask", "hits"),
                node("Shape", "hits", "shape"),
                node("Gather", "shape one", "count"),
                node("Cast", "count", "float", to=1),
                node("Add", "x float"),
            ],
            X2,
            X2,
            {"zero": np.float32(0), "one": numbers(1)},
        ),
    ),
    "mean of what a mask picks": (
        "node 'mean' (ReduceMean) reduces",
        built(
            [
                node("Greater", "x zero", "mask"),
                node("NonZero", "mask", "hits"),
                node("Transpose", "hits", "index"),
                node("GatherND", "x index", "picked"),
                node("ReduceMean", "picked", "mean", keepdims=0),
                node("Add", "x mean"),
            ],
            X2,
            X2,
            {"zero": np.float32(0)},
        ),
    ),
    "all pairs": (
        "node 'pairs' (MatMul) combines",
        built(
            [
                node("Transpose", "x", "turned", perm=[1, 0]),
                node("MatMul", "x turned", "pairs"),
                node("ReduceSum", "pairs axis", keepdims=1),
            ],
            X2,
            ["N", 1],
            {"axis": numbers(1)},
        ),
    ),
    "a column beside a row": (
        "node 'sum' (Add) combines",
        built(
            [
                node("ReduceMean", "x", "row", axes=[1], keepdims=0),
                node("ReduceMean", "x", "column", axes=[1], keepdims=1),
                node("Add", "column row", "sum"),
                node("ReduceMax", "sum", "top", axes=[1], keepdims=1),
                node("Add", "x top"),
            ],
            X2,
            X2,
        ),
    ),
    "DynamicQuantizeMatMul": (
        "node 'y' (DynamicQuantizeMatMul) takes one scale",
        built(
            [node("DynamicQuantizeMatMul", "x w s z", domain=MICROSOFT)],
            X2,
            ["N", 6],
            {"w": np.ones((8, 6), np.int8), "s": np.float32(0.1), "z": np.int8(0)},
        ),
    ),
    "beams dealt out wrongly": (
        "node 'y' (ReduceMean) reduces",
        built(
            [
                node("Tile", "x repeats", "t"),
                node("Reshape", "t beams", "b"),
                node("ReduceMean", "b", axes=[1], keepdims=0),
            ],
            X2,
            X2,
            {"repeats": numbers(3, 1), "beams": numbers(-1, 3, 8)},
        ),
    ),
    "shifted samples": (
        "not in the samples' order",
        built(
            [node("Pad", "x pads", "p"), node("Slice", "p zero end zero")],
            X2,
            X2,
            {"pads": numbers(1, 0, 0, 0), "zero": numbers(0), "end": numbers(-1)},
        ),
    ),
    "divided by the number of elements": (
        "node 'y' (Div) computes with the number of samples",
        built([node("Size", "x", "n"), node("Cast", "n", "f", to=1), node("Div", "x f")], X2, X2),
    ),
    "logits of each pair": (
        "node 'y' (MatMul) combines",
        built(
            [node("Transpose", "k", "t", perm=[1, 0]), node("MatMul", "x t")],
            X2,
            ["N", "M"],
            more={"k": (X2, TensorProto.FLOAT)},
        ),
    ),
    "a triangle of the samples": (
        "node 'y' (Trilu) computes with the number of samples, or with a sample's place",
        built([node("Trilu", "x")], X2, X2),
    ),
    "places of the largest values": (
        "(MaxPool) computes with the number of samples, or with a sample's place",
        built(
            [node("MaxPool", "x", "p i", kernel_shape=[2, 2], strides=[2, 2]), node("Identity", "i")],
            X4,
            ["N", 4, 4, 4],
            kinds=(TensorProto.FLOAT, I64),
        ),
    ),
}


def found_in(proto: onnx.ModelProto, tmp_path: Path) -> tuple[str, bool, str]:
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    axis = find_batch_axis(model, signature_of(model))
    return judge_graph(model).kind, axis.batched, axis.reason


@pytest.mark.parametrize("name", KEPT)
def test_the_graph_proves_that_samples_keep_apart(name: str, tmp_path: Path) -> None:
    assert found_in(KEPT[name], tmp_path)[:2] == ("independent", True)


@pytest.mark.parametrize("name", RUN)
def test_a_run_shows_what_the_graph_does_not_tell(name: str, tmp_path: Path) -> None:
    assert found_in(RUN[name], tmp_path)[:2] == ("unknown", True)


@pytest.mark.parametrize("name", MIXED)
def test_the_operator_in_which_samples_meet_is_named(name: str, tmp_path: Path) -> None:
    reason, proto = MIXED[name]
    kind, batched, said = found_in(proto, tmp_path)
    assert (kind, batched) == ("dependent", False)
    assert reason in said
