"""Find the variance in normalisations that are written out in small operators.

LayerNorm, RMSNorm and the like, exported as x * x -> mean -> + epsilon -> 1 / sqrt, overflow FP16 at |x| > 255
and lose a small epsilon; in the form mean(x^2) - mean(x)^2 they cancel. The operators are few and cheap: they
stay in FP32, as NVIDIA advises for LayerNorm (TensorRT developer guide, "Reduced precision").
"""

from __future__ import annotations

import onnx

from repo_manager.onnx_model.draft import Draft

__all__ = ["statistics_nodes"]

_SQUARES = {"ReduceSumSquare", "ReduceL2", "LpNormalization"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "GlobalAveragePool"}
_ON_THE_WAY = {"Add", "Clip", "Div", "Expand", "Identity", "Max", "Mul", "Reshape", "Squeeze", "Sub", "Unsqueeze"}
_ROOTS = {"Reciprocal", "Sqrt"}
_MOST_STEPS = 10


def statistics_nodes(draft: Draft) -> set[str]:
    """Return the names of the nodes between squares and the root of their mean, and of what is mixed in between.

    Squares whose mean never comes to a root are no normalisation; of these only square and mean are returned.
    """
    graph = _Graph(draft)
    found: set[str] = set()
    for node in draft.graph.node:
        for mean in graph.means_of_squares(node):
            found.update((node.name, mean.name))
            way = graph.way_to_root(mean)
            found.update(way)
            found.update(graph.mixed_in(way))
    return found


class _Graph:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.by_name = {node.name: node for node in draft.graph.node}
        self.producer = {name: node for node in draft.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in draft.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def means_of_squares(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the reductions of a node's squares; the node itself where it squares and sums."""
        if node.op_type in _SQUARES:
            return [node]
        squares = node.op_type == "Mul" and len(set(node.input)) == 1
        if node.op_type == "Pow" and len(node.input) > 1:
            exponent = self.draft.weights.get(node.input[1])
            squares = exponent is not None and exponent.size == 1 and float(exponent.load().reshape(-1)[0]) == 2.0
        return [r for r in self.readers.get(node.output[0], []) if r.op_type in _REDUCTIONS] if squares else []

    def way_to_root(self, mean: onnx.NodeProto) -> set[str]:
        """Return the nodes from a mean to 1 / sqrt, both ends of the way and its branches included."""
        found: set[str] = set()
        self._reaches_root(mean, 0, found)
        return found

    def _reaches_root(self, node: onnx.NodeProto, steps: int, found: set[str]) -> bool:
        reached = False
        for reader in self.readers.get(node.output[0], []):
            if reader.op_type in _ROOTS:
                found.add(reader.name)
                found.update(r.name for r in self.readers.get(reader.output[0], []) if r.op_type in _ROOTS)
                reached = True
            elif reader.op_type in _ON_THE_WAY and steps < _MOST_STEPS and self._reaches_root(reader, steps + 1, found):
                found.add(reader.name)
                reached = True
        return reached

    def mixed_in(self, way: set[str]) -> set[str]:
        """Return the nodes, back to a reduction, that make the other inputs of nodes on the way: mean(x)^2."""
        found: set[str] = set()
        stack = [(name, 0) for name in way]
        while stack:
            node_name, steps = stack.pop()
            for name in self.by_name[node_name].input:
                node = self.producer.get(name)
                if node is None or node.name in way or node.name in found or steps >= _MOST_STEPS:
                    continue
                if node.op_type in _REDUCTIONS:
                    found.add(node.name)
                elif node.op_type in _ON_THE_WAY and self._from_reduction(node):
                    found.add(node.name)
                    stack.append((node.name, steps + 1))
        return found

    def _from_reduction(self, node: onnx.NodeProto) -> bool:
        """Say whether every activation that a node reads comes from a reduction, through nodes on the way."""
        stack, seen = [node], {node.name}
        while stack:
            for name in stack.pop().input:
                before = self.producer.get(name)
                if name in self.draft.weights or name == "" or (before is not None and before.name in seen):
                    continue
                if before is None or (before.op_type not in _REDUCTIONS and before.op_type not in _ON_THE_WAY):
                    return False
                seen.add(before.name)
                if before.op_type in _ON_THE_WAY:
                    if len(seen) > 4 * _MOST_STEPS:
                        return False
                    stack.append(before)
        return True
