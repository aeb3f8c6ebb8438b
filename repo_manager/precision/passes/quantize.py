"""Insert explicit QuantizeLinear/DequantizeLinear pairs, and store weights as INT8.

Symmetric, zero point 0, so a zero weight stays zero and TensorRT takes it. Weights get one scale per output channel
and are in the file as INT8 with a DequantizeLinear; activations one scale; biases stay FP32. The INT8 range is
-127..127.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from repo_manager.onnx_model.draft import Array, Draft, Weight, replace_nodes, unique_name, weight_of_array
from repo_manager.onnx_model.source import without_unused
from repo_manager.precision.passes.quantize_plan import PASS_THROUGH, QuantizationPlan

__all__ = ["channel_scales", "quantize", "to_int8"]

_Stored = tuple[str, int | None]
"""A weight and the axis of its scales: uses with both in common share the stored values."""
_BIAS_STEPS = 2.0**30  # half of int32's range

INT8_MAX = 127
_RANGE_STEPS = 128
_SMALLEST_SCALE = 2.0**-100  # a scale must be positive, and x / scale must not overflow FP32


def quantize(draft: Draft, plan: QuantizationPlan, ranges: Mapping[str, float]) -> Draft:
    """Return the draft with Q/DQ pairs.

    Requires: opset 13 or later (scales per channel).

    Args:
        draft: the model behind the plan.
        plan: the values and weights to quantise.
        ranges: value -> largest absolute value to represent.
    """
    draft = draft.copy()
    names = draft.names()
    zero_point = unique_name("int8_zero_point", names)
    draft.weights[zero_point] = weight_of_array(np.zeros((), np.int8))
    scales = _activation_scales(draft, plan, ranges)
    floors = _scale_floors(draft, plan, scales)
    made: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    stored: dict[_Stored, str] = {}

    def pair(value: str) -> None:
        scale = unique_name(f"{value}_scale", names)
        draft.weights[scale] = weight_of_array(np.asarray(scales[value], np.float32))
        quantized, restored = unique_name(f"{value}_int8", names), unique_name(f"{value}_dequantized", names)
        nodes.append(_node("QuantizeLinear", [value, scale, zero_point], quantized, names))
        nodes.append(_node("DequantizeLinear", [quantized, scale, zero_point], restored, names))
        made[value] = restored

    produced = {name for node in draft.graph.node for name in node.output}
    for value in plan.values:
        if value not in produced:
            pair(value)
    for node in draft.graph.node:
        for index, name in enumerate(node.input):
            if name in made and node.name in plan.readers[name]:
                node.input[index] = made[name]
        how = plan.nodes.get(node.name)
        if how is not None:
            name = node.input[how.weight_index]
            key = (name, how.channel_axis)
            if key not in stored:
                stored[key] = _store_weight(draft, key, floors.get(key), names, nodes)
            node.input[how.weight_index] = stored[key]
        nodes.append(node)
        for name in node.output:
            if name in plan.readers:
                pair(name)
    replace_nodes(draft.graph, nodes)
    return without_unused(draft)


def _node(op_type: str, inputs: list[str], output: str, names: set[str]) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], name=unique_name(f"{op_type}:{output}", names))


def _activation_scales(draft: Draft, plan: QuantizationPlan, ranges: Mapping[str, float]) -> dict[str, float]:
    """Return value -> scale. A mere copy of another quantised value's numbers shares its scale."""
    producer = {name: node for node in draft.graph.node for name in node.output}
    scales: dict[str, float] = {}
    for value in plan.values:
        node = producer.get(value)
        if node is not None and node.op_type in PASS_THROUGH and node.name in plan.readers.get(node.input[0], ()):
            scales[value] = scales[node.input[0]]
        else:
            scales[value] = _coarse(ranges[value]) / INT8_MAX if ranges[value] > INT8_MAX * _SMALLEST_SCALE else 1.0
    return scales


def _coarse(largest: float) -> float:
    """Round a range up to 7 significant bits, by 0.6 % on average.

    Float kernels of different CPUs differ by about 1e-5. Scales made from them would make another file on each CPU,
    and with it another verdict: every rounding of every activation falls differently.
    """
    mantissa, exponent = math.frexp(largest)
    return math.ldexp(math.ceil(mantissa * _RANGE_STEPS), exponent) / _RANGE_STEPS


