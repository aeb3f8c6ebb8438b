"""Sort nodes topologically, as ONNX asks. float16 tools write unsorted graphs (onnxconverter-common#208)."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ModelError
from repo_manager.onnx_model.walk import node_graphs
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["sort_nodes"]

_SHOWN_NODES = 6


def sort_nodes(proto: onnx.ModelProto) -> bool:
    """Put every node behind those whose results it reads, in place: graphs, bodies, functions, training graphs.

    The order stays as it is where the edges leave it free. A body's node may read names from outside. The node with
    the body then comes after their producers.

    Returns:
        Whether anything moved.

    Raises:
        ModelError: nodes wait for each other. The message names them.
    """
    roots = [proto.graph, *(g for t in proto.training_info for g in (t.initialization, t.algorithm))]
    moved = [_sort_graph(graph)[0] for graph in roots]
    moved += [_sort_list(f.node, f.input, f"function '{f.name}'")[0] for f in proto.functions]
    return any(moved)


def _sort_graph(graph: onnx.GraphProto) -> tuple[bool, set[str]]:
    """Sort a graph and its bodies. Return whether anything moved, and the names it reads from outside."""
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    given |= {sparse.values.name for sparse in graph.sparse_initializer}
    moved, free = _sort_list(graph.node, given, f"graph '{graph.name}'")
    made = {name for node in graph.node for name in node.output}
    return moved, free | ({value.name for value in graph.output} - made - given)


def _sort_list(nodes: Any, given: Iterable[str], where: str) -> tuple[bool, set[str]]:
    """As `_sort_graph`, for a repeated field of nodes and the names present before the first one runs."""
    known = set(given)
    moved = False
    reads: list[set[str]] = []
    for node in nodes:
        names = set(node.input)
        for body in node_graphs(node) if node.attribute else ():
            body_moved, free = _sort_graph(body)
            moved |= body_moved
            names |= free
        reads.append(names)
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and name not in known:
                producer.setdefault(name, index)
    sources = [{producer[name] for name in names if name in producer} for names in reads]
    if any(source >= index for index, found in enumerate(sources) for source in found):
        order = _order(sources, nodes, where)
        copies = [onnx.NodeProto() for _ in order]
        for copy, index in zip(copies, order, strict=True):
            copy.CopyFrom(nodes[index])
        del nodes[:]
        nodes.extend(copies)
        moved = True
    free = set().union(*reads) - known - producer.keys() - {""}
    return moved, free


def _order(sources: Sequence[Collection[int]], nodes: Sequence[onnx.NodeProto], where: str) -> list[int]:
    """Return the indexes in topological order. Of the ready nodes the first one comes first."""
    readers: dict[int, list[int]] = {}
    waits = {}
    for index, found in enumerate(sources):
        waits[index] = len(found)
        for source in found:
            readers.setdefault(source, []).append(index)
    ready = [index for index, count in waits.items() if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        del waits[index]
        for reader in readers.get(index, ()):
            waits[reader] -= 1
            if waits[reader] == 0:
                heapq.heappush(ready, reader)
    if waits:
        raise _cycle(waits, sources, nodes, where)
    return order


def _cycle(
    waiting: Mapping[int, int], sources: Sequence[Collection[int]], nodes: Sequence[onnx.NodeProto], where: str
) -> ModelError:
    """Walk backwards from a never ready node until a node comes again."""
    path = [next(iter(waiting))]
    while path[-1] not in path[:-1]:
        path.append(min(source for source in sources[path[-1]] if source in waiting))
    cycle = path[path.index(path[-1]) :][::-1]
    names = [f"'{node.name or next(iter(node.output), '')}' ({node.op_type})" for node in (nodes[i] for i in cycle)]
    shown = names if len(names) <= _SHOWN_NODES else [*names[: _SHOWN_NODES - 1], "...", names[-1]]
    return ModelError(
        f"{where} has a cycle: {' -> '.join(shown)}: each node needs the result of the one before it",
        hint="No runtime can run it. Export the model again; a loop belongs into a Loop or Scan node.",
    )
