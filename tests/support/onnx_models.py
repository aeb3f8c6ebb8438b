"""Tiny ONNX models, built in code. Import with `from support import onnx_models` (tests/ is on the path)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from packaging.version import Version

FLOAT = onnx.TensorProto.FLOAT


def runtime_is_older_than(version: str) -> bool:
    """Return whether this ONNX Runtime lacks what a test needs."""
    return Version(importlib.metadata.version("onnxruntime")) < Version(version)


def weight(shape: Sequence[int], *, sparse: bool = False, axis: int = 1, seed: int = 0) -> np.ndarray:
    """Seeded normal float32 values; `sparse` zeroes the first two of every four along `axis`."""
    values = np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
    if sparse:
        moved = np.moveaxis(values, axis, -1)
        moved[..., 0::4] = 0
        moved[..., 1::4] = 0
    return values


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray | onnx.TensorProto] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    """A checked-by-nobody model of these parts."""
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in (weights or {}).items()
    ]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*domain) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def value(name: str, shape: Sequence[int | str | None] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def mlp(*, batch: int | str | None = "N", sparse: bool = True, width: int = 64, classes: int = 8) -> onnx.ModelProto:
    """Gemm (transB) - Relu - MatMul; x: [batch, 32] -> y: [batch, classes]."""
    weights = {
        "w1": weight((width, 32), sparse=sparse, axis=1, seed=1),
        "b1": weight((width,), seed=2),
        "w2": weight((width, classes), sparse=sparse, axis=0, seed=3),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="fc1", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="fc2"),
    ]
    return model(nodes, [value("x", [batch, 32])], [value("y", [batch, classes])], weights)


def cnn(*, batch: int | str | None = "N", sparse: bool = True, size: int | str | None = 16) -> onnx.ModelProto:
    """Conv - Relu - Conv - GlobalAveragePool - Flatten - Gemm; x: [batch, 4, size, size] -> y: [batch, 10]."""
    weights = {
        "c1": weight((16, 4, 3, 3), sparse=sparse, axis=1, seed=1),
        "c2": weight((32, 16, 3, 3), sparse=sparse, axis=1, seed=2),
        "fc": weight((10, 32), sparse=sparse, axis=1, seed=3),
        "fb": weight((10,), seed=4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "c1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "c2"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
        helper.make_node("Flatten", ["d"], ["e"], name="flatten"),
        helper.make_node("Gemm", ["e", "fc", "fb"], ["y"], name="head", transB=1),
    ]
    return model(nodes, [value("x", [batch, 4, size, size])], [value("y", [batch, 10])], weights)


def lstm_with_state() -> onnx.ModelProto:
    """An LSTM step with batch on axis 1 of its state: cannot be batched by Triton."""
    hidden, features = 8, 4
    weights = {"W": weight((1, 4 * hidden, features)), "R": weight((1, 4 * hidden, hidden), seed=1)}
    node = helper.make_node(
        "LSTM", ["x", "W", "R", "", "", "h", "c"], ["y", "hn", "cn"], name="lstm", hidden_size=hidden
    )
    inputs = [value("x", ["T", "N", features]), value("h", [1, "N", hidden]), value("c", [1, "N", hidden])]
    outputs = [value("y", ["T", 1, "N", hidden]), value("hn", [1, "N", hidden]), value("cn", [1, "N", hidden])]
    return model([node], inputs, outputs, weights)


def embedding() -> onnx.ModelProto:
    """int64 tokens [N, T] -> Gather -> ReduceMean -> float [N, 8]."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"], name="embed"),
        helper.make_node("ReduceMean", ["e"], ["y"], name="mean", axes=[1], keepdims=0),
    ]
    inputs = [value("tokens", ["N", "T"], onnx.TensorProto.INT64)]
    return model(nodes, inputs, [value("y", ["N", 8])], {"table": weight((100, 8))})


