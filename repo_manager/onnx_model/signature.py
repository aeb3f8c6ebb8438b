"""Inputs and outputs of a model: names, element types and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repo_manager.errors import ModelError
from repo_manager.onnx_model.dtypes import dtype_name
from repo_manager.onnx_model.model import Model
from repo_manager.optional import deferred
from repo_manager.types import Dim, TensorSpec

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["Signature", "resolve_shape", "signature_of"]

_UNNAMED = {"", "?", "-1", "None"}
_ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs, and the versions it was written for.

    Attributes:
        inputs: in the graph's order, initializers listed as inputs (IR < 4) left out.
        outputs: one entry per output, in the graph's order.
        opset: of ONNX's own operators. 0 when the model uses none.
        ir_version: ONNX IR version of the file. Below 4, initializers are listed as inputs.
        opsets: every imported domain and its version. ONNX's own is `""`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    opsets: dict[str, int]


def signature_of(model: Model) -> Signature:
    """Return a model's signature.

    Raises:
        ModelError: an input or output other than a tensor (sequence, map, optional), or of an unknown type.
    """
    return signature_of_proto(model.graph_only, where=str(model.path))


def signature_of_proto(proto: onnx.ModelProto, *, where: str) -> Signature:
    """As `signature_of`, for a model in memory. `where` opens an error's message."""
    graph = proto.graph
    initialised = {tensor.name for tensor in graph.initializer}
    initialised |= {sparse.values.name for sparse in graph.sparse_initializer}
    opsets = {"" if entry.domain in _ONNX_DOMAINS else entry.domain: entry.version for entry in proto.opset_import}
    return Signature(
        inputs=_specs((value for value in graph.input if value.name not in initialised), "input", where),
        outputs=_specs(graph.output, "output", where),
        opset=opsets.get("", 0),
        ir_version=proto.ir_version,
        opsets=dict(sorted(opsets.items())),
    )


def _specs(values: Iterable[onnx.ValueInfoProto], role: str, where: str) -> tuple[TensorSpec, ...]:
    return tuple(spec_of(value, f"{where}: {role} '{value.name}'") for value in values)


def spec_of(value: onnx.ValueInfoProto, where: str) -> TensorSpec:
    """Return name, type and shape of one value.

    Raises:
        ModelError: it is not a tensor, or has no known element type.
    """
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        found = "no type" if kind is None else kind.removesuffix("_type").replace("_", " ")
        raise ModelError(
            f"{where} is not a tensor ({found})",
            hint="Triton carries tensors only. Export the model with tensor inputs and outputs.",
        )
    tensor = value.type.tensor_type
    shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorSpec(value.name, dtype_name(tensor.elem_type, where), shape)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return None if dim.dim_value < 0 else dim.dim_value
    return None if dim.dim_param in _UNNAMED else dim.dim_param


def resolve_shape(
    spec: TensorSpec, *, batch: int = 1, sizes: Mapping[str, int] | None = None, default: int = 1
) -> tuple[int, ...]:
    """Return a shape with every dimension fixed.

    Args:
        spec: the tensor. An unknown rank is taken as a scalar.
        batch: size of a dynamic first dimension missing in `sizes`.
        sizes: size per symbol, or per `"input:axis"`, with precedence over the symbol. `None`: usual sizes.
        default: size of every other dynamic dimension.

    Raises:
        ModelError: a size below 0, or a tensor too large to make.
    """
    sizes = sizes or {}
    shape = []
    for axis, dim in enumerate(spec.shape or ()):
        fallback = batch if axis == 0 else default
        size = sizes.get(f"{spec.name}:{axis}")
        if size is None:
            size = dim if isinstance(dim, int) else _symbol_size(dim, sizes, fallback, default)
        if size < 0:
            raise ModelError(f"'{spec.name}' axis {axis} cannot have size {size}")
        shape.append(size)
    if math.prod(shape) > _MAX_ELEMENTS:
        raise ModelError(f"'{spec.name}' would have {math.prod(shape)} elements: shape {shape} is too large to try")
    return tuple(shape)


def _symbol_size(symbol: str | None, sizes: Mapping[str, int], fallback: int, default: int) -> int:
    """Return the size of a symbol, or of a sum or product of symbols (`past_length + 1`)."""
    if symbol is None:
        return fallback
    if symbol in sizes:
        return sizes[symbol]
    if not _EXPRESSION.fullmatch(symbol):
        return fallback

    def term(text: str) -> int:
        return int(text) if text.isdecimal() else sizes.get(text, default)

    return sum(math.prod(term(factor.strip()) for factor in part.split("*")) for part in symbol.split("+"))


_EXPRESSION = re.compile(r"\w{1,80}(\s*[+*]\s*\w{1,80}){1,8}", re.ASCII)
_MAX_ELEMENTS = 1 << 27  # elements: half a gigabyte of float32; an 8K image has 100 million
