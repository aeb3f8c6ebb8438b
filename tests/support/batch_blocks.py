"""Random graphs with known batch behaviour: whether the samples of a batch depend on each other.

A graph is a chain of blocks on a value [N, 4, 6]. Each block keeps this shape, and either keeps the samples apart or
mixes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

T, C = 4, 6


class Graph:
    """Collects nodes and constants. All floats have the type `dtype`."""

    def __init__(self, seed: int, dtype: int = TensorProto.FLOAT, opset: int = 17) -> None:
        self.random = np.random.default_rng(seed)
        self.dtype, self.opset = dtype, opset
        self.float = np.float64 if dtype == TensorProto.DOUBLE else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; arrays among the inputs become constants."""
        index = len(self.nodes)
        names = [value if isinstance(value, str) else self.const(value) for value in inputs]
        found = [f"{op}_{index}_{position}" for position in range(outputs)]
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op, names, found, name=f"{op}_{index}", domain=domain, **attributes))
        return found[0] if outputs == 1 else found

    def const(self, value: Any) -> str:
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(self.float)
        name = f"const_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape) * 0.5

    def ints(self, *values: int) -> np.ndarray:
        return np.array(values, np.int64)

    def size(self, x: str, axis: int = 0) -> str:
        """The length of an axis as a tensor of one number."""
        return self.op("Gather", self.op("Shape", x), self.ints(axis))

    def number(self, x: str) -> str:
        """The number of samples as a float."""
        return self.op("Cast", self.size(x), to=self.dtype)

    def model(self, last: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [last], ["y"], name="last"))
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "g", [info("x", self.dtype, ["N", T, C])], [info("y", self.dtype, ["N", T, C])], self.constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


Block = Callable[[Graph, str], str]


def _merged(g: Graph, x: str) -> str:
    """[N*T, C] and back: a Linear of a framework."""
    flat = g.op("Reshape", x, g.ints(-1, C))
    return g.op("Reshape", g.op("MatMul", flat, g.weight(C, C)), g.ints(-1, T, C))


def _merged_back_by_shape(g: Graph, x: str) -> str:
    flat = g.op("Reshape", x, g.ints(-1, C))
    target = g.op("Concat", g.size(x), g.ints(T, C), axis=0)
    return g.op("Reshape", g.op("Tanh", flat), target)


def _merged_transposed(g: Graph, x: str) -> str:
    """[T, N, C] -> [T*N, C] -> [N, T, C]: the samples are dealt out wrongly."""
    flat = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2]), g.ints(-1, C))
    return g.op("Reshape", flat, g.ints(-1, T, C))


def _merged_transposed_back(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    flat = g.op("Relu", g.op("Reshape", turned, g.ints(-1, C)))
    target = g.op("Concat", g.ints(T), g.size(x), g.ints(C), axis=0)
    return g.op("Transpose", g.op("Reshape", flat, target), perm=[1, 0, 2])


def _attention(g: Graph, x: str) -> str:
    scores = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    return g.op("MatMul", g.op("Softmax", scores, axis=-1), x)


def _attention_across(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    scores = g.op("MatMul", turned, g.op("Transpose", turned, perm=[0, 2, 1]))
    return g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), turned), perm=[1, 0, 2])


def _heads(g: Graph, x: str) -> str:
    """[N, T, 2, 3] -> [N*2, T, 3] -> back."""
    split = g.op("Transpose", g.op("Reshape", x, g.ints(0, T, 2, 3)), perm=[0, 2, 1, 3])
    joined = g.op("Softmax", g.op("Reshape", split, g.ints(-1, T, 3)), axis=1)
    parts = g.op("Transpose", g.op("Reshape", joined, g.ints(-1, 2, T, 3)), perm=[0, 2, 1, 3])
    return g.op("Reshape", parts, g.ints(-1, T, C))


def _heads_confused(g: Graph, x: str) -> str:
    split = g.op("Transpose", g.op("Reshape", x, g.ints(0, T, 2, 3)), perm=[2, 0, 1, 3])
    joined = g.op("Reshape", split, g.ints(-1, T, 3))
    parts = g.op("Transpose", g.op("Reshape", joined, g.ints(-1, 2, T, 3)), perm=[0, 2, 1, 3])
    return g.op("Reshape", parts, g.ints(-1, T, C))


