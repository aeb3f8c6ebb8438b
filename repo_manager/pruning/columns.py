"""From a node's inputs and outputs to columns: one row of numbers for each product a weight takes part in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.onnx_model.draft import attribute

__all__ = ["ConvColumns", "MatrixColumns"]

Array = NDArray[Any]


@dataclass(frozen=True)
class MatrixColumns:
    """Of MatMul and Gemm.

    Attributes:
        value: name of the operand the weight is multiplied with.
        output: name of the node's output, the bias of Gemm included.
        reduction: axis of `value` summed over, from the end.
        channel: axis of `output` of the weight's outputs, from the end.
    """

    value: str
    output: str
    reduction: int
    channel: int

    def of(self, value: Array, output: Array, limit: int, random: np.random.Generator) -> tuple[Array, Array]:
        """Return inputs `[P, K]` and outputs `[P, N]`, float32, of at most `limit` products, drawn by `random`.

        Args:
            value: values of the other operand. A vector is one row.
            output: values of the node's output on the same sample.
            limit: most rows to take. With more, so many are drawn. With fewer, all are taken.
            random: generator for the choice of rows.
        """
        reduction = -1 if value.ndim == 1 else self.reduction
        inputs = np.moveaxis(value, reduction, -1).reshape(-1, value.shape[reduction])
        channel = -1 if value.ndim == 1 else self.channel
        outputs = np.moveaxis(output, channel, -1).reshape(-1, output.shape[channel])
        chosen = _drawn(len(inputs), limit, random)
        return inputs[chosen].astype(np.float32), outputs[chosen].astype(np.float32)


@dataclass(frozen=True)
class ConvColumns:
    """Of a convolution of any rank: im2col.

    Attributes:
        value: the input's name, `[B, C, spatial...]`.
        output: the output's name, `[B, N, spatial...]`.
        kernel: spatial sizes of the kernel.
        strides: step of the kernel, one per spatial axis.
        dilations: distance between the kernel's places, one per spatial axis. 1: no gap.
        pads: `[begin..., end...]`. Unused unless `auto_pad` is `NOTSET`.
        auto_pad: `NOTSET`, `VALID`, `SAME_UPPER` or `SAME_LOWER`.
    """

    value: str
    output: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str

    @classmethod
    def at(cls, node: onnx.NodeProto, kernel: Sequence[int]) -> ConvColumns:
        """Read a Conv node's attributes."""
        rank = len(kernel)
        auto_pad = attribute(node, "auto_pad", b"NOTSET")
        return cls(
            value=node.input[0],
            output=node.output[0],
            kernel=tuple(kernel),
            strides=tuple(attribute(node, "strides", [1] * rank)),
            dilations=tuple(attribute(node, "dilations", [1] * rank)),
            pads=tuple(attribute(node, "pads", [0] * 2 * rank)),
            auto_pad=auto_pad.decode() if isinstance(auto_pad, bytes) else str(auto_pad),
        )

    def of(self, value: Array, output: Array, limit: int, random: np.random.Generator) -> tuple[Array, Array]:
        """Return inputs `[P, K]` and outputs `[P, N]` of at most `limit` places. K in the order kernel, channel.

        Args:
            value: input of the convolution, `[N, C, ...]`.
            output: output of the convolution, `[N, K, ...]`.
            limit: most output places to take, counted over the whole batch.
            random: generator for the choice of places.
        """
        batch, channels = value.shape[:2]
        places = output.shape[2:]
        chosen = _drawn(batch * math.prod(places), limit, random)
        sample, *position = np.unravel_index(chosen, (batch, *places))
        before = self._pads_before(value.shape[2:], places)
        reach = [
            stride * (count - 1) + dilation * (size - 1) + 1
            for stride, count, dilation, size in zip(self.strides, places, self.dilations, self.kernel, strict=True)
        ]
        # Channels last: each position of the kernel is then contiguous in memory.
        padded = np.zeros((batch, *(max(0, r) for r in reach), channels), np.float32)
        source = np.moveaxis(value, 1, -1)
        ends = [max(b, min(r, b + n)) for b, r, n in zip(before, reach, value.shape[2:], strict=True)]
        target = (slice(None), *(slice(b, end) for b, end in zip(before, ends, strict=True)))
        inside = (slice(None), *(slice(0, end - b) for b, end in zip(before, ends, strict=True)))
        padded[target] = source[inside]
        flat = padded.reshape(-1, channels)
        steps = [math.prod(reach[axis + 1 :]) for axis in range(len(reach))]
        base = sample * math.prod(reach)
        for place, stride, step in zip(position, self.strides, steps, strict=True):
            base = base + place * stride * step
        offsets = np.zeros(1, np.int64)
        for size, dilation, step in zip(self.kernel, self.dilations, steps, strict=True):
            offsets = (offsets[:, None] + np.arange(size) * dilation * step).reshape(-1)
        inputs = flat[base[:, None] + offsets].reshape(len(chosen), -1)
        outputs = np.moveaxis(output, 1, -1).reshape(-1, output.shape[1])[chosen]
        return inputs, outputs.astype(np.float32)

    def _pads_before(self, sizes: Sequence[int], places: Sequence[int]) -> list[int]:
        if self.auto_pad in ("NOTSET", "VALID"):
            return list(self.pads[: len(self.kernel)]) if self.auto_pad == "NOTSET" else [0] * len(self.kernel)
        before = []
        for size, count, stride, dilation, kernel in zip(
            sizes, places, self.strides, self.dilations, self.kernel, strict=True
        ):
            total = max(0, (count - 1) * stride + dilation * (kernel - 1) + 1 - size)
            before.append(total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2)
        return before


def _drawn(count: int, limit: int, random: np.random.Generator) -> Array:
    """Return the numbers of the products taken of `count`, in order."""
    if count <= limit:
        return np.arange(count)
    return np.sort(random.choice(count, limit, replace=False))
