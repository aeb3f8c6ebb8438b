"""Outputs made by selection, and the values to judge in their place.

NonMaxSuppression, TopK, ArgMax and their like turn numbers into choices, as do rounding to integers and thresholds.
Where two candidates are nearly level, the smallest rounding changes the choice, the number chosen, and so the shape of
the output: a comparison element by element says nothing. The candidates, scores and boxes, are numbers and can be
compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from repo_manager.errors import ModelError
from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Array, Draft, captured_names, exposing
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import WrittenModel, write_draft, write_view
from repo_manager.precision.passes.quantize_plan import WEIGHTED
from repo_manager.precision.passes.value_types import ValueType, infer_types, type_table
from repo_manager.precision.proof.checks import probability_values

__all__ = ["Selection", "after_selection", "selection_of"]

_SELECTORS = {"ArgMax", "ArgMin", "Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"}
_MIXES = {*WEIGHTED, "Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}
_WHOLE = {
    *(TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Selection:
    """The values behind selected outputs, and the source's values for them.

    Attributes:
        judges: output -> the float32 values it is chosen from.
        source: the float32 draft, with names on all nodes, in topological order.
        folder: for a temporary model, removed again.
    """

    judges: Mapping[str, tuple[str, ...]]
    source: Draft = field(repr=False)
    folder: Path

    @property
    def values(self) -> tuple[str, ...]:
        """Every value used to judge an output, each once."""
        return tuple(dict.fromkeys(value for values in self.judges.values() for value in values))

    def answers(self, samples: Iterable[Mapping[str, Array]]) -> tuple[Mapping[str, Array], ...]:
        """Run the source. Return its values, one dictionary per sample.

        Raises:
            ModelError: the draft does not run.
        """
        path = self.folder / "selection.onnx"
        written = write_draft(exposing(self.source, self.values), path)
        try:
            session = Session(path, optimize=False)
            return tuple(session.run(sample) for sample in samples)
        finally:
            for file in written.files:
                file.unlink()

    @property
    def probabilities(self) -> frozenset[str]:
        """Those of the values with a Sigmoid or Softmax as source."""
        return probability_values(self.source.graph, self.values)

    def session(self, candidate: Draft, written: WrittenModel) -> Session:
        """Open a candidate as it is written, with these values as its outputs.

        Raises:
            ModelError: the candidate lacks one of the values, or ONNX Runtime does not take it.
        """
        view = written.files[0].with_name("selection.onnx")
        made = {name for node in candidate.graph.node for name in node.output}
        if not made.issuperset(self.values):
            raise ModelError(f"{written.files[0]}: values that a selection is made from are not in it any more")
        write_view(exposing(candidate, self.values), written, view)
        try:
            return Session(view, optimize=False)
        finally:
            view.unlink()


def selection_of(source: Draft, folder: Path) -> Selection | None:
    """Find the outputs of a float32 draft made by selection.

    Every output of integers or booleans is one. A float output with a weighted operator (Conv, MatMul, ...) between
    the selection and itself is not: it shows more than the choice.

    Args:
        source: with names on all nodes, in topological order.
        folder: for a temporary model, removed again.

    Returns:
        `None` when no output is a selection of float values.
    """
    whole = any(output.type.tensor_type.elem_type in _WHOLE for output in source.graph.output)
    judges = _judges(source) if whole or after_selection(source) else {}
    return Selection(judges, source, folder) if judges else None


def after_selection(draft: Draft) -> frozenset[str]:
    """Return the outputs a selection leads to, weights in between or not."""
    reached: set[str] = set()
    for node in draft.graph.node:
        if _has(node, _SELECTORS) or any(name in reached for name in (*node.input, *captured_names(node))):
            reached.update(name for name in node.output if name)
    return frozenset(output.name for output in draft.graph.output if output.name in reached)


def _judges(draft: Draft) -> dict[str, tuple[str, ...]]:
    types = type_table(infer_types(draft).graph)
    producer = {name: node for node in draft.graph.node for name in node.output if name}
    chosen: set[str] = set()
    for node in draft.graph.node:
        if _has(node, _MIXES):
            continue
        if _has(node, _SELECTORS) or any(name in chosen for name in (*node.input, *captured_names(node))):
            chosen.update(name for name in node.output if name)
    found = {}
    for output in draft.graph.output:
        if output.name in chosen or output.type.tensor_type.elem_type in _WHOLE:
            values = _chosen_from(output.name, chosen, producer, types)
            if values:
                found[output.name] = values
    return found


def _has(node: onnx.NodeProto, operators: Container[str]) -> bool:
    """Return whether a node, or one inside its bodies, is one of these operators."""
    bodies = (graph for body in walk.node_graphs(node) for graph in walk.graphs_of(body))
    each = itertools.chain([node], *(graph.node for graph in bodies))
    return any(inner.op_type in operators and inner.domain in ONNX_DOMAINS for inner in each)


def _chosen_from(
    output: str, chosen: set[str], producer: Mapping[str, onnx.NodeProto], types: Mapping[str, ValueType]
) -> tuple[str, ...]:
    """Walk back from an output. Return the computed float values where the walk leaves the choice."""
    stack, seen, values = [output], {output}, []
    while stack:
        name = stack.pop()
        node = producer.get(name)
        if node is None:
            continue  # a weight or a graph input: the same in source and candidate
        if name not in chosen and name in types and types[name].data_type in _FLOATS:
            values.append(name)
            continue
        new = [value for value in (*node.input, *captured_names(node)) if value and value not in seen]
        seen.update(new)
        stack.extend(new)
    return tuple(sorted(values))