def _recurrent(batch_axis: int, kind: str = "GRU") -> Block:
    def block(g: Graph, x: str) -> str:
        gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind]
        turned = g.op("Transpose", x, perm=[1, 0, 2]) if batch_axis == 1 else x
        y, *_ = g.op(kind, turned, g.weight(1, gates * C, C), g.weight(1, gates * C, C), outputs=2, hidden_size=C)
        y = g.op("Squeeze", y, g.ints(1))
        return g.op("Transpose", y, perm=[1, 0, 2]) if batch_axis == 1 else y

    return block


def _quantised(g: Graph, x: str) -> str:
    q, scale, zero = g.op("DynamicQuantizeLinear", g.op("Cast", x, to=TensorProto.FLOAT), outputs=3)
    centred = g.op("Sub", g.op("Cast", q, to=TensorProto.FLOAT), g.op("Cast", zero, to=TensorProto.FLOAT))
    return str(g.op("Cast", g.op("Mul", centred, scale), to=g.dtype))


def _floor_80_db(axes: list[int] | None) -> Block:
    def block(g: Graph, x: str) -> str:
        attributes = {} if axes is None else {"axes": axes}
        top = g.op("ReduceMax", x, keepdims=1, **attributes)
        return g.op("Max", x, g.op("Sub", top, np.array(0.5)))

    return block


def _row_index(g: Graph, x: str) -> str:
    """CLIP's pooling: x[arange(N), argmax(...)], spread over the steps again."""
    best = g.op("ArgMax", g.op("ReduceSum", x, g.ints(2), keepdims=0), axis=1, keepdims=0)
    rows = g.op("Range", np.array(0, np.int64), g.op("Squeeze", g.size(x)), np.array(1, np.int64))
    index = g.op("Concat", g.op("Unsqueeze", rows, g.ints(1)), g.op("Unsqueeze", best, g.ints(1)), axis=1)
    return g.op("Add", x, g.op("Unsqueeze", g.op("GatherND", x, index), g.ints(1)))


def _row_index_next(g: Graph, x: str) -> str:
    count = g.op("Squeeze", g.size(x))
    rows = g.op("Range", np.array(0, np.int64), count, np.array(1, np.int64))
    return g.op("Gather", x, g.op("Mod", g.op("Add", rows, np.array(1, np.int64)), count), axis=0)


def _place(g: Graph, x: str) -> str:
    """The place in the batch as a feature."""
    rows = g.op("Range", np.array(0, np.int64), g.op("Squeeze", g.size(x)), np.array(1, np.int64))
    return g.op("Add", x, g.op("Reshape", g.op("Cast", rows, to=g.dtype), g.ints(-1, 1, 1)))


def _steps_embedding(g: Graph, x: str) -> str:
    """The place among the steps, a matter of each sample alone."""
    steps = g.op("Range", np.array(0, np.int64), g.op("Squeeze", g.size(x, 1)), np.array(1, np.int64))
    return g.op("Add", x, g.op("Gather", g.weight(16, C), steps, axis=0))


def _expanded(g: Graph, x: str) -> str:
    """A class token for each sample, by Expand to a computed shape with torch's -1."""
    target = g.op("Concat", g.size(x), g.ints(-1, -1), axis=0)
    minus = g.op("Equal", target, g.ints(-1, -1, -1))
    target = g.op("Where", minus, g.ints(1, 1, 1), target)
    token = g.op("Expand", g.weight(1, 1, C), target)
    return g.op("Slice", g.op("Concat", token, x, axis=1), g.ints(0), g.ints(T), g.ints(1))


def _topk(axis: int) -> Block:
    def block(g: Graph, x: str) -> str:
        values, _ = g.op("TopK", x, g.size(x, axis), outputs=2, axis=axis)
        return values

    return block


def _scan(g: Graph, x: str, axis: int) -> str:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "e"], ["s1"]), helper.make_node("Tanh", ["s1"], ["o"])],
        "body",
        [info("s", g.dtype, None), info("e", g.dtype, None)],
        [info("s1", g.dtype, None), info("o", g.dtype, None)],
    )
    turned = g.op("Transpose", x, perm=[1, 0, 2]) if axis else x
    start = g.op("ReduceSum", g.op("Mul", turned, np.array(0.0)), g.ints(0), keepdims=0)
    _, out = g.op("Scan", start, turned, outputs=2, body=body, num_scan_inputs=1)
    return str(g.op("Transpose", out, perm=[1, 0, 2]) if axis else out)


