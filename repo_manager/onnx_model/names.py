"""Check the names and versions that a model states, before anything relies on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from repo_manager.errors import ModelError
from repo_manager.onnx_model.walk import graphs_of, nodes_of, tensors_of
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["check_names", "check_opsets"]

_STANDARD_DOMAINS = ("", "ai.onnx")


def check_opsets(proto: onnx.ModelProto) -> None:
    """Check that the installed onnx knows the model's version of the standard operators.

    Raises:
        ModelError: none imported though standard operators are used, below 1, or newer than known.
    """
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in _STANDARD_DOMAINS and not 1 <= entry.version <= newest:
            raise ModelError(
                f"opset {entry.version} is not known; onnx {onnx.__version__} knows 1 to {newest}",
                hint="Upgrade onnx and onnxruntime, or export the model for an older opset.",
            )


def check_names(proto: onnx.ModelProto) -> None:
    """Check that names are UTF-8: protobuf hands others out as bytes, and no runtime finds them.

    Raises:
        ModelError: with the bytes found.
    """
    for name in _names(proto):
        if isinstance(name, bytes):
            raise ModelError(f"a name in the graph is not UTF-8 text: {name[:40]!r}")


def _names(proto: onnx.ModelProto) -> Iterator[object]:
    for opset in proto.opset_import:
        yield opset.domain
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from (entry.domain for entry in function.opset_import)
        yield from (attribute.name for attribute in function.attribute_proto)
    for node in nodes_of(proto):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield attribute.ref_attr_name
    for tensor in tensors_of(proto):
        yield tensor.name
        for entry in tensor.external_data:
            yield entry.key
            yield entry.value
    roots = [proto.graph, *(g for t in proto.training_info for g in (t.initialization, t.algorithm))]
    for root in roots:
        for graph in graphs_of(root):
            yield graph.name
            yield from _value_names(graph.input)
            yield from _value_names(graph.output)
            yield from _value_names(graph.value_info)


def _value_names(values: Iterable[onnx.ValueInfoProto]) -> Iterator[object]:
    for value in values:
        yield value.name
        if value.type.WhichOneof("value") == "tensor_type":
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    yield dim.dim_param
