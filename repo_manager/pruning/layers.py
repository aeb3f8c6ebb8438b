"""The layers solvable on data, and the way from their weight, inputs and outputs to matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.onnx_model.draft import Draft, attribute, captured_names
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.pruning.columns import ConvColumns, MatrixColumns
from repo_manager.sparsity.uses import Use
from repo_manager.sparsity.weight import Cast, Permute, Reshape, Weight

__all__ = ["Layer", "Shift", "layer_of"]

Array = NDArray[Any]

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Shift:
    """A constant able to move a layer's outputs: its own bias, or the bias of the node behind it.

    Attributes:
        name: of the constant in the main graph.
        sign: -1 for the mean a BatchNormalization subtracts.
    """

    name: str
    sign: int


@dataclass(frozen=True)
class Layer:
    """A stored weight, solvable on data, with all its uses.

    Attributes:
        label: of its first use, for messages and progress. See `Use.label`.
        weight: how the stored tensor becomes the operand.
        axis: reduction axis of the operand.
        uses: where to find inputs and outputs: node outputs name the values.
        order: axes of the operand in the order output, kernel, reduction.
        outputs: N, the number of rows of its matrix `[N, K]`.
        columns: K, the number of weights of one output, the kernel included.
        bias: a constant the node itself adds to its outputs, by name.
        shift: the constant to correct. `None` when nothing can be.
        macs: of all uses. `None` when not known.
    """

    label: str
    weight: Weight
    axis: int
    uses: tuple[ConvColumns | MatrixColumns, ...]
    order: tuple[int, ...]
    outputs: int
    columns: int
    bias: str | None
    shift: Shift | None
    macs: int | None

    @property
    def name(self) -> str:
        """The stored tensor's name."""
        return self.weight.name

    def matrix(self, store: WeightStore) -> Array:
        """Return the weights, `[N, K]` float32, groups of four along consecutive columns."""
        values = self.weight.real_values(store)
        return np.ascontiguousarray(values.transpose(self.order).reshape(self.outputs, self.columns), np.float32)

    def stored(self, matrix: Array, store: WeightStore) -> Array:
        """Return a matrix as it is stored: layout and type of the tensor."""
        shape = [self.weight.shape[axis] for axis in self.order]
        values: Array = matrix.reshape(shape).transpose(np.argsort(self.order))
        for step in reversed(self.weight.steps):
            values = step.invert(values)
        before = self.weight.stored(store)
        return np.ascontiguousarray(values.reshape(before.shape).astype(before.dtype))


def layer_of(uses: Sequence[Use], draft: Draft, readers: dict[str, list[onnx.NodeProto]]) -> Layer | str:
    """Make a layer of all uses of one stored tensor. A string says why it cannot be solved on data.

    Args:
        uses: as `sparsity.prune` found them fit for pruning.
        draft: the model to run. It has the nodes of `uses`, found by output name.
        readers: value -> its readers in the draft's main graph, direct or in a body.
    """
    first = uses[0]
    weight = first.weight
    assert weight is not None
    obstacle = _obstacle(uses, draft)
    if obstacle is not None:
        return obstacle
    strange = _strange_readers(weight, uses, draft, readers)
    if strange:
        return f"the same tensor is read by {strange}, which pruning would change, too"
    axis = (first.site.axis or 0) % len(weight.shape)
    output_axis = (first.site.output_axis or 0) % len(weight.shape)
    others = [number for number in range(len(weight.shape)) if number not in (axis, output_axis)]
    is_conv = first.node.op_type == "Conv"
    if not is_conv and math.prod(weight.shape[number] for number in others) != 1:
        return f"a stack of matrices {list(weight.shape)}: each has inputs of its own"
    producers = {name: node for node in draft.graph.node for name in node.output}
    nodes = [producers[use.node.output[0]] for use in uses]
    bias = _own_bias(nodes, draft)
    if bias == "":
        return "its bias is computed at run time"
    order = (output_axis, *others, axis)
    return Layer(
        label=first.label,
        weight=weight,
        axis=axis,
        uses=tuple(_columns_of(node, use, weight.shape) for node, use in zip(nodes, uses, strict=True)),
        order=order,
        outputs=weight.shape[output_axis],
        columns=weight.size // weight.shape[output_axis],
        bias=bias,
        shift=_shift_of(nodes[0], bias, draft, readers, weight.shape[output_axis]) if len(nodes) == 1 else None,
        macs=None if any(use.macs is None for use in uses) else sum(use.macs or 0 for use in uses),
    )