def _loop(carried: bool) -> Block:
    """One round a sample; the state is carried on, or begins anew each time."""

    def block(g: Graph, x: str) -> str:
        info = helper.make_tensor_value_info
        source = "s" if carried else "zero"
        body = helper.make_graph(
            [
                helper.make_node("Gather", [x, "i"], ["row"], axis=0),
                helper.make_node("Add", ["row", source], ["sum"]),
                helper.make_node("Identity", ["c"], ["c1"]),
                helper.make_node("Identity", ["sum"], ["out"]),
            ],
            "body",
            [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("s", g.dtype, None)],
            [info("c1", TensorProto.BOOL, []), info("sum", g.dtype, None), info("out", g.dtype, None)],
            [numpy_helper.from_array(np.zeros((T, C), g.float), "zero")],
        )
        trips = g.op("Squeeze", g.size(x))
        _, out = g.op("Loop", trips, np.array(True), np.zeros((T, C)), outputs=2, body=body)
        # ONNX's reference evaluator joins the results of the rounds along an existing axis.
        return str(g.op("Reshape", out, g.ints(-1, T, C)))

    return block


def _einsum(equation: str) -> Block:
    return lambda g, x: g.op("Einsum", x, x, equation=equation)


def _scatter(index_axis: int) -> Block:
    """A row replaced: of the steps, or of the samples."""

    def block(g: Graph, x: str) -> str:
        if index_axis == 1:
            turned = g.op("Transpose", x, perm=[1, 0, 2])
            row = g.op("Mul", g.op("Gather", turned, g.ints(0), axis=0), np.array(3.0))
            return g.op("Transpose", g.op("ScatterND", turned, g.ints(2).reshape(1, 1), row), perm=[1, 0, 2])
        row = g.op("Mul", g.op("Gather", x, g.ints(0), axis=0), np.array(3.0))
        return g.op("ScatterND", x, g.ints(0).reshape(1, 1), row)

    return block


def _first_sample(g: Graph, x: str) -> str:
    """The first sample is treated otherwise than the rest."""
    first = g.op("Slice", x, g.ints(0), g.ints(1), g.ints(0))
    rest = g.op("Slice", x, g.ints(1), g.ints(1000), g.ints(0))
    return g.op("Concat", g.op("Mul", first, np.array(2.0)), rest, axis=0)


def _twice(g: Graph, x: str) -> str:
    """Test-time augmentation: both versions in one batch, and the mean of their halves."""
    both = g.op("Tanh", g.op("Concat", x, g.op("Neg", x), axis=0))
    count = g.size(x)
    first = g.op("Slice", both, g.ints(0), count, g.ints(0))
    second = g.op("Slice", both, count, g.ints(10000), g.ints(0))
    return g.op("Sub", first, g.op("Mul", second, np.array(0.5)))


def _if(g: Graph, x: str, mixed: bool) -> str:
    """A branch decided by the mean of a batch, or by the length of the steps."""
    info = helper.make_tensor_value_info
    branches = {}
    for name, op in (("then_branch", "Tanh"), ("else_branch", "Neg")):
        node = helper.make_node(op, [x], [f"{name}{len(g.nodes)}"])
        branches[name] = helper.make_graph([node], name, [], [info(node.output[0], g.dtype, None)])
    if mixed:
        condition = g.op("Greater", g.op("ReduceMean", x, keepdims=0), np.array(0.0))
    else:
        condition = g.op("Greater", g.op("Squeeze", g.size(x, 1)), np.array(2, np.int64))
    return g.op("If", condition, **branches)


def _normalised(g: Graph, x: str, axes: list[int]) -> str:
    mean = g.op("ReduceMean", x, axes=axes)
    centred = g.op("Sub", x, mean)
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes=axes)
    return g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, np.array(1e-3))))


