"""Rules of operators with a sliding window or a new grid: convolutions, pooling, resizing, grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from repo_manager.onnx_model.batch_elements import by_rows
from repo_manager.onnx_model.batch_values import (
    SIZE,
    BatchCall,
    Marks,
    Rule,
    UnknownError,
    Value,
    loose,
    packed,
    reduced,
    total,
    with_marks,
)

__all__ = ["WINDOW_RULES"]


def _window(marks: Marks, axis: int, length: int, geometry: tuple[int, int, int, int], out: int) -> Marks:
    """Unite the marks under a sliding window. Geometry: kernel, stride, dilation, padding before."""
    if marks.shape[axis] == 1:
        return marks
    kernel, stride, dilation, before = geometry
    windows = []
    for position in range(out):
        at = [position * stride + step * dilation - before for step in range(kernel)]
        inside = [each for each in at if 0 <= each < length]
        shape = tuple(1 if each == axis else size for each, size in enumerate(marks.shape))
        part = np.zeros(shape, np.uint16)
        if inside:
            part = np.bitwise_or.reduce(marks.take(inside, axis), axis=axis, keepdims=True)
        windows.append(part)
    return packed(np.concatenate(windows, axis))


def _slide(call: BatchCall, value: Value, kernel: Sequence[int]) -> tuple[Marks, tuple[int, ...]]:
    """Slide a window over the axes from 2 on. Return marks and sizes of these axes."""
    spatial = len(kernel)
    strides = call.get("strides") or [1] * spatial
    dilations = call.get("dilations") or [1] * spatial
    pads = call.get("pads") or [0] * (2 * spatial)
    auto = call.get("auto_pad", "NOTSET")
    marks, sizes = value.marks, []
    for index in range(spatial):
        length, reach = value.dims[2 + index], dilations[index] * (kernel[index] - 1) + 1
        before, after = pads[index], pads[spatial + index]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-length // strides[index])
            missing = max(0, (out - 1) * strides[index] + reach - length)
            before = missing // 2 if auto == "SAME_UPPER" else missing - missing // 2
        else:
            if auto == "VALID":
                before = after = 0
            room = length + before + after - reach
            out = room // strides[index] + 1
            if call.get("ceil_mode", 0):
                out = -(-room // strides[index]) + 1
                out -= (out - 1) * strides[index] >= length + before
        if out < 1:
            raise UnknownError("the window is larger than the image")
        sizes.append(out)
        marks = _window(marks, 2 + index, length, (kernel[index], strides[index], dilations[index], before), out)
    return marks, tuple(sizes)


def _convolution(x: int, w: int, bias: int | None) -> Rule:
    def rule(call: BatchCall) -> list[Value]:
        value, weight = call.value(x), call.value(w)
        kernel = call.get("kernel_shape") or weight.dims[2:]
        group = call.get("group", 1)
        if value.dims[1] != weight.dims[1] * group:
            raise UnknownError("its weights have another number of channels")
        marks, sizes = _slide(call, value, kernel)
        outputs = weight.dims[0]
        marks = _by_group(marks, value.dims[1], group, outputs)
        of_weight: Marks = np.bitwise_or.reduce(weight.marks.reshape(weight.marks.shape[0], -1), axis=1)
        marks = marks | of_weight.reshape((1, -1) + (1,) * len(kernel))
        skipped = [x, w]
        offset = None if bias is None else call.optional(bias)
        if bias is not None and offset is not None:
            skipped.append(bias)
            marks = marks | offset.marks.reshape((1, -1) + (1,) * len(kernel))
        marks = marks | np.uint16(call.extra(without=skipped) if call.node.op_type != "FusedConv" else 0)
        if call.node.op_type == "FusedConv":
            for each in call.inputs[3:]:
                marks = marks if each is None else marks | each.marks
        return [Value((value.dims[0], outputs, *sizes), packed(marks))]

    return rule


def _by_group(marks: Marks, channels: int, group: int, outputs: int) -> Marks:
    """Unite the input channels of each group, and repeat the union for the group's outputs."""
    if marks.shape[1] == 1:
        return marks
    grouped = marks.reshape((marks.shape[0], group, channels // group, *marks.shape[2:]))
    united: Marks = np.bitwise_or.reduce(grouped, axis=2)
    return np.repeat(united, outputs // group, axis=1)


def _conv_transpose(call: BatchCall) -> list[Value]:
    value, weight = call.value(0), call.value(1)
    spatial = value.rank - 2
    group = call.get("group", 1)
    kernel = call.get("kernel_shape") or weight.dims[2:]
    strides = call.get("strides") or [1] * spatial
    dilations = call.get("dilations") or [1] * spatial
    pads = call.get("pads") or [0] * (2 * spatial)
    padding = call.get("output_padding") or [0] * spatial
    sizes = list(call.get("output_shape") or ())[-spatial:]
    if not sizes:
        for index in range(spatial):
            reach = dilations[index] * (kernel[index] - 1) + 1 + padding[index]
            size = strides[index] * (value.dims[2 + index] - 1) + reach
            same = call.get("auto_pad", "NOTSET").startswith("SAME")
            fixed = value.dims[2 + index] * strides[index]
            sizes.append(fixed if same else size - pads[index] - pads[spatial + index])
    marks: Marks = np.bitwise_or.reduce(value.marks, axis=tuple(range(2, value.rank)), keepdims=True)
    outputs = weight.dims[1] * group
    marks = _by_group(marks, value.dims[1], group, outputs) | np.uint16(call.extra(without=(0,)))
    return [Value((value.dims[0], outputs, *sizes), packed(marks))]


def _pool(call: BatchCall) -> list[Value]:
    value = call.value(0)
    marks, sizes = _slide(call, value, call.get("kernel_shape"))
    result = Value((*value.dims[:2], *sizes), marks | np.uint16(call.extra(without=(0,))))
    if len([name for name in call.node.output if name]) > 1:
        # MaxPool's second output holds indices into the whole tensor, including the batch axis.
        return [result, with_marks(result, SIZE)]
    return [result]


def _max_unpool(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if total(call.value(1)) & SIZE:
        raise UnknownError("its indices count through the batch")
    return [loose([value])]


def _global_pool(call: BatchCall) -> list[Value]:
    value = call.value(0)
    result = reduced(value, range(2, value.rank), keep=True)
    return [with_marks(result, call.extra(without=(0,)))]


def _resize(call: BatchCall) -> list[Value]:
    value = call.value(0)
    upsample = call.node.op_type == "Upsample"
    sizes = None if upsample or call.opset < 11 else call.optional(3)
    scales = call.optional(1 if upsample or call.opset < 11 else 2)
    axes = [axis % value.rank for axis in call.get("axes") or range(value.rank)]
    shape = list(value.dims)
    if sizes is not None and sizes.shape != (0,):
        wanted = call.ints(3) or ()
        if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise UnknownError("the sizes are bounds")
        for axis, size in zip(axes, wanted, strict=True):
            shape[axis] = size
    else:
        factors = call.get("scales") if scales is None else scales.numbers
        if factors is None:
            raise UnknownError("the scales are computed from data")
        for axis, factor in zip(axes, np.asarray(factors).reshape(-1), strict=True):
            shape[axis] = math.floor(value.dims[axis] * float(factor) + 1e-6)
    marks = value.marks
    for axis, size in enumerate(shape):
        if size != value.dims[axis] and value.varies(axis):
            marks = np.bitwise_or.reduce(marks, axis=axis, keepdims=True)
    return [Value(tuple(shape), packed(marks))]


def _grid_sample(call: BatchCall) -> list[Value]:
    value, grid = call.value(0), call.value(1)
    if value.dims[0] != grid.dims[0]:
        raise UnknownError("it has grids for another number of samples")
    return [by_rows(call, (value.dims[0], value.dims[1], *grid.dims[1:-1]))]


def _affine_grid(call: BatchCall) -> list[Value]:
    n, _, *sizes = call.ints(1) or ()
    return [by_rows(call, (n, *sizes, len(sizes)), inputs=[0])]


def _deform_conv(call: BatchCall) -> list[Value]:
    value, weight = call.value(0), call.value(1)
    _, sizes = _slide(call, Value(value.shape, np.zeros((1,) * value.rank, np.uint16)), weight.dims[2:])
    return [by_rows(call, (value.dims[0], weight.dims[0], *sizes), inputs=[0, 2, 4])]


WINDOW_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "AffineGrid": _affine_grid,
    "Conv": _convolution(0, 1, 2),
    "ConvInteger": _convolution(0, 1, None),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
    "FusedConv": _convolution(0, 1, 2),
    "GridSample": _grid_sample,
    "MaxUnpool": _max_unpool,
    "QLinearAveragePool": _pool,
    "QLinearConv": _convolution(0, 3, 8),
    "QLinearGlobalAveragePool": _global_pool,
}