def _obstacle(uses: Sequence[Use], draft: Draft) -> str | None:
    weight = uses[0].weight
    assert weight is not None
    producers = {name for node in draft.graph.node for name in node.output}
    for use in uses:
        assert use.weight is not None
        if use.scope.path or use.node.output[0] not in producers or weight.name not in draft.weights:
            return "it is in a body or a local function: its inputs are not seen from outside"
        if use.node.domain not in ("", "ai.onnx") or use.node.op_type not in ("Conv", "MatMul", "Gemm"):
            return f"{use.node.op_type}: only Conv, MatMul and Gemm are solved on data"
        if any(not isinstance(step, Permute | Reshape | Cast) for step in use.weight.steps):
            return "already quantised: prune the floating-point model, then quantise it"
        if use.site.output_axis is None:
            return "the weight is a vector"
        if use.site.axis != uses[0].site.axis or use.weight.shape != weight.shape or use.weight.via != weight.via:
            return f"shares its weight with '{uses[0].label}' in another layout"
        if use.node.op_type == "Gemm" and (attribute(use.node, "alpha", 1.0), attribute(use.node, "beta", 1.0)) != (
            1.0,
            1.0,
        ):
            return "Gemm with alpha or beta other than 1"
    return None if weight.dtype in _FLOATS else f"{weight.dtype} is no floating-point type"


def _strange_readers(
    weight: Weight, uses: Sequence[Use], draft: Draft, readers: dict[str, list[onnx.NodeProto]]
) -> str | None:
    """Return the type of a reader of the tensor, neither a use nor on the way to one."""
    if any(value.name == weight.name for value in draft.graph.output):
        return "the model's outputs"
    outputs = {use.node.output[0] for use in uses}
    waiting, seen = [weight.name], set()
    while waiting:
        name = waiting.pop()
        for node in readers.get(name, ()):
            if node.output[0] in outputs or node.output[0] in seen:
                continue
            if node.op_type not in weight.via:
                return str(node.op_type)
            seen.add(node.output[0])
            waiting.append(node.output[0])
    return None


def _own_bias(nodes: Sequence[onnx.NodeProto], draft: Draft) -> str | None:
    """Return the name of the constant the nodes add to their products. `None`: none, empty: not the same one."""
    names = {node.input[2] if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else "" for node in nodes}
    if names == {""}:
        return None
    name = names.pop()
    return name if not names and name in draft.weights else ""


def _columns_of(node: onnx.NodeProto, use: Use, shape: tuple[int, ...]) -> ConvColumns | MatrixColumns:
    if node.op_type == "Conv":
        return ConvColumns.at(node, shape[2:])
    is_left = use.site.input == 0
    flipped = bool(attribute(node, "transB" if is_left else "transA", 0)) if node.op_type == "Gemm" else False
    return MatrixColumns(
        value=node.input[1 if is_left else 0],
        output=node.output[0],
        reduction=-2 if is_left != flipped else -1,
        channel=-2 if is_left else -1,
    )


def _shift_of(
    node: onnx.NodeProto, bias: str | None, draft: Draft, readers: dict[str, list[onnx.NodeProto]], outputs: int
) -> Shift | None:
    """Find the constant to take up a change of the outputs' means, if nothing else reads it."""
    if bias is not None:
        return Shift(bias, 1) if _is_free(bias, outputs, draft, readers) else None
    behind = readers.get(node.output[0], [])
    if len(behind) != 1 or any(value.name == node.output[0] for value in draft.graph.output):
        return None
    follower = behind[0]
    if follower.op_type == "BatchNormalization" and len(follower.input) == 5 and follower.input[0] == node.output[0]:
        if attribute(follower, "training_mode", 0):
            return None
        return Shift(follower.input[3], -1) if _is_free(follower.input[3], outputs, draft, readers) else None
    if follower.op_type != "Add" or node.output[0] not in follower.input:
        return None
    other = next((name for name in follower.input if name != node.output[0]), "")
    if not _is_free(other, outputs, draft, readers):
        return None
    shape, place = draft.weights[other].shape, 1 if node.op_type == "Conv" else 0
    if node.op_type == "Conv":  # [.., N, 1, 1]: the axes after the channels match the output's
        behind_channels = len(draft.weights[node.input[1]].shape) - 2 if node.input[1] in draft.weights else -1
        return Shift(other, 1) if shape[-1 - behind_channels :] == (outputs, *(1,) * behind_channels) else None
    return Shift(other, 1) if place == 0 and shape[-1:] == (outputs,) else None


def _is_free(name: str, outputs: int, draft: Draft, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """Return whether a constant has one number for each output and one reader only."""
    weight = draft.weights.get(name)
    if weight is None or weight.size != outputs or weight.tensor is not None:
        return False
    is_float = weight.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    count = sum(list(node.input).count(name) + list(captured_names(node)).count(name) for node in readers[name])
    return is_float and count == 1