def bert_like() -> onnx.ModelProto:
    """Three tables of 500, 2 and 40 rows picked by int64 ids [N, T], as BERT's, and a mask; y: [N, 8]."""
    names = {"input_ids": 500, "token_type_ids": 2, "position_ids": 40}
    nodes = [helper.make_node("Gather", [f"{name}_table", name], [f"{name}_rows"]) for name in names]
    nodes += [
        helper.make_node("Sum", [f"{name}_rows" for name in names], ["e"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
        helper.make_node("Mul", ["e", "m3"], ["kept"]),
        helper.make_node("ReduceMean", ["kept"], ["y"], axes=[1], keepdims=0),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        f"{name}_table": weight((rows, 8), seed=rows) for name, rows in names.items()
    }
    weights["last"] = np.array([-1])
    inputs = [value(name, ["N", "T"], onnx.TensorProto.INT64) for name in (*names, "attention_mask")]
    return model(nodes, inputs, [value("y", ["N", 8])], weights)


def save(proto: onnx.ModelProto, path: Path) -> Path:
    """Write without any check."""
    path.write_bytes(proto.SerializeToString())
    return path


def qdq_conv(*, zero_point: int = 0, dtype: type = np.int8, output_quantised: bool = True) -> onnx.ModelProto:
    """x - Q - DQ - Conv(weight int8 - DQ) - Relu - [Q - DQ] - y; the weight is 2:4 around its zero point."""
    values = weight((16, 16, 1, 1), sparse=True)
    scale = np.abs(values).max(axis=(1, 2, 3)) / 60
    steps = np.rint(values / scale[:, None, None, None])
    stored = (steps + zero_point).astype(dtype)
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "wq": stored,
        "ws": scale.astype(np.float32),
        "wz": np.full(16, zero_point, dtype),
        "s": np.float32(0.05).reshape(()),
        "z": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r" if output_quantised else "y"], name="relu"),
    ]
    if output_quantised:
        nodes.append(helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["y"]))
    return model(nodes, [value("x", ["N", 16, 4, 4])], [value("y", ["N", 16, 4, 4])], weights)


def zoo() -> onnx.ModelProto:
    """Many hiding places: function, If body, Transpose, Reshape, Cast, Q/DQ, Einsum, ConstantOfShape."""
    half = weight((32, 32), sparse=True, axis=0, seed=5).astype(np.float16)
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w_t": weight((32, 32), sparse=True, axis=1, seed=1),
        "w_f": weight((32, 32), sparse=False, seed=2),
        "w_half": half,
        "w_flat": weight((1024,), seed=3),
        "shape": np.array([32, 32], np.int64),
        "dims": np.array([32, 32], np.int64),
        "w_if": weight((32, 32), sparse=True, axis=0, seed=7),
        "flag": np.array(True),
        "q": np.random.default_rng(9).integers(-100, 100, (32, 32)).astype(np.int8),
        "qs": np.float32(0.01).reshape(()),
        "qz": np.int8(3).reshape(()),
        "w_e": weight((4, 8, 32), seed=8),
    }
    body = [helper.make_node("MatMul", ["a", "w"], ["b"], name="inner")]
    function = helper.make_function("local", "Dense", ["a", "w"], ["b"], body, [helper.make_opsetid("", 17)])

    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], name, [], [value(node.output[0], None)])

    then_branch = branch("yes", helper.make_node("MatMul", ["x6", "w_if"], ["t"], name="mm"))
    else_branch = branch("no", helper.make_node("Identity", ["x6"], ["e"]))
    nodes = [
        helper.make_node("Transpose", ["w_t"], ["w_tt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w_tt"], ["x1"], name="transposed"),
        helper.make_node("Dense", ["x1", "w_f"], ["x2"], name="call", domain="local"),
        helper.make_node("Cast", ["w_half"], ["w_c"], to=FLOAT),
        helper.make_node("Gemm", ["x2", "w_c"], ["x3"], name="cast"),
        helper.make_node("Reshape", ["w_flat", "shape"], ["w_r"]),
        helper.make_node("MatMul", ["x3", "w_r"], ["x4"], name="reshaped"),
        helper.make_node("ConstantOfShape", ["dims"], ["w_0"], value=helper.make_tensor("v", FLOAT, [1], [0.0])),
        helper.make_node("MatMul", ["x4", "w_0"], ["x5"], name="zeros"),
        helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["w_q"]),
        helper.make_node("MatMul", ["x5", "w_q"], ["x6"], name="quantised"),
        helper.make_node("If", ["flag"], ["x7"], name="if", then_branch=then_branch, else_branch=else_branch),
        helper.make_node("Einsum", ["x7", "w_e"], ["y"], name="einsum", equation="nk,hdk->nhd"),
    ]
    return model(
        nodes, [value("x", ["N", 32])], [value("y", ["N", 4, 8])], weights, functions=[function], domains=[("local", 1)]
    )


