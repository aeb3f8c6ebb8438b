"""The channels of a graph free to change places: classes of axes to permute alike.

Each value with a channel axis has a layout: the axis, and the classes of channels along it (several behind a Concat).
Operators with the same treatment of all channels pass the layout on and join classes (Add branches). Convolutions and
matrix products read one class and begin another. Whatever is not known here, and the model's inputs and outputs, pins
its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx

from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft, attribute, captured_names
from repo_manager.precision.passes.value_types import infer_types, type_table

__all__ = ["ChannelAxis", "Channels", "channels_of"]

_UNARY = {
    *("Abs", "BitShift", "Cast", "Ceil", "Clip", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid"),
    *("Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
}
_BINARY = {"Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"}
_SPATIAL = {
    *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool", "Resize", "Upsample"),
}
_REDUCE = {"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}
_PER_CHANNEL = {"BatchNormalization", "InstanceNormalization"}


@dataclass(frozen=True)
class ChannelAxis:
    """One axis of a stored tensor with classes of channels along it.

    Attributes:
        weight: the tensor's name, a key of `Draft.weights`.
        axis: of the stored tensor, from 0.
        classes: numbers of the classes along it, in order. Their sizes are in `Channels.sizes`.
        reduces: the axis is summed over: it decides on the weights in a group of four.
    """

    weight: str
    axis: int
    classes: tuple[int, ...]
    reduces: bool = False


@dataclass(frozen=True)
class _Layout:
    """The channel axis of a value, and the classes along it."""

    axis: int
    classes: tuple[int, ...]


@dataclass
class Channels:
    """Classes of channels permuted alike.

    Attributes:
        sizes: of each class, by number.
        axes: axes of stored tensors with classes along them. A tensor may have several.
    """

    sizes: list[int] = field(default_factory=list)
    axes: list[ChannelAxis] = field(default_factory=list)
    _parent: list[int] = field(default_factory=list)
    _pinned: set[int] = field(default_factory=set)

    def new(self, size: int) -> int:
        """Begin a class."""
        self.sizes.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def root(self, number: int) -> int:
        """Return the class a class was joined to."""
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Let two classes of equal size be permuted alike."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self._parent[other] = one
            if other in self._pinned:
                self._pinned.add(one)

    def pin(self, number: int) -> None:
        """Keep a class as it is."""
        self._pinned.add(self.root(number))

    def is_free(self, number: int) -> bool:
        """Return whether a class may be permuted."""
        return self.root(number) not in {self.root(pinned) for pinned in self._pinned}


def channels_of(draft: Draft) -> Channels:
    """Find the classes of channels of a model's main graph."""
    return _Walk(draft).run()


