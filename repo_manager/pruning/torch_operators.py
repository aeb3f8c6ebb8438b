"""ONNX operators as PyTorch computes them, for the training of a graph. Each graph is compared before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx

from repo_manager.optional import deferred

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional
else:
    torch = deferred("torch")
    functional = deferred("torch.nn.functional")

__all__ = ["OPERATORS", "Tensor", "TorchCall"]

Tensor = Any
"""A `torch.Tensor`; `None` for an input a node leaves out."""


@dataclass(frozen=True)
class TorchCall:
    """One node: its attributes and the version of its operator set."""

    given: Mapping[str, Any]
    opset: int
    outputs: int

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute, or the default of its operator."""
        return self.given.get(name, default)

    def pads(self, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
        """Return the padding around the image, in the order of `torch.nn.functional.pad`: last axis first.

        Args:
            x: the image, `[B, C, spatial...]`.
            kernel: sizes of the window, one per spatial axis, gaps not counted.
            strides: steps of the window, one per spatial axis. Only `SAME_*` padding reads them.
            dilations: gaps between places of the window.
        """
        rank, kind = len(kernel), self.get("auto_pad", b"NOTSET")
        pads = list(self.get("pads", [0] * (2 * rank)))
        if kind in (b"SAME_UPPER", b"SAME_LOWER"):
            for axis in range(rank):
                size, reach = x.shape[2 + axis], dilations[axis] * (kernel[axis] - 1) + 1
                total = max(0, (math.ceil(size / strides[axis]) - 1) * strides[axis] + reach - size)
                small, large = total // 2, total - total // 2
                pads[axis], pads[rank + axis] = (small, large) if kind == b"SAME_UPPER" else (large, small)
        return [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]


def _ints(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1).tolist()]


def _axes(call: TorchCall, given: Tensor) -> list[int] | None:
    """Return the axes of an attribute, or of an input as newer versions have it."""
    if given is not None:
        return _ints(given)
    axes = call.get("axes", None)
    return None if axes is None else list(axes)