def folded() -> dict[str, onnx.ModelProto]:
    """Models with output shapes known to ONNX Runtime only after constant folding. The declared ones are dynamic."""
    return {
        "reshape": _folded("Reshape", ["row", "numbers"], [2, 4], ["T", 8], ["a", "b"]),
        "batched_reshape": _folded("Reshape", ["n", "numbers"], [-1, 2, 4], ["N", 8], ["N", "a", "b"]),
        "expand": _folded("Expand", ["n", "numbers"], [3, 1, 8], [1, 8], ["a", "b", "c"]),
        "tile": _folded("Tile", ["n", "numbers"], [2, 3], [1, 8], ["a", "b"]),
        "batched_slice": _folded("Slice", ["n", "numbers", "six", "one"], [1], ["N", 8], ["N", "a"]),
        "pad": _folded("Pad", ["n", "numbers"], [0, 2, 1, 2], [2, 8], ["a", "b"]),
        "resize": _folded("Resize", ["n", "", "", "numbers"], [1, 2, 6, 10], [1, 2, 4, 4], [1, 2, "h", "w"]),
        "batched_top": _folded("TopK", ["n", "numbers"], [3], ["N", 8], ["N", "k"]),
        "lstm_state": _folded_lstm(),
    }


def _folded(
    op: str, inputs: Sequence[str], numbers: Sequence[int], given: Sequence[int | str], declared: Sequence[int | str]
) -> onnx.ModelProto:
    """y = op(-x or its first row, numbers); the numbers are computed from constants, as exporters leave them."""
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "halves": np.array(numbers, np.float32) / 2,
        "two": np.float32(2).reshape(()),
        "zero": np.array([0]),
        "one": np.array([1]),
        "six": np.array([6]),
    }
    nodes = [
        helper.make_node("Mul", ["halves", "two"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["numbers"], to=onnx.TensorProto.INT64),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Slice", ["n", "zero", "one", "zero"], ["row"]),
        helper.make_node(op, list(inputs), ["y", "order"] if op == "TopK" else ["y"], name="last"),
    ]
    return model(nodes, [value("x", given)], [value("y", declared)], weights)


def _folded_lstm() -> onnx.ModelProto:
    """An LSTM whose initial state is a ConstantOfShape of a computed shape, and comes out beside the last one."""
    weights = {
        "axis": np.array([1]), "axes": np.array([1, 2]), "half": np.array([0.5], np.float32),
        "two": np.array([2], np.float32),
        "directions": np.array([1]), "hidden": np.array([8]), "W": weight((1, 32, 4)), "R": weight((1, 32, 8), seed=1),
    }  # fmt: skip
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["x3"]),
        helper.make_node("Mul", ["half", "two"], ["batch"]),
        helper.make_node("Cast", ["batch"], ["batch_int"], to=onnx.TensorProto.INT64),
        helper.make_node("Concat", ["directions", "batch_int", "hidden"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["h0"]),
        helper.make_node("LSTM", ["x3", "W", "R", "", "", "h0", "h0"], ["o", "hn"], hidden_size=8),
        helper.make_node("Squeeze", ["o", "axes"], ["probs"]),
        helper.make_node("Concat", ["h0", "hn"], ["states"], axis=1),
    ]
    outputs = [value("probs", ["T", "c"]), value("h0", [1, "b", 8]), value("states", [1, "s", 8])]
    return model(nodes, [value("x", ["T", 4])], outputs, weights)
