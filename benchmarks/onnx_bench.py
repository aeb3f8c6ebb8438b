"""ONNX models made by the benchmarks themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def convolutions(
    generator: np.random.Generator, widths: tuple[int, ...], *, stride: int
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return 3x3 convolutions of input `x: [N, 3, H, W]`, each with a ReLU, averaged to `f: [N, widths[-1]]`."""
    nodes, weights, previous, channels = [], {}, "x", 3
    for index, wanted in enumerate(widths):
        weights[f"w{index}"] = generator.standard_normal((wanted, channels, 3, 3)) / np.sqrt(channels * 9)
        conv = helper.make_node("Conv", [previous, f"w{index}"], [f"c{index}"], strides=[stride] * 2, pads=[1] * 4)
        nodes += [conv, helper.make_node("Relu", [f"c{index}"], [f"r{index}"])]
        previous, channels = f"r{index}", wanted
    nodes += [helper.make_node("GlobalAveragePool", [previous], ["g"]), helper.make_node("Flatten", ["g"], ["f"])]
    return nodes, weights


def save(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], dims: list[int], classes: int
) -> None:
    """Write a model `x: [N, *dims] -> y: [N, classes]`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *dims])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