def _scale_floors(draft: Draft, plan: QuantizationPlan, scales: Mapping[str, float]) -> dict[_Stored, Array]:
    """Return, for weights whose operators add a bias, the smallest scale of each channel.

    ONNX Runtime stores the bias of a fused operator as int32 in units of (activation scale x weight scale). A channel
    of tiny weights and an ordinary bias overflows it (onnxruntime#25278). With a scale of at least
    |bias| / (activation scale * 2^30) it does not, and the weights that such a scale rounds off are negligible beside
    the bias.
    """
    adders = {name: node for node in draft.graph.node if node.op_type == "Add" for name in node.input}
    floors: dict[_Stored, Array] = {}
    for node in draft.graph.node:
        how = plan.nodes.get(node.name)
        bias = None if how is None else _bias(draft, node, adders)
        if how is None or bias is None:
            continue
        key = (node.input[how.weight_index], how.channel_axis)
        channels = 1 if how.channel_axis is None else draft.weights[key[0]].shape[how.channel_axis]
        needed = np.abs(bias.astype(np.float64)) / (scales[node.input[how.data_index]] * _BIAS_STEPS)
        if how.channel_axis is None:
            floor = needed.max(initial=0.0)
        elif bias.size in (1, channels):
            floor = np.broadcast_to(needed.reshape(-1), (channels,))
        else:
            continue  # a bias along another axis: ONNX Runtime does not fuse it
        floors[key] = np.maximum(floors.get(key, np.float64(0)), floor)
    return floors


def _bias(draft: Draft, node: onnx.NodeProto, adders: Mapping[str, onnx.NodeProto]) -> Array | None:
    """Return an operator's addend, as far as ONNX Runtime may fuse it: its own bias, or a constant added next."""
    candidates = list(node.input[2:3])
    adder = adders.get(node.output[0])
    if node.op_type == "MatMul" and adder is not None:
        candidates = [name for name in adder.input if name != node.output[0]]
    weight = next((draft.weights[name] for name in candidates if name in draft.weights), None)
    if weight is None or weight.data_type != TensorProto.FLOAT or weight.size != max((*weight.shape, 1)):
        return None
    return weight.load()


def _store_weight(draft: Draft, key: _Stored, floor: Array | None, names: set[str], nodes: list[onnx.NodeProto]) -> str:
    """Store a weight as INT8 with its scales. Return the name of its dequantised value."""
    name, axis = key
    weight = draft.weights[name]
    load = weight.load
    scale = channel_scales(load(), axis)
    if floor is not None:
        scale = np.maximum(scale, floor).astype(np.float32)
    scale_name = unique_name(f"{name}_scale", names)
    zero_name = unique_name(f"{name}_zero_point", names)
    int8_name = unique_name(f"{name}_int8", names)
    draft.weights[scale_name] = weight_of_array(scale)
    draft.weights[zero_name] = weight_of_array(np.zeros(scale.shape, np.int8))
    draft.weights[int8_name] = Weight(TensorProto.INT8, weight.shape, lambda: to_int8(load(), scale, axis))
    restored = unique_name(f"{name}_dequantized", names)
    node = _node("DequantizeLinear", [int8_name, scale_name, zero_name], restored, names)
    if axis is not None:
        node.attribute.append(onnx.helper.make_attribute("axis", axis))
    nodes.append(node)
    return restored


def channel_scales(values: Array, axis: int | None) -> Array:
    """Return max |w| / 127, per index of `axis` (`[C]`, float32), or for all values (`[]`) when `axis` is `None`.

    A channel of zeros gets scale 1: any does.
    """
    if axis is None:
        flat: tuple[int, ...] | None = None
    else:
        flat = tuple(other for other in range(values.ndim) if other != axis)
    if values.size == 0:
        return np.ones(() if axis is None else (values.shape[axis],), np.float32)
    largest = np.maximum(values.max(axis=flat), -values.min(axis=flat))
    scale = np.asarray(largest, np.float32) / np.float32(INT8_MAX)
    return np.where(scale > _SMALLEST_SCALE, scale, np.float32(1.0)).astype(np.float32)


def to_int8(values: Array, scale: Array, axis: int | None) -> Array:
    """Return round(w / scale), to nearest even as QuantizeLinear does, within -127..127.

    Args:
        values: the weights, float32. They are not changed.
        scale: scale, one number or one per channel.
        axis: axis of the channels. `None`: one scale for all.
    """
    shape = [-1 if other == axis else 1 for other in range(values.ndim)] if axis is not None else []
    scaled = values / scale.reshape(shape)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -INT8_MAX, INT8_MAX, out=scaled)
    return np.asarray(scaled.astype(np.int8))
