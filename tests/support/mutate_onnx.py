"""Seeded ways to break a real ONNX file: in its bytes, and in its graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

HUGE = [0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]
PATHS = [
    "../secret",
    "/etc/passwd",
    "a/../../b",
    "",
    "\0",
    "missing.bin",
    "model.onnx",
    ".",
    "x" * 5000,
    "loop",
    "/dev/zero",
]
OPS = [
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "QLinearConv", "MatMulInteger",
    "Reshape", "Transpose", "DequantizeLinear", "QuantizeLinear", "ConstantOfShape", "Cast", "If", "Loop",
    "Scan", "Nonsense", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Constant", "Slice",
    "Concat", "Expand", "Tile", "Range", "Pad", "Resize", "Split",
]  # fmt: skip

ATTRIBUTES: list[tuple[str, object]] = [
    ("group", 0),
    ("group", -3),
    ("group", 1152921504606846976),
    ("axis", 2**40),
    ("perm", [5, -1, 0]),
    ("perm", [0, 0]),
    ("equation", "ij,jk"),
    ("equation", "...i,,->->"),
    ("transB", 7),
    ("to", 99),
    ("axes", [2**62]),
    ("block_size", 1125899906842624),
    ("value_ints", [1, 2]),
    ("kernel_shape", [2**40, 2**40]),
    ("pads", [2**62, 2**62, 2**62, 2**62]),
    ("strides", [0, 0]),
    ("dilations", [2**62, 1]),
    ("shape", [2**40, -1]),
]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_edges(data: bytes, rng: random.Random) -> bytes:
    """Bit flips in the first and last kilobytes, where the graph mostly lies."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 2, 5])):
        place = rng.randrange(min(2000, len(out)))
        out[place if rng.random() < 0.5 else len(out) - 1 - place] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    piece = data[start : min(end, start + rng.choice([1, 8, 64, 4096]))]
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([piece, piece * 2, b"", rng.randbytes(8)]) + data[place + rng.randrange(16) :]


