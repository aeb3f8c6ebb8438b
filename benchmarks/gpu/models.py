"""The models of the GPU benchmarks, generated with seeded weights: speed is the question here, accuracy is not.

Weights are normal with He scaling, and the last convolution of a residual block is damped, so that activations neither
vanish nor overflow in FP16. BatchNorm is left out: exported networks have it folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MODELS"]


class _Graph:
    """Nodes and weights in the order they are made."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def weight(self, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> str:
        name = f"w{len(self.weights)}"
        values = self.random.standard_normal(shape, np.float32) * np.float32(gain * (2.0 / fan_in) ** 0.5)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def conv(
        self, x: str, cin: int, cout: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, gain: float = 1.0
    ) -> str:
        weight = self.weight((cout, cin // groups, kernel, kernel), cin // groups * kernel * kernel, gain)
        bias = self.weight((cout,), cout * 100)
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, weight, bias], strides=[stride] * 2, pads=pads, group=groups)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.node("MatMul", [x, self.weight((inputs, outputs), inputs)])
        return self.node("Add", [product, self.weight((outputs,), outputs * 100)])

    def model(
        self, x: tuple[str, list[object]], y: tuple[str, list[object]], dtype: int = TensorProto.FLOAT
    ) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        output = helper.make_node("Identity", [y[0]], ["output"], name="output")
        graph = helper.make_graph(
            [*self.nodes, output],
            "generated",
            [info(x[0], dtype, x[1])],
            [info("output", TensorProto.FLOAT, y[1])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _residual(groups: int, width: int, blocks: tuple[int, ...]) -> onnx.ModelProto:
    """ResNet and ResNeXt with bottleneck blocks (He et al. 2015; Xie et al. 2017), [N, 3, 224, 224] -> [N, 1000]."""
    graph = _Graph(seed=0)
    x = graph.node("Relu", [graph.conv("input", 3, 64, 7, stride=2)])
    x = graph.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, count in enumerate(blocks):
        inner, outer = width * groups << stage, 256 << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            short = x if channels == outer else graph.conv(x, channels, outer, stride=stride, gain=0.7)
            y = graph.node("Relu", [graph.conv(x, channels, inner)])
            y = graph.node("Relu", [graph.conv(y, inner, inner, 3, stride=stride, groups=groups)])
            y = graph.conv(y, inner, outer, gain=sum(blocks) ** -0.5)
            x = graph.node("Relu", [graph.node("Add", [y, short])])
            channels = outer
    pooled = graph.node("Flatten", [graph.node("GlobalAveragePool", [x])])
    return graph.model(("input", ["N", 3, 224, 224]), (graph.linear(pooled, channels, 1000), ["N", 1000]))


def _vgg16() -> onnx.ModelProto:
    """VGG-16 (Simonyan and Zisserman 2014), [N, 3, 224, 224] -> [N, 1000]."""
    graph = _Graph(seed=0)
    x, channels = "input", 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x = graph.node("Relu", [graph.conv(x, channels, width, 3)])
            channels = width
        x = graph.node("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
    x, size = graph.node("Flatten", [x]), 512 * 49
    for width in (4096, 4096):
        x, size = graph.node("Relu", [graph.linear(x, size, width)]), width
    return graph.model(("input", ["N", 3, 224, 224]), (graph.linear(x, size, 1000), ["N", 1000]))


def _encoder(layers: int = 12, width: int = 768, heads: int = 12, length: int = 128) -> onnx.ModelProto:
    """A BERT-base-size encoder without its embeddings, [N, 128, 768] -> [N, 128, 768]: do MatMuls run sparse?"""
    graph = _Graph(seed=0)
    split = graph.node("Constant", [], value=numpy_helper.from_array(np.array([0, length, heads, width // heads])))
    merge = graph.node("Constant", [], value=numpy_helper.from_array(np.array([0, length, width])))
    scale = graph.node("Constant", [], value=numpy_helper.from_array(np.float32((width // heads) ** -0.5)))
    ones = numpy_helper.from_array(np.ones(width, np.float32), "ones")
    zeros = numpy_helper.from_array(np.zeros(width, np.float32), "zeros")
    graph.weights += [ones, zeros]
    x = "input"
    for _ in range(layers):
        q, k, v = (graph.node("Reshape", [graph.linear(x, width, width), split]) for _ in range(3))
        q, v = (graph.node("Transpose", [t], perm=[0, 2, 1, 3]) for t in (q, v))
        k = graph.node("Transpose", [k], perm=[0, 2, 3, 1])
        scores = graph.node("Softmax", [graph.node("Mul", [graph.node("MatMul", [q, k]), scale])], axis=-1)
        mixed = graph.node("Transpose", [graph.node("MatMul", [scores, v])], perm=[0, 2, 1, 3])
        y = graph.linear(graph.node("Reshape", [mixed, merge]), width, width)
        x = graph.node("LayerNormalization", [graph.node("Add", [x, y]), "ones", "zeros"], axis=-1)
        y = graph.linear(graph.node("Relu", [graph.linear(x, width, 4 * width)]), 4 * width, width)
        x = graph.node("LayerNormalization", [graph.node("Add", [x, y]), "ones", "zeros"], axis=-1)
    return graph.model(("input", ["N", length, width]), (x, ["N", length, width]))


def _tiny() -> onnx.ModelProto:
    """A stand-in for rehearsals: one bottleneck of each kind, seconds on a CPU."""
    return _residual(groups=4, width=8, blocks=(1, 1, 1, 1))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnext101_32x8d": lambda: _residual(groups=32, width=8, blocks=(3, 4, 23, 3)),
    "resnet50": lambda: _residual(groups=1, width=64, blocks=(3, 4, 6, 3)),
    "vgg16": _vgg16,
    "encoder": _encoder,
    "tiny": _tiny,
}
