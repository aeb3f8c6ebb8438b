"""Write a ResNeXt-101 32x8d (355 MB) with seeded random weights: the model of the published sparse figures.

    python benchmarks/resnext.py OUT.onnx [--sparse] [--width 8] [--seed 0]

Architecture: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", as in torchvision's
`resnext101_32x8d`; each BatchNormalization is folded into its convolution's bias. `--sparse` zeroes two of
every four weights along C in each convolution without groups, as ASP would.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from repo_manager.sparsity import two_four_mask

BLOCKS = (3, 4, 23, 3)
CARDINALITY = 32
RESIDUAL_GAIN = 0.25
"""Of a block's last convolution. A trained network's batch normalisation keeps the residual sum in range;
with 1.0 it would double at each of the 33 blocks, beyond what FP16 holds."""


class _Builder:
    def __init__(self, sparse: bool, seed: int) -> None:
        self.sparse = sparse
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, name: str, shape: tuple[int, ...], *, prunable: bool, gain: float = 1.0) -> str:
        fan_in = int(np.prod(shape[1:]))
        values = self.random.standard_normal(shape, np.float32) * np.float32(gain * (2 / fan_in) ** 0.5)
        if self.sparse and prunable and shape[1] % 16 == 0 and shape[0] % 8 == 0:
            values *= two_four_mask(values, 1)
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        x: str,
        name: str,
        shape: tuple[int, ...],
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
        gain: float = 1.0,
    ) -> str:
        weight = self.weight(f"{name}.weight", shape, prunable=groups == 1, gain=gain)
        self.tensors.append(numpy_helper.from_array(np.zeros(shape[0], np.float32), f"{name}.bias"))
        pad = shape[2] // 2
        output = f"{name}.out"
        self.nodes.append(
            helper.make_node(
                "Conv", [x, weight, f"{name}.bias"], [output], name=name, group=groups,
                strides=[stride] * 2, pads=[pad] * 4, kernel_shape=list(shape[2:]),
            )
        )  # fmt: skip
        return self.relu(output) if relu else output

    def relu(self, x: str) -> str:
        self.nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"], name=f"{x}.relu"))
        return f"{x}.relu"


def resnext101(*, sparse: bool = False, width: int = 8, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """Build the network; input `[N, 3, 224, 224]`, output `[N, classes]`.

    Args:
        sparse: 2:4 weights in the convolutions without groups.
        width: channels of one group in the first stage; 8 is the 355 MB network, 1 a 20 MB one of the same depth.
        classes: size of the output.
        seed: of the weights.
    """
    build = _Builder(sparse, seed)
    x = build.conv("input", "stem", (64, 3, 7, 7), stride=2)
    build.nodes.append(
        helper.make_node("MaxPool", [x], ["pool"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    )
    x, channels = "pool", 64
    for stage, blocks in enumerate(BLOCKS):
        inner, outer = CARDINALITY * width * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x
            if block == 0:
                shortcut = build.conv(x, f"{name}.downsample", (outer, channels, 1, 1), stride=stride, relu=False)
            y = build.conv(x, f"{name}.conv1", (inner, channels, 1, 1))
            y = build.conv(y, f"{name}.conv2", (inner, inner // CARDINALITY, 3, 3), stride=stride, groups=CARDINALITY)
            y = build.conv(y, f"{name}.conv3", (outer, inner, 1, 1), relu=False, gain=RESIDUAL_GAIN)
            build.nodes.append(helper.make_node("Add", [y, shortcut], [f"{name}.sum"], name=f"{name}.add"))
            x, channels = build.relu(f"{name}.sum"), outer
    build.nodes.append(helper.make_node("GlobalAveragePool", [x], ["average"], name="average"))
    build.nodes.append(helper.make_node("Flatten", ["average"], ["features"], name="flatten"))
    head = build.weight("head.weight", (classes, channels), prunable=True)
    build.tensors.append(numpy_helper.from_array(np.zeros(classes, np.float32), "head.bias"))
    build.nodes.append(helper.make_node("Gemm", ["features", head, "head.bias"], ["logits"], name="head", transB=1))
    graph = helper.make_graph(
        build.nodes,
        "resnext101_32x8d",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", classes])],
        build.tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    proto = resnext101(sparse=options.sparse, width=options.width, seed=options.seed)
    options.output.write_bytes(proto.SerializeToString())
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