def _conv(call: TorchCall, x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    padded = functional.pad(x, call.pads(x, weight.shape[2:], strides, dilations))
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return run(padded, weight, bias, tuple(strides), 0, tuple(dilations), call.get("group", 1))


def _conv_transpose(call: TorchCall, x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
    rank = x.ndim - 2
    pads = call.get("pads", [0] * (2 * rank))
    run = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    whole = run(
        x,
        weight,
        bias,
        tuple(call.get("strides", [1] * rank)),
        0,
        tuple(call.get("output_padding", [0] * rank)),
        call.get("group", 1),
        tuple(call.get("dilations", [1] * rank)),
    )
    return functional.pad(whole, [-pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)])


def _gemm(call: TorchCall, a: Tensor, b: Tensor, c: Tensor = None) -> Tensor:
    product = (a.T if call.get("transA", 0) else a) @ (b.T if call.get("transB", 0) else b)
    product = call.get("alpha", 1.0) * product
    return product if c is None else product + call.get("beta", 1.0) * c


def _batch_normalization(
    call: TorchCall, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    if call.get("training_mode", 0):
        raise NotImplementedError("in training mode")
    shape = (1, -1, *(1,) * (x.ndim - 2))
    factor = scale / (variance + call.get("epsilon", 1e-5)).sqrt()
    return (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)


def _layer_normalization(call: TorchCall, x: Tensor, scale: Tensor, bias: Tensor = None) -> Tensor:
    shape = x.shape[call.get("axis", -1) :] if call.get("axis", -1) >= 0 else x.shape[x.ndim + call.get("axis", -1) :]
    normal = functional.layer_norm(x, shape, eps=call.get("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


def _instance_normalization(call: TorchCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, None, None, scale, bias, True, 0.0, call.get("epsilon", 1e-5))


def _pooled(call: TorchCall, x: Tensor, fill: float, run: Callable[..., Tensor]) -> Tensor:
    kernel = call.get("kernel_shape", [])
    strides, dilations = call.get("strides", [1] * len(kernel)), call.get("dilations", [1] * len(kernel))
    padded = functional.pad(x, call.pads(x, kernel, strides, dilations), value=fill)
    return run(padded, tuple(kernel), tuple(strides), tuple(dilations), bool(call.get("ceil_mode", 0)))


def _max_pool(call: TorchCall, x: Tensor) -> Tensor:
    run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.ndim - 3]
    return _pooled(call, x, -math.inf, lambda y, kernel, step, wide, ceil: run(y, kernel, step, 0, wide, ceil))


def _average_pool(call: TorchCall, x: Tensor) -> Tensor:
    run = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]

    def average(y: Tensor, kernel: Any, step: Any, wide: Any, ceil: bool) -> Tensor:
        if any(size != 1 for size in wide):
            raise NotImplementedError("dilations")
        return run(y, kernel, step, 0, ceil)

    found = _pooled(call, x, 0.0, average)
    return found if call.get("count_include_pad", 0) else found / _pooled(call, torch.ones_like(x), 0.0, average)


def _reduce(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(call: TorchCall, x: Tensor, given: Tensor = None) -> Tensor:
        axes = _axes(call, given)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        return run(x, axes, bool(call.get("keepdims", 1)))

    return reduced


def _softmax(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def normal(call: TorchCall, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return run(x, call.get("axis", -1))
        axis = call.get("axis", 1) % max(x.ndim, 1)
        return run(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)

    return normal


def _clip(call: TorchCall, x: Tensor, low: Tensor = None, high: Tensor = None) -> Tensor:
    low, high = call.get("min", low), call.get("max", high)
    x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))


def _reshape(call: TorchCall, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _ints(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: TorchCall, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    return x.reshape(math.prod(x.shape[: axis + x.ndim if axis < 0 else axis]), -1)


def _squeeze(call: TorchCall, x: Tensor, given: Tensor = None) -> Tensor:
    axes = _axes(call, given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(call: TorchCall, x: Tensor, given: Tensor = None) -> Tensor:
    axes = _axes(call, given) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(
    call: TorchCall, x: Tensor, starts: Tensor = None, ends: Tensor = None, axes: Tensor = None, steps: Tensor = None
) -> Tensor:
    first = list(call.get("starts", ())) if starts is None else _ints(starts)
    last = list(call.get("ends", ())) if ends is None else _ints(ends)
    places = list(range(len(first))) if _axes(call, axes) is None else _axes(call, axes) or []
    each = [1] * len(first) if steps is None else _ints(steps)
    for place, start, end, step in zip(places, first, last, each, strict=True):
        chosen = range(x.shape[place])[slice(start, end, step)]
        x = x.index_select(place, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _split(call: TorchCall, x: Tensor, given: Tensor = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    sizes = list(call.get("split", ())) if given is None else _ints(given)
    if not sizes:
        each = math.ceil(x.shape[axis] / call.outputs)
        return tuple(x.split(each, axis))
    return tuple(x.split(sizes, axis))


def _gather(call: TorchCall, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _pad(call: TorchCall, x: Tensor, given: Tensor = None, value: Tensor = None, axes: Tensor = None) -> Tensor:
    pads = list(call.get("pads", ())) if given is None else _ints(given)
    places = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in _ints(axes)]
    sides = dict(zip(places, zip(pads[: len(places)], pads[len(places) :], strict=True), strict=True))
    mode = call.get("mode", b"constant").decode()
    around = [size for axis in reversed(range(x.ndim)) for size in sides.get(axis, (0, 0))]
    if mode == "constant":
        return functional.pad(x, around, value=call.get("value", 0.0) if value is None else value.item())
    while len(around) > 2 and around[-2:] == [0, 0]:  # the other modes only pad inner axes
        around = around[:-2]
    return functional.pad(x, around, mode={"edge": "replicate", "reflect": "reflect"}[mode])


def _cast(call: TorchCall, x: Tensor) -> Tensor:
    kinds = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "BOOL": "bool"}
    name = onnx.TensorProto.DataType.Name(call.get("to", 1))
    return x.to(getattr(torch, kinds.get(name, name.lower())))


def _constant_of_shape(call: TorchCall, shape: Tensor) -> Tensor:
    value = call.given.get("value")
    if value is None:
        return torch.zeros(_ints(shape))
    filled = torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    return filled.expand(_ints(shape))


def _expand(call: TorchCall, x: Tensor, shape: Tensor) -> Tensor:
    return (
        x * torch.ones(_ints(shape), dtype=x.dtype) if x.dtype != torch.bool else x | torch.zeros(_ints(shape)).bool()
    )


def _where(call: TorchCall, condition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.where(condition, left, right)


def _divide(call: TorchCall, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _global(run: Callable[[Tensor, list[int]], Tensor]) -> Callable[..., Tensor]:
    return lambda call, x: run(x, list(range(2, x.ndim)))


def _nearest(call: TorchCall, x: Tensor, *given: Tensor) -> Tensor:
    """Resize by whole numbers, to the nearest original pixel."""
    sizes = _ints(given[2]) if len(given) > 2 and given[2] is not None else None
    scale = next((one for one in reversed(given[:2]) if one is not None and one.numel() == x.ndim), None)
    if sizes is None:
        scales = list(call.get("scales", ())) or ([] if scale is None else scale.tolist())
        sizes = [math.floor(size * factor + 1e-6) for size, factor in zip(x.shape, scales, strict=True)]
    if call.get("mode", b"nearest") != b"nearest" or any(new % old for new, old in zip(sizes, x.shape, strict=True)):
        raise NotImplementedError("other than nearest, by whole numbers")
    for axis, (new, old) in enumerate(zip(sizes, x.shape, strict=True)):
        x = x if new == old else x.repeat_interleave(new // old, axis)
    return x


def _plain(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda call, *inputs: run(*inputs)


def _prelu(call: TorchCall, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _fold(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def folded(call: TorchCall, *inputs: Tensor) -> Tensor:
        found = inputs[0]
        for one in inputs[1:]:
            found = run(found, one)
        return found

    return folded


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Abs": _plain(lambda x: x.abs()),
    "Add": _plain(lambda a, b: a + b),
    "And": _plain(lambda a, b: a & b),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Ceil": _plain(lambda x: x.ceil()),
    "Clip": _clip,
    "Concat": lambda call, *parts: torch.cat(parts, call.get("axis", 1)),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _plain(lambda x: x.cos()),
    "Div": _divide,
    "Dropout": lambda call, x, *_: x,
    "Elu": lambda call, x: functional.elu(x, call.get("alpha", 1.0)),
    "Equal": _plain(lambda a, b: a == b),
    "Erf": _plain(lambda x: x.erf()),
    "Exp": _plain(lambda x: x.exp()),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(lambda x: x.floor()),
    "Gather": _gather,
    "Gelu": lambda call, x: functional.gelu(x, approximate=call.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _global(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": _global(lambda x, axes: x.amax(axes, keepdim=True)),
    "Greater": _plain(lambda a, b: a > b),
    "HardSigmoid": lambda call, x: (call.get("alpha", 0.2) * x + call.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _plain(lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": lambda call, x: functional.leaky_relu(x, call.get("alpha", 0.01)),
    "Less": _plain(lambda a, b: a < b),
    "Log": _plain(lambda x: x.log()),
    "LogSoftmax": _softmax(lambda x, axis: x.log_softmax(axis)),
    "MatMul": _plain(lambda a, b: a @ b),
    "Max": _fold(lambda a, b: torch.maximum(a, b)),
    "MaxPool": _max_pool,
    "Min": _fold(lambda a, b: torch.minimum(a, b)),
    "Mish": _plain(lambda x: functional.mish(x)),
    "Mul": _plain(lambda a, b: a * b),
    "Neg": _plain(lambda x: -x),
    "Not": _plain(lambda x: ~x),
    "Or": _plain(lambda a, b: a | b),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _plain(lambda a, b: a.pow(b).to(a.dtype)),
    "Range": _plain(lambda start, end, step: torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)),
    "Reciprocal": _plain(lambda x: 1 / x),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "Relu": _plain(lambda x: x.relu()),
    "Reshape": _reshape,
    "Resize": _nearest,
    "Selu": _plain(lambda x: functional.selu(x)),
    "Shape": lambda call, x: torch.tensor(x.shape[call.get("start", 0) : call.get("end", None)], dtype=torch.int64),
    "Sigmoid": _plain(lambda x: x.sigmoid()),
    "Sign": _plain(lambda x: x.sign()),
    "Sin": _plain(lambda x: x.sin()),
    "Size": _plain(lambda x: torch.tensor(x.numel())),
    "Slice": _slice,
    "Softmax": _softmax(lambda x, axis: x.softmax(axis)),
    "Softplus": _plain(lambda x: functional.softplus(x)),
    "Split": _split,
    "Sqrt": _plain(lambda x: x.sqrt()),
    "Squeeze": _squeeze,
    "Sub": _plain(lambda a, b: a - b),
    "Sum": _fold(lambda a, b: a + b),
    "Tanh": _plain(lambda x: x.tanh()),
    "Tile": _plain(lambda x, repeats: x.repeat(_ints(repeats))),
    "Transpose": lambda call, x: x.permute(call.get("perm", list(reversed(range(x.ndim))))),
    "Unsqueeze": _unsqueeze,
    "Upsample": _nearest,
    "Where": _where,
}
"""Operator of ONNX's own set -> its function: `(call, *inputs) -> output or outputs`."""
