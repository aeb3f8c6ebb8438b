"""Weights computed by the graph from constants, many in one model, against a slow count of the known values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.sparsity import SparsityVerdict, sparsity_report

T = onnx.TensorProto
SIZE = 8
"""Every weight is [SIZE, SIZE] and multiplies from the right, so layers can follow each other."""


@dataclass
class Graph:
    """Nodes and constants under construction."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def constant(self, array: np.ndarray) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants[name] = array
        return name

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"{self.prefix}v{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names


def sparse_or_dense(generator: np.random.Generator, rows: int = SIZE, columns: int = SIZE) -> np.ndarray:
    """2:4 along the rows, nearly so, or dense: the answer differs from weight to weight."""
    array = generator.uniform(1, 8, (rows, columns)).astype(np.float32)
    kind = generator.integers(3)
    if kind < 2:
        array[0::4] = array[1::4] = 0
    if kind == 1:
        array[generator.integers(rows), generator.integers(columns)] = 5
    return array


def _mul(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    return graph.node("Mul", [graph.constant(weight / 2), graph.constant(np.full((1, SIZE), 2, np.float32))])[0]


def _div(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    return graph.node("Div", [graph.constant(weight * 4), graph.constant(np.full((), 4, np.float32))])[0]


def _add(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    part = generator.standard_normal(weight.shape).astype(np.float32) * (weight != 0)
    return graph.node("Add", [graph.constant(weight - part), graph.constant(part)])[0]


def _sub(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    return graph.node("Sub", [graph.constant(weight + 1), graph.constant(np.ones_like(weight))])[0]


def _concat(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    axis = int(generator.integers(2))
    parts = [graph.constant(part) for part in np.split(weight, [4], axis)]
    return graph.node("Concat", parts, axis=axis)[0]


def _slice(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    padded = np.pad(weight, ((2, 1), (0, 0)), constant_values=7)
    bounds = [graph.constant(np.array([number])) for number in (2, 2 + SIZE, 0)]
    return graph.node("Slice", [graph.constant(padded), *bounds])[0]


def _gather(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    order = generator.permutation(SIZE)
    return graph.node("Gather", [graph.constant(weight[order]), graph.constant(np.argsort(order))], axis=0)[0]


def _split(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    other = sparse_or_dense(generator)
    both = graph.constant(np.concatenate([other, weight], axis=1))
    return graph.node("Split", [both, graph.constant(np.array([SIZE, SIZE]))], outputs=2, axis=1)[1]


def _where(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    kept = graph.constant(weight != 0)
    dense = graph.constant(np.where(weight == 0, np.float32(9), weight))
    return graph.node("Where", [kept, dense, graph.constant(np.zeros((), np.float32))])[0]


def _sum_of_parts(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    parts = graph.constant(np.stack([weight / 4, weight * 3 / 4]))
    return graph.node("ReduceSum", [parts, graph.constant(np.array([0]))], keepdims=0)[0]


def _chain(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    flat = _mul(graph, np.ascontiguousarray(weight.T), generator)
    return graph.node("Transpose", [flat], perm=[1, 0])[0]


def _integers(weight: np.ndarray, zero: int) -> np.ndarray:
    return (np.round(weight * 8) + zero * np.ones_like(weight)).astype(np.int8)


def _dequantised_sum(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    """Two quantised halves of different scales add up; only their real values cancel where the weight is zero."""
    stored = np.where(weight == 0, 8, np.round(weight * 8)).astype(np.int8)
    scale, third = graph.constant(np.float32(0.125)), graph.constant(np.float32(0.25))
    first = graph.node("DequantizeLinear", [graph.constant(stored), scale])[0]
    offset = graph.constant(np.where(weight == 0, 4, 0).astype(np.int8))
    return graph.node("Sub", [first, graph.node("DequantizeLinear", [offset, third])[0]])[0]


def _quantised_then_joined(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    """One half is quantised in the graph, one stored quantised: both keep their zero point until the end."""
    upper, lower = np.split(weight, [4], 0)
    scale, zero = graph.constant(np.float32(0.125)), graph.constant(np.int8(3))
    quantised = graph.node("QuantizeLinear", [graph.constant(upper), scale, zero])[0]
    joined = graph.node("Concat", [quantised, graph.constant(_integers(lower, 3))], axis=0)[0]
    return graph.node("DequantizeLinear", [joined, scale, zero])[0]


def _requantised(graph: Graph, weight: np.ndarray, generator: np.random.Generator) -> str:
    """A coarser scale rounds away values kept by a finer one."""
    small = np.where(weight == 0, np.float32(0.125), weight)
    scale, zero = graph.constant(np.float32(0.125)), graph.constant(np.int8(3))
    coarse, middle = graph.constant(np.float32(1.0)), graph.constant(np.uint8(128))
    fine = graph.node("DequantizeLinear", [graph.constant(_integers(small, 3)), scale, zero])[0]
    return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [fine, coarse, middle])[0], coarse, middle])[0]


KINDS: tuple[Callable[[Graph, np.ndarray, np.random.Generator], str], ...] = (
    _mul, _div, _add, _sub, _concat, _slice, _gather, _split, _where, _sum_of_parts, _chain,
    _dequantised_sum, _quantised_then_joined, _requantised,
)  # fmt: skip


def layers_in(graph: Graph, first: str, kinds: list[int], seed: int) -> tuple[str, dict[str, np.ndarray]]:
    """Add one layer per kind; return the last output and each layer's weight by node name."""
    generator = np.random.default_rng(seed)
    expected, current = {}, first
    for number, kind in enumerate(kinds):
        weight = sparse_or_dense(generator)
        name = KINDS[kind](graph, weight, generator)
        layer = f"{graph.prefix}layer{number}"
        output = f"{graph.prefix}y{number}"
        graph.nodes.append(helper.make_node("MatMul", [current, name], [output], name=layer))
        expected[layer], current = weight, output
    return current, expected


def slow_count(weight: np.ndarray) -> tuple[int, int, int]:
    """(valid groups, groups, zeros) along axis 0, one value at a time."""
    valid = groups = zeros = 0
    for column in range(weight.shape[1]):
        for start in range(0, weight.shape[0], 4):
            filled = sum(1 for row in range(start, start + 4) if weight[row, column] != 0)
            groups += 1
            valid += filled <= 2
            zeros += 4 - filled
    return valid, groups, zeros


def check(proto: onnx.ModelProto, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    report = sparsity_report(load_model(onnx_models.save(proto, tmp_path / "m.onnx")))
    assert {layer.node for layer in report.layers} == set(expected)
    for layer in report.layers:
        found = (layer.valid_groups, layer.groups, layer.zeros)
        assert found == slow_count(expected[layer.node]), layer
        assert layer.verdict is (
            SparsityVerdict.VALID if layer.valid_groups == layer.groups else SparsityVerdict.NOT_24
        ), layer


def initializers(graph: Graph) -> list[onnx.TensorProto]:
    return [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()]


IN, OUT = value("x", ["N", SIZE]), value("y", ["N", SIZE])


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[kind.__name__.strip("_") for kind in KINDS])
@pytest.mark.parametrize("seed", range(4))
def test_the_weight_is_what_the_graph_computes(kind: int, seed: int, tmp_path: Path) -> None:
    graph = Graph("")
    last, expected = layers_in(graph, "x", [kind], seed)
    graph.nodes.append(helper.make_node("Identity", [last], ["y"]))
    proto = onnx_models.model(graph.nodes, [IN], [OUT], graph.constants)
    given = np.eye(SIZE, dtype=np.float32)  # the identity: the output is the weight, so the case is checked itself
    weight = Session(proto, optimize=False).run({"x": given})["y"]
    assert (np.isclose(weight, 0, atol=1e-6) == (expected["layer0"] == 0)).all()
    check(proto, expected, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_many_in_one_graph(seed: int, tmp_path: Path) -> None:
    kinds = [int(kind) for kind in np.random.default_rng(seed).permutation(2 * len(KINDS)) % len(KINDS)]
    graph = Graph("")
    last, expected = layers_in(graph, "x", kinds, seed)
    graph.nodes.append(helper.make_node("Identity", [last], ["y"]))
    check(onnx_models.model(graph.nodes, [IN], [OUT], graph.constants), expected, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_many_in_the_bodies_of_an_if(seed: int, tmp_path: Path) -> None:
    kinds = [int(kind) for kind in np.random.default_rng(seed).permutation(len(KINDS))]
    bodies, expected = {}, {}
    for number, branch in enumerate(("then_branch", "else_branch")):
        graph = Graph(branch[:4] + "_")
        last, weights = layers_in(graph, "x", kinds, 100 * seed + number)
        bodies[branch] = helper.make_graph(graph.nodes, branch, [], [value(last, None)], initializers(graph))
        expected |= {f"if/{branch}/{name}": weight for name, weight in weights.items()}
    graph = Graph("")
    last, weights = layers_in(graph, "z", kinds, seed)
    node = helper.make_node("If", ["choice"], ["z"], name="if", **bodies)
    nodes = [node, *graph.nodes, helper.make_node("Identity", [last], ["y"])]
    inputs = [IN, value("choice", [], T.BOOL)]
    check(onnx_models.model(nodes, inputs, [OUT], graph.constants), {**expected, **weights}, tmp_path)


def test_a_function_with_other_arguments_at_each_call(tmp_path: Path) -> None:
    """The node is one and the same. Its result differs from call to call."""
    generator = np.random.default_rng(5)
    body = [helper.make_node("Mul", ["a", "b"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"], name="dot")]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "scaled", ["x", "a", "b"], ["y"], body, imports)
    weights = [sparse_or_dense(generator) for _ in range(6)]
    names = ["x", *(f"h{number}" for number in range(1, len(weights))), "y"]
    nodes = [
        helper.make_node(
            "scaled", [names[number], f"w{number}", "one"], [names[number + 1]], domain="local", name=f"call{number}"
        )
        for number in range(len(weights))
    ]
    constants = {f"w{number}": weight for number, weight in enumerate(weights)} | {"one": np.ones(1, np.float32)}
    proto = onnx_models.model(nodes, [IN], [OUT], constants)
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    check(proto, {f"call{number}/dot": weight for number, weight in enumerate(weights)}, tmp_path)


@pytest.mark.parametrize(("zeros", "axis"), [([3, 3, 3, 3], 0), ([3, 3, 0, 3], 0), ([3] * 8, 1), ([3, 0] * 4, 1)])
def test_one_number_repeated_around_zero_points(zeros: list[int], axis: int, tmp_path: Path) -> None:
    """ConstantOfShape in INT8: whether 3 is zero depends on the zero point of its channel."""
    shape = (4, 8)
    fill = helper.make_tensor("value", T.INT8, [1], [3])
    per_channel = np.array(zeros, np.int8)
    constants = {"shape": np.array(shape), "scale": np.ones(len(zeros), np.float32), "zero": per_channel}
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["q"], value=fill),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=axis),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
    ]
    weight = np.full(shape, 3) - np.expand_dims(per_channel, 1 - axis)
    proto = onnx_models.model(nodes, [value("x", ["N", 4])], [OUT], constants)
    check(proto, {"layer": weight}, tmp_path)
