"""Fold BatchNormalization into the convolution or Gemm before it, and make the remaining ones safe for FP16.

A trained BatchNormalization is y = x * s + b with s = scale / sqrt(variance + epsilon) and b = bias - mean * s (Ioffe
and Szegedy 2015, algorithm 2, step 11). Computed in float64 here. Any other gets mean 0 and variance + epsilon = 1: its
own variance may exceed 65504, FP16's largest number, and then every result would be 0. Its epsilon stays at ONNX's
default of 1e-5.
"""

from __future__ import annotations

import numpy as np
import onnx

from repo_manager.onnx_model.draft import (
    ONNX_DOMAINS,
    Array,
    Draft,
    Weight,
    attribute,
    captured_names,
    replace_nodes,
    unique_name,
    used_names,
    weight_of_array,
)

__all__ = ["fold_batchnorm"]

_EPSILON = 1e-5  # BatchNormalization's default


def fold_batchnorm(draft: Draft) -> Draft:
    """Fold each BatchNormalization with constant parameters.

    Requires: nodes in topological order. Ensures: same results up to rounding. A node keeps its name and the last node
    of a folded pair keeps its output's name. Weights in other types than float32 stay as they are.
    """
    draft = draft.copy()
    readers = _reader_counts(draft.graph)
    producer = {name: node for node in draft.graph.node for name in node.output if name}
    names = draft.names()
    dropped: set[int] = set()
    for index, node in enumerate(draft.graph.node):
        terms = _scale_and_shift(draft, node)
        if terms is None:
            continue
        before = producer.get(node.input[0])
        if before is not None and readers.get(node.input[0]) == 1 and _fold_into(draft, before, terms, names):
            before.output[0] = node.output[0]
            producer[node.output[0]] = before
            dropped.add(index)
        else:
            _normalise(draft, node, terms, names)
    replace_nodes(draft.graph, [node for index, node in enumerate(draft.graph.node) if index not in dropped])
    used = used_names(draft.graph)
    return Draft(draft.proto, {name: weight for name, weight in draft.weights.items() if name in used})


def _reader_counts(graph: onnx.GraphProto) -> dict[str, int]:
    counts = {value.name: 1 for value in graph.output}
    for node in graph.node:
        for name in (*node.input, *captured_names(node)):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _scale_and_shift(draft: Draft, node: onnx.NodeProto) -> tuple[Array, Array] | None:
    """Return s and b (float64, [C]) of an inference-mode BatchNormalization with constant parameters, else `None`."""
    if node.op_type != "BatchNormalization" or node.domain not in ONNX_DOMAINS or len(node.input) != 5:
        return None
    if attribute(node, "training_mode", 0) or sum(1 for name in node.output if name) != 1:
        return None
    if attribute(node, "spatial", 1) != 1:
        return None
    weights = [draft.weights.get(name) for name in node.input[1:]]
    if any(w is None or w.data_type != onnx.TensorProto.FLOAT or len(w.shape) != 1 for w in weights):
        return None
    scale, bias, mean, variance = (w.load().astype(np.float64) for w in weights if w is not None)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", _EPSILON))
        shift = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return None
    return factor, shift


def _fold_into(draft: Draft, node: onnx.NodeProto, terms: tuple[Array, Array], names: set[str]) -> bool:
    """Multiply a node's weight by s along its output channels and put b into its bias. Return whether it was
    possible.
    """
    if node.domain not in ONNX_DOMAINS or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    weight = draft.weights.get(node.input[1])
    bias = draft.weights.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return False
    if len(node.input) > 2 and node.input[2] and (bias is None or bias.data_type != onnx.TensorProto.FLOAT):
        return False
    factor, shift = terms
    channels = len(factor)
    spread = _channel_shape(node, weight, channels)
    if spread is None or (bias is not None and bias.shape not in ((channels,), (1, channels), (1,), ())):
        return False
    beta = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    if beta != 1.0 and (beta == 0.0 or bias is None):
        return False
    old = np.zeros(channels) if bias is None else np.broadcast_to(bias.load().astype(np.float64).reshape(-1), channels)
    new_bias = (old * factor + shift / beta).astype(np.float32)
    weight_name = unique_name(node.input[1] + "_folded", names)
    bias_name = unique_name((node.input[2] if bias is not None else node.name + "_bias") + "_folded", names)
    draft.weights[weight_name] = _scaled(weight, factor, spread)
    draft.weights[bias_name] = weight_of_array(new_bias)
    del node.input[1:]
    node.input.extend([weight_name, bias_name])
    return True


def _scaled(weight: Weight, factor: Array, spread: tuple[int, ...]) -> Weight:
    load = weight.load
    single = factor.astype(np.float32)
    exact = bool(np.all(np.abs(single) >= np.finfo(np.float32).tiny) and np.isfinite(single).all())
    columns = (single if exact else factor).reshape(spread)

    def scaled() -> Array:
        return np.asarray(load() * columns, np.float32)

    return Weight(weight.data_type, weight.shape, scaled)


def _channel_shape(node: onnx.NodeProto, weight: Weight, channels: int) -> tuple[int, ...] | None:
    """Return the shape by which [C] values spread over the weight's output channels, or `None` if they do not."""
    axis = 0
    if node.op_type == "ConvTranspose":
        if attribute(node, "group", 1) != 1:
            return None
        axis = 1
    elif node.op_type == "Gemm":
        axis = 0 if attribute(node, "transB", 0) else 1
    if len(weight.shape) <= axis or weight.shape[axis] != channels:
        return None
    return tuple(channels if a == axis else 1 for a in range(len(weight.shape)))


def _normalise(draft: Draft, node: onnx.NodeProto, terms: tuple[Array, Array], names: set[str]) -> None:
    """Rewrite a remaining BatchNormalization to x * s + b, in its own form: mean 0, variance + epsilon 1."""
    factor, shift = terms
    variance = np.full_like(factor, 1.0 - _EPSILON)
    parts = {"scale": factor, "shift": shift, "mean": np.zeros_like(factor), "variance": variance}
    with np.errstate(over="ignore"):
        values = {suffix: array.astype(np.float32) for suffix, array in parts.items()}
    if not all(np.isfinite(array).all() for array in values.values()):
        return
    del node.input[1:]
    for suffix, array in values.items():
        name = unique_name(f"{node.name}_{suffix}", names)
        draft.weights[name] = weight_of_array(array)
        node.input.append(name)
    kept = [item for item in node.attribute if item.name != "epsilon"]
    del node.attribute[:]
    node.attribute.extend(kept)
