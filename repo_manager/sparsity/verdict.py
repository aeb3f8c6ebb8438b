"""Judge one use of a weight: can it be 2:4, is it, and the objections to a gain."""

from __future__ import annotations

import enum

import onnx

from repo_manager.sparsity.pattern import GROUP
from repo_manager.sparsity.scope import Scope
from repo_manager.sparsity.uses import Use

__all__ = [
    "ASP_IN_MULTIPLE",
    "ASP_OUT_MULTIPLE",
    "SMALL",
    "SparsityVerdict",
    "hints_of",
    "is_asp_eligible",
    "obstacle_of",
]

ASP_OUT_MULTIPLE, ASP_IN_MULTIPLE = 8, 16  # channels: NVIDIA apex, asp.py, `init_model_for_pruning`
SMALL = 256  # channels: above it, sparse kernels win (TensorRT#3849)
_QUANTISED = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2")
# Operators that a builder fuses after a convolution or matrix product, before the next quantisation.
_FUSED = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Gelu", "Mul", "Add",
          "BatchNormalization", "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}  # fmt: skip


class SparsityVerdict(str, enum.Enum):
    """Kind of a use of a weight, as far as the graph can tell. Sources: docs/sparsity.md."""

    VALID = "valid"
    NOT_24 = "not 2:4"
    INDIVISIBLE = "reduction size not divisible by 4"
    GROUPED = "group convolution"
    DYNAMIC = "dynamic weight"
    UNSUPPORTED = "not eligible"

    def __str__(self) -> str:
        return self.value


def obstacle_of(use: Use) -> tuple[SparsityVerdict, str] | None:
    """Return why the pattern cannot matter for a use, or `None` when its groups decide."""
    site, weight = use.site, use.weight
    if weight is None:
        return SparsityVerdict.DYNAMIC, "dynamic weight: it is computed at run time, the builder cannot see its zeros"
    if site.unsupported is not None:
        return SparsityVerdict.UNSUPPORTED, site.unsupported
    if weight.dtype.startswith(("complex", "bool")):
        return SparsityVerdict.UNSUPPORTED, f"{weight.dtype}: there are no sparse kernels for it"
    if site.axis is None or not -len(weight.shape) <= site.axis < len(weight.shape):
        return SparsityVerdict.UNSUPPORTED, f"a weight of shape {list(weight.shape)} has no reduction axis here"
    if weight.size == 0:
        return SparsityVerdict.UNSUPPORTED, "the weight has no values"
    if site.conv_groups > 1:
        return (
            SparsityVerdict.GROUPED,
            f"group convolution ({site.conv_groups} groups): never considered by TensorRT (TensorRT#4054)",
        )
    size = weight.shape[site.axis]
    if size % GROUP:
        return SparsityVerdict.INDIVISIBLE, f"reduction size {size} not divisible by {GROUP}"
    return None


def sizes_of(use: Use) -> tuple[int | None, int | None]:
    """Return (C, K): the sizes of the reduction and the output axis of a use, where it has them."""
    weight, site = use.weight, use.site
    if weight is None:
        return None, None

    def size(axis: int | None) -> int | None:
        return weight.shape[axis] if axis is not None and -len(weight.shape) <= axis < len(weight.shape) else None

    return size(site.axis), size(site.output_axis)


def is_asp_eligible(use: Use) -> bool:
    """Return whether NVIDIA ASP would prune this weight by default: outputs divide by 8, inputs by 16.

    ASP knows linear layers and convolutions, not transposed convolutions or recurrent layers. It has no rule against
    group convolutions. They are left out here because TensorRT never runs one sparse (TensorRT#4054).
    """
    if obstacle_of(use) is not None or "ConvTranspose" in use.node.op_type or "DeformConv" in use.node.op_type:
        return False
    reduction, outputs = sizes_of(use)
    return bool(reduction and outputs and reduction % ASP_IN_MULTIPLE == 0 and outputs % ASP_OUT_MULTIPLE == 0)


def hints_of(use: Use) -> tuple[str, ...]:
    """Return the possible obstacles to a faster run of a 2:4 weight. None of it is certain."""
    weight, op = use.weight, use.node.op_type
    if weight is None or obstacle_of(use) is not None:
        return ()
    hints = []
    reduction, outputs = sizes_of(use)
    small = [f"{name} = {size}" for name, size in (("C", reduction), ("K", outputs)) if size and size < SMALL]
    if small:
        hints.append(f"small: {', '.join(small)} below {SMALL}, seldom faster (TensorRT#3849)")
    if op == "ConvTranspose":
        hints.append("transposed convolution: TensorRT's documentation names convolution and fully connected only")
    if op == "DeformConv":
        hints.append("deformable convolution: TensorRT runs it as a plugin, without sparse kernels")
    if "MatMul" in op or "Gemm" in op or op == "Einsum":
        hints.append("matrix product: eligible in some TensorRT versions and types only (TensorRT#2169, #2271)")
    if use.site.input == 0:
        hints.append("the weight is the left operand: the builder may not take it as a weight")
    if weight.dtype == "float64":
        hints.append("float64: there are no sparse kernels for it; convert to FP16 or INT8")
    if weight.dtype in _QUANTISED:
        hints.extend(_quantisation_hints(use))
    return tuple(hints)


def _quantisation_hints(use: Use) -> list[str]:
    op = use.node.op_type
    if op.endswith(("Integer", "IntegerToFloat")):
        return ["INT8 output not quantised: this operator gives 32-bit integers, seldom sparse"]
    if op.startswith("QLinear"):
        return []
    hints = []
    other = use.node.input[0 if use.site.input else 1]
    if not _is_dequantised(other, use.scope):
        hints.append("weight-only quantisation: the activation is not quantised, so this runs in floating point")
    elif not _is_requantised(use.node, use.scope):
        hints.append("INT8 output not quantised: a sparse kernel is mostly chosen when the output stays INT8")
    return hints


def _is_dequantised(name: str, scope: Scope) -> bool:
    home = scope.home_of(name)
    node = None if home is None else home[0].producers.get(home[1])
    return node is not None and node.op_type == "DequantizeLinear"


def _is_requantised(node: onnx.NodeProto, scope: Scope) -> bool:
    """Return whether every way out of a node meets a QuantizeLinear, behind operators fused at most."""
    frontier, seen = [node], set()
    while frontier:
        name = next(iter(frontier.pop().output), "")
        if name in seen:
            continue
        seen.add(name)
        consumers = scope.consumers.get(name, ())
        if name in scope.outputs or not consumers:
            return False
        for consumer in consumers:
            if consumer.op_type == "QuantizeLinear":
                continue
            if consumer.op_type not in _FUSED or len(seen) > 16:
                return False
            frontier.append(consumer)
    return True