KEPT: dict[str, Block] = {
    "relu": lambda g, x: g.op("Relu", x),
    "bias": lambda g, x: g.op("Add", x, g.weight(T, C)),
    "linear": lambda g, x: g.op("MatMul", x, g.weight(C, C)),
    "merged": _merged,
    "merged, back by shape": _merged_back_by_shape,
    "merged, time first": _merged_transposed_back,
    "attention": _attention,
    "heads": _heads,
    "gru": _recurrent(1),
    "lstm": _recurrent(1, "LSTM"),
    "rnn": _recurrent(1, "RNN"),
    "floor of a sample": _floor_80_db([1, 2]),
    "softmax": lambda g, x: g.op("Softmax", x, axis=1),
    "cumsum": lambda g, x: g.op("CumSum", x, np.array(1, np.int64)),
    "topk": _topk(2),
    "rows by index": _row_index,
    "steps": _steps_embedding,
    "token": _expanded,
    "scan over steps": lambda g, x: _scan(g, x, 1),
    "loop over samples": _loop(False),
    "einsum": _einsum("btc,bsc->btc"),
    "scatter a step": _scatter(1),
    "twice": _twice,
    "if": lambda g, x: _if(g, x, False),
    "normalised": lambda g, x: _normalised(g, x, [1, 2]),
    "gather steps": lambda g, x: g.op("Gather", x, g.ints(3, 1, 0, 2), axis=1),
    "split": lambda g, x: g.op("Concat", *g.op("Split", x, g.ints(1, 3), outputs=2, axis=1)[::-1], axis=1),
    "pad": lambda g, x: g.op("Slice", g.op("Pad", x, g.ints(0, 1, 0, 0, 0, 0)), g.ints(0), g.ints(T), g.ints(1)),
    "l2": lambda g, x: g.op("LpNormalization", x, axis=2, p=2),
    "masked": lambda g, x: g.op("Where", g.op("Greater", x, np.array(0.3)), x, g.op("Neg", x)),
    "shape as number of steps": lambda g, x: g.op("Div", x, g.op("Cast", g.size(x, 1), to=g.dtype)),
}
MIXED: dict[str, Block] = {
    "mean of all": lambda g, x: g.op("Sub", x, g.op("ReduceMean", x, keepdims=1)),
    "floor of all": _floor_80_db(None),
    "mean over samples": lambda g, x: g.op("Sub", x, g.op("ReduceMean", x, axes=[0])),
    "merged, dealt out wrongly": _merged_transposed,
    "attention across": _attention_across,
    "heads confused": _heads_confused,
    "gru, samples as steps": _recurrent(0),
    "lstm, samples as steps": _recurrent(0, "LSTM"),
    "quantised": _quantised,
    "softmax over samples": lambda g, x: g.op("Softmax", x, axis=0),
    "running sum": lambda g, x: g.op("CumSum", x, np.array(0, np.int64)),
    "running sum backwards": lambda g, x: g.op("CumSum", x, np.array(0, np.int64), reverse=1),
    "sorted samples": _topk(0),
    "the next sample": _row_index_next,
    "place": _place,
    "scan over samples": lambda g, x: _scan(g, x, 0),
    "carried on": _loop(True),
    "einsum over samples": _einsum("btc,stc->btc"),
    "first sample scaled": _first_sample,
    "scatter a sample": _scatter(0),
    "decided by all": lambda g, x: _if(g, x, True),
    "normalised over samples": lambda g, x: _normalised(g, x, [0, 2]),
    "number of samples": lambda g, x: g.op("Div", x, g.number(x)),
    "sum over number": lambda g, x: g.op(
        "Add", x, g.op("Div", g.op("ReduceSum", x, g.ints(0), keepdims=1), g.number(x))
    ),
    "backwards": lambda g, x: g.op("Slice", x, g.ints(-1), g.ints(-(2**62)), g.ints(0), g.ints(-1)),
    "l2 over samples": lambda g, x: g.op("LpNormalization", x, axis=0, p=2),
    "the first sample added": lambda g, x: g.op("Add", x, g.op("Gather", x, g.ints(0), axis=0)),
    "argmax over samples": lambda g, x: g.op("Add", x, g.op("Cast", g.op("ArgMax", x, axis=0, keepdims=1), to=g.dtype)),
    "best of all": lambda g, x: g.op("Add", x, g.op("TopK", g.op("Reshape", x, g.ints(-1)), g.ints(1), outputs=2)[0]),
}


def chain(seed: int, *, mixed: bool, dtype: int = TensorProto.FLOAT) -> tuple[onnx.ModelProto, list[str]]:
    """Return a random graph and its blocks' names. `mixed` adds one or two blocks that mix samples."""
    g = Graph(seed, dtype)
    names = [str(name) for name in g.random.choice(list(KEPT), g.random.integers(1, 5))]
    for _ in range(int(g.random.integers(1, 3)) if mixed else 0):
        names.insert(int(g.random.integers(0, len(names) + 1)), str(g.random.choice(list(MIXED))))
    last = "x"
    for name in names:
        last = (KEPT.get(name) or MIXED[name])(g, last)
    return g.model(last), names


def one_block(name: str, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Return the graph of one block."""
    g = Graph(1, dtype)
    return g.model((KEPT.get(name) or MIXED[name])(g, "x"))
