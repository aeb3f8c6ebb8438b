"""Visit every graph, node and tensor of a model, wherever it hides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["graphs_of", "node_graphs", "nodes_of", "tensors_of"]


def node_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies a node holds directly (If, Loop, Scan, SequenceMap, ...)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every body nested in it, outermost first."""
    stack = [graph]
    while stack:
        current = stack.pop()
        yield current
        for node in current.node:
            if node.attribute:
                stack.extend(node_graphs(node))


def _roots(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for training in proto.training_info:
        yield training.initialization
        yield training.algorithm


def nodes_of(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the main graph, of nested bodies, of training graphs and of local functions."""
    for root in _roots(proto):
        for graph in graphs_of(root):
            yield from graph.node
    for function in proto.functions:
        for node in function.node:
            yield node
            for body in node_graphs(node):
                for graph in graphs_of(body):
                    yield from graph.node


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor: initializers, sparse ones' parts, and those in attributes, at every depth."""
    graphs = [graph for root in _roots(proto) for graph in graphs_of(root)]
    for function in proto.functions:
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute)
        for node in function.node:
            for body in node_graphs(node):
                graphs.extend(graphs_of(body))
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for node in nodes_of(proto):
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield attribute.sparse_tensor.values
        yield attribute.sparse_tensor.indices
    for sparse in attribute.sparse_tensors:
        yield sparse.values
        yield sparse.indices