def big_varint(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\x80" * 12]) + data[place + 1 :]


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return list(graph.node)


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    nodes = _nodes(model.graph) or [model.graph.node.add(op_type="Relu", input=["x"], output=["q"])]
    return rng.choice(nodes)


def _tensor(model: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return rng.choice(tensors) if tensors else model.graph.initializer.add(name="w", data_type=1, dims=[4])


def absurd_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(HUGE)
    else:
        tensor.dims.extend(rng.choices(HUGE, k=rng.choice([1, 3, 200])))


def wrong_type(model: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.choice([0, 8, 16, 17, 21, 22, 23, 24, 25, 27, 99, 2**31 - 1])


def shorter_data(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)] + b"z" * rng.choice([0, 0, 5])


def external_escape(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=rng.choice(PATHS))
    if rng.random() < 0.7:
        tensor.external_data.add(key="offset", value=rng.choice(["-1", "0", "9" * 30, "x", str(2**62)]))
        tensor.external_data.add(key="length", value=rng.choice(["-1", "0", "9" * 30, "", str(2**62)]))


def cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    other = _node(model, rng)
    if other.output:
        node.input.append(other.output[0])
        if len(node.input) > 1 and rng.random() < 0.7:
            node.input[rng.randrange(len(node.input))] = node.output[0] if node.output else ""
    if rng.random() < 0.3:
        del model.graph.input[:]


def rename(model: onnx.ModelProto, rng: random.Random) -> None:
    names = [name for node in model.graph.node for name in [*node.input, *node.output]] or ["x"]
    node = _node(model, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*names[:200], "", "nowhere", "\x00"])
    if rng.random() < 0.3 and node.output:
        node.output[0] = rng.choice(names[:200])


def other_op(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.op_type = rng.choice(OPS)
    if rng.random() < 0.3:
        node.domain = rng.choice(
            ["com.microsoft", "nowhere", "ai.onnx", "ai.onnx.ml", "\udcff".encode("utf-8", "replace").decode()]
        )
    if rng.random() < 0.3:
        del node.input[rng.randrange(len(node.input) + 1) :]


def attributes(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.attribute and rng.random() < 0.7:
        attribute = rng.choice(list(node.attribute))
        kind = rng.randrange(5)
        if kind == 0:
            attribute.type = rng.choice([0, 1, 2, 4, 5, 7, 13])
        elif kind == 1 and attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(HUGE)
        elif kind == 2:
            attribute.ints.extend(rng.choices(HUGE, k=rng.choice([1, 40])))
        elif kind == 3:
            attribute.ref_attr_name = "nothing"
        else:
            attribute.i = rng.choice(HUGE)
        return
    name, value = rng.choice(ATTRIBUTES)
    node.attribute.append(helper.make_attribute(name, value))


def versions(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        model.ir_version = rng.choice([0, 1, 3, 99, -5, 2**40])
    elif kind == 1 and model.opset_import:
        model.opset_import[0].version = rng.choice([0, 1, 6, 13, 21, 999, -1, 2**40])
    elif kind == 2:
        del model.opset_import[:]
    else:
        model.opset_import.add(
            domain=rng.choice(["", "x", "ai.onnx", "com.microsoft"]), version=rng.choice([0, 1, 18, 2**33])
        )


def io_shapes(model: onnx.ModelProto, rng: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return
    value = rng.choice(values)
    kind = rng.randrange(5)
    if kind == 0:
        value.type.ClearField("tensor_type")
    elif kind == 1:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 2:
        value.type.tensor_type.elem_type = rng.choice([0, 8, 16, 23, 99])
    elif kind == 3:
        value.type.tensor_type.shape.dim.add(dim_value=rng.choice(HUGE))
    else:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = rng.choice(HUGE)


def recursive_function(model: onnx.ModelProto, rng: random.Random) -> None:
    depth = rng.choice([1, 2, 30])
    for index in range(depth):
        callee = f"f{(index + 1) % depth if rng.random() < 0.7 else index + 1}"
        body = [
            helper.make_node(callee, ["a"], ["m"], domain="loc"),
            helper.make_node(callee, ["m"], ["b"], domain="loc"),
        ]
        model.functions.append(
            helper.make_function("loc", f"f{index}", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
        )
    model.opset_import.add(domain="loc", version=1)
    node = _node(model, rng)
    node.op_type, node.domain = "f0", "loc"


def deep_bodies(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "leaf", [], [helper.make_empty_tensor_value_info("y")]
    )
    for level in range(rng.choice([2, 10, 24, 60])):
        node = helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=graph,
            else_branch=graph if level < 6 else helper.make_graph([], "e", [], []),
        )
        graph = helper.make_graph([node], f"g{level}", [], [helper.make_empty_tensor_value_info("y")])
    model.graph.node.extend(graph.node)


def bomb(model: onnx.ModelProto, rng: random.Random) -> None:
    """A huge tensor made of one number, where a weight was."""
    node = next((n for n in model.graph.node if len(n.input) > 1), None)
    shape = helper.make_tensor("bomb_shape", 7, [rng.choice([1, 2, 4])], [])
    shape.dims[0] = rng.choice([1, 2, 4])
    shape.int64_data.extend([rng.choice([2**20, 2**31, 2**40, -1, 0])] * shape.dims[0])
    model.graph.initializer.append(shape)
    op = rng.choice(["ConstantOfShape", "ConstantOfShape", "Expand", "Tile", "Range"])
    maker = helper.make_node(op, ["bomb_shape"] if op == "ConstantOfShape" else ["bomb_shape", "bomb_shape"], ["bomb"])
    model.graph.node.insert(0, maker)
    if node is not None:
        node.input[1] = "bomb"


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flip_bits, flip_edges, truncate, splice, big_varint]
GRAPHS: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    absurd_dims, wrong_type, shorter_data, external_escape, cycle, rename, other_op, attributes, versions, io_shapes,
    recursive_function, deep_bodies, bomb,
]  # fmt: skip


def mutate(data: bytes, seed: int) -> tuple[str, bytes]:
    """Return (description of the mutation, the broken file)."""
    rng = random.Random(seed)
    if rng.random() < 0.35:
        change = rng.choice(BYTES)
        return change.__name__, change(data, rng)
    model = onnx.ModelProto()
    done = []
    try:
        model.ParseFromString(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            graph_change = rng.choice(GRAPHS)
            graph_change(model, rng)
            done.append(graph_change.__name__)
        return "+".join(done), model.SerializeToString()
    except (DecodeError, ValueError, TypeError, OverflowError):  # the mutation itself is not a valid protobuf
        return "flip_bits", flip_bits(data, rng)