class _Walk:
    def __init__(self, draft: Draft) -> None:
        self.draft, self.channels = draft, Channels()
        self.layouts: dict[str, _Layout] = {}
        table = type_table(infer_types(draft).graph)
        self.shapes = {name: found.shape for name, found in table.items() if found.shape is not None}
        self.readers: dict[str, int] = {}
        for node in draft.graph.node:
            for name in (*node.input, *captured_names(node)):
                self.readers[name] = self.readers.get(name, 0) + 1
        for value in draft.graph.output:
            self.readers[value.name] = self.readers.get(value.name, 0) + 2

    def run(self) -> Channels:
        for node in self.draft.graph.node:
            if node.domain not in ONNX_DOMAINS or not self._handled(node):
                for name in node.input:
                    self._pin(name)
            for name in captured_names(node):
                self._pin(name)
        for value in self.draft.graph.output:
            self._pin(value.name)
        return self.channels

    def _handled(self, node: onnx.NodeProto) -> bool:
        """Pass layouts on. `False`: the node's inputs must be pinned."""
        op = node.op_type
        if op == "Conv":
            return self._conv(node)
        if op in ("MatMul", "Gemm"):
            return self._product(node)
        layout = self.layouts.get(node.input[0]) if node.input else None
        if op in _BINARY:
            return self._elementwise(node)
        if op == "Concat":
            return self._concat(node)
        if layout is None:
            return op in _UNARY or op == "Constant"
        if op in _UNARY:
            return self._kept(node, layout, True)
        if op in _SPATIAL:
            return self._kept(node, layout, layout.axis == 1 and self._same_size(node, 1))
        if op in _PER_CHANNEL:
            return layout.axis == 1 and self._constants(node, node.input[1:], layout)
        if op == "LayerNormalization":
            last = self._rank(node.input[0]) - 1
            is_last = layout.axis == last and attribute(node, "axis", -1) in (-1, last) and len(node.output) == 1
            return is_last and self._constants(node, node.input[1:], layout)
        if op in _REDUCE:
            return self._reduce(node, layout)
        if op == "Transpose":
            order = list(attribute(node, "perm", range(self._rank(node.input[0]))[::-1]))
            return self._kept(node, _Layout(order.index(layout.axis), layout.classes), layout.axis in order)
        if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            return self._reshape(node, layout)
        return False

    def _pin(self, name: str) -> None:
        layout = self.layouts.get(name)
        for number in () if layout is None else layout.classes:
            self.channels.pin(number)

    def _kept(self, node: onnx.NodeProto, layout: _Layout, fits: bool) -> bool:
        if fits and len([name for name in node.output if name]) == 1:
            self.layouts[node.output[0]] = layout
            return True
        return False

    def _rank(self, name: str) -> int:
        shape = self.shapes.get(name)
        return -1 if shape is None else len(shape)

    def _same_size(self, node: onnx.NodeProto, axis: int) -> bool:
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        if before is None or after is None or len(before) != len(after):
            return False
        return before[axis] == after[axis] > 0

    def _own(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a constant with one reader."""
        weight = self.draft.weights.get(name)
        return weight.shape if weight is not None and self.readers.get(name) == 1 and weight.tensor is None else None

    def _begin(self, output: str, axis: int, size: int, producers: Sequence[tuple[str, int]]) -> None:
        number = self.channels.new(size)
        self.layouts[output] = _Layout(axis, (number,))
        self.channels.axes += [ChannelAxis(name, at, (number,)) for name, at in producers]

    def _conv(self, node: onnx.NodeProto) -> bool:
        shape, layout = self._own(node.input[1]), self.layouts.get(node.input[0])
        bias = node.input[2] if len(node.input) > 2 else ""
        group = attribute(node, "group", 1)
        if shape is None or (bias and self._own(bias) != shape[:1]):
            return False
        producers = [(node.input[1], 0), *([(bias, 0)] if bias else [])]
        if group == 1:
            if layout is not None:
                if layout.axis != 1 or self._width(layout) != shape[1]:
                    return False
                self.channels.axes.append(ChannelAxis(node.input[1], 1, layout.classes, reduces=True))
            self._begin(node.output[0], 1, shape[0], producers)
            return True
        if layout is None or layout.axis != 1 or not group == shape[0] == self._width(layout) or shape[1] != 1:
            return False
        self.layouts[node.output[0]] = layout
        self.channels.axes += [ChannelAxis(name, at, layout.classes) for name, at in producers]
        return True

    def _product(self, node: onnx.NodeProto) -> bool:
        shape, layout = self._own(node.input[1]), self.layouts.get(node.input[0])
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        own = self._own(bias) if bias else ()
        rank = self._rank(node.input[0])
        if shape is None or len(shape) != 2 or own is None or rank < 2 or attribute(node, "transA", 0):
            return False
        reduces, answers = (1, 0) if node.op_type == "Gemm" and attribute(node, "transB", 0) else (0, 1)
        if own and own[-1] not in (1, shape[answers]):
            return False
        if layout is not None:
            if layout.axis != rank - 1 or self._width(layout) != shape[reduces]:
                return False
            self.channels.axes.append(ChannelAxis(node.input[1], reduces, layout.classes, reduces=True))
        producers = [(node.input[1], answers)]
        if own and own[-1] > 1:
            producers.append((bias, len(own) - 1))
        self._begin(node.output[0], rank - 1, shape[answers], producers)
        return True

    def _width(self, layout: _Layout) -> int:
        return sum(self.channels.sizes[number] for number in layout.classes)

    def _constants(self, node: onnx.NodeProto, names: Sequence[str], layout: _Layout) -> bool:
        """Permute vectors, one number a channel, with the channels."""
        shapes = [self._own(name) for name in names if name]
        if any(shape != (self._width(layout),) for shape in shapes) or len([n for n in node.output if n]) != 1:
            return False
        self.channels.axes += [ChannelAxis(name, 0, layout.classes) for name in names if name]
        self.layouts[node.output[0]] = layout
        return True

    def _elementwise(self, node: onnx.NodeProto) -> bool:
        """Join the layouts of all inputs, counted from the last axis. Constants are permuted along."""
        rank = self._rank(node.output[0])
        found = [(self.layouts[name], self._rank(name)) for name in node.input if name in self.layouts]
        if not found:
            return True
        if rank < 0 or any(own < 0 for _, own in found):
            return False
        places = {layout.axis - own for layout, own in found}
        chosen = found[0][0]
        width, place = self._width(chosen), found[0][0].axis - found[0][1]
        if len(places) != 1 or any(self._sizes(layout) != self._sizes(chosen) for layout, _ in found):
            return False
        moved = []
        for name in node.input:
            if name in self.layouts:
                continue
            shape = self.shapes.get(name) if name not in self.draft.weights else self.draft.weights[name].shape
            if shape is None:
                return False
            size = shape[place] if -place <= len(shape) else 1
            if size == 1:
                continue
            if size != width or self._own(name) is None:
                return False
            moved.append(ChannelAxis(name, len(shape) + place, chosen.classes))
        for layout, _ in found[1:]:
            for one, other in zip(chosen.classes, layout.classes, strict=True):
                self.channels.join(one, other)
        self.channels.axes += moved
        self.layouts[node.output[0]] = _Layout(rank + place, chosen.classes)
        return True

    def _sizes(self, layout: _Layout) -> list[int]:
        return [self.channels.sizes[number] for number in layout.classes]

    def _concat(self, node: onnx.NodeProto) -> bool:
        found = [self.layouts.get(name) for name in node.input]
        rank, first = self._rank(node.input[0]), next((layout for layout in found if layout is not None), None)
        if first is None:
            return True
        axis = attribute(node, "axis") % rank if rank > 0 else -1
        if axis != first.axis or any(layout is not None and layout.axis != axis for layout in found):
            return False
        classes: list[int] = []
        for name, layout in zip(node.input, found, strict=True):
            if layout is not None:
                classes += layout.classes
                continue
            shape = self.shapes.get(name)
            if shape is None or shape[axis] <= 0:
                return False
            classes.append(self.channels.new(shape[axis]))
            self.channels.pin(classes[-1])
        self.layouts[node.output[0]] = _Layout(axis, tuple(classes))
        return True

    def _reduce(self, node: onnx.NodeProto, layout: _Layout) -> bool:
        """Reduced channels are one number regardless of their order. A reduction of other axes keeps them."""
        rank, axes = self._rank(node.input[0]), attribute(node, "axes")
        if axes is None and len(node.input) > 1 and node.input[1] in self.draft.weights:
            axes = self.draft.weights[node.input[1]].load().reshape(-1).tolist()
        if rank < 0 or axes is None:
            return False
        reduced = {int(axis) % rank for axis in axes}
        if layout.axis in reduced:
            return True  # no layout left: the order has no effect
        gone = 0 if attribute(node, "keepdims", 1) else sum(axis < layout.axis for axis in reduced)
        return self._kept(node, _Layout(layout.axis - gone, layout.classes), True)

    def _reshape(self, node: onnx.NodeProto, layout: _Layout) -> bool:
        """Find the channel axis again: all axes before it stay, or all behind it stay or are of size 1."""
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        if before is None or after is None:
            return False
        width, at = self._width(layout), layout.axis
        starts_equal = before[:at] == after[:at] and (node.op_type != "Reshape" or self._copies(node, before, at))
        if starts_equal and len(after) > at and after[at] == width:
            return self._kept(node, layout, True)
        if after and after[-1] == width and all(size == 1 for size in before[at + 1 :]):
            return self._kept(node, _Layout(len(after) - 1, layout.classes), True)
        return False

    def _copies(self, node: onnx.NodeProto, before: Sequence[int], count: int) -> bool:
        """Return whether a Reshape keeps the first axes, dynamic ones included."""
        weight = self.draft.weights.get(node.input[1])
        wanted = [-1] * count if weight is None else weight.load().reshape(-1).tolist()[:count]
        zero_copies = not attribute(node, "allowzero", 0)
        return all(size > 0 or (zero_copies and want == 0) for size, want in zip(before, wanted, strict=False))
