"""Outputs that are a selection, and the values to judge in their place.

NonMaxSuppression, TopK, ArgMax and their like turn numbers into choices. Where two candidates are nearly level, the
smallest rounding changes which one is chosen, how many are, and so the shape of the output: a comparison element by
element says nothing. What was chosen from, scores and boxes, is a number and can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Array, Draft, captured_names
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import WrittenModel, write_draft, write_view
from repo_manager.precision.quantize_plan import WEIGHTED
from repo_manager.precision.value_types import ValueType, infer_types, type_table

__all__ = ["Selection", "selection_of"]

_SELECTORS = {"ArgMax", "ArgMin", "Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"}
_MIXES = {*WEIGHTED, "Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Selection:
    """What selected outputs are chosen from, and what the source says of it.

    Attributes:
        judges: output -> the float32 values that it is chosen from.
        answers: the source's values, one dictionary per sample.
    """

    judges: Mapping[str, tuple[str, ...]]
    answers: tuple[Mapping[str, Array], ...]

    @property
    def values(self) -> tuple[str, ...]:
        """Every value that judges an output, each once."""
        return tuple(dict.fromkeys(value for values in self.judges.values() for value in values))

    def session(self, candidate: Draft, written: WrittenModel) -> Session:
        """Open a candidate as it is written, with these values as its outputs.

        Raises:
            ModelError: the candidate lacks one of the values, or ONNX Runtime does not take it.
        """
        view = written.files[0].with_name("selection.onnx")
        made = {name for node in candidate.graph.node for name in node.output}
        if not made.issuperset(self.values):
            raise ModelError(f"{written.files[0]}: values that a selection is made from are not in it any more")
        write_view(_exposing(candidate, self.values), written, view)
        try:
            return Session(view, optimize=False)
        finally:
            view.unlink()


def selection_of(source: Draft, samples: Iterable[Mapping[str, Array]], folder: Path) -> Selection | None:
    """Find the outputs of a float32 draft that are selections, and run it for what they are chosen from.

    An output with a weighted operator (Conv, MatMul, ...) between the selection and itself is no such output: what it
    shows is not only what was chosen.

    Args:
        source: with names on all nodes, in topological order.
        samples: inputs.
        folder: for a temporary model, removed again.

    Returns:
        `None` when no output is a selection of float values.

    Raises:
        ModelError: the draft does not run.
    """
    if all(node.op_type not in _SELECTORS for node in source.graph.node):
        return None
    judges = _judges(source)
    if not judges:
        return None
    selection = Selection(judges, ())
    path = folder / "selection.onnx"
    written = write_draft(_exposing(source, selection.values), path)
    try:
        session = Session(path, optimize=False)
        return Selection(judges, tuple(session.run(sample) for sample in samples))
    finally:
        for file in written.files:
            file.unlink()


def _judges(draft: Draft) -> dict[str, tuple[str, ...]]:
    types = type_table(infer_types(draft).graph)
    producer = {name: node for node in draft.graph.node for name in node.output if name}
    chosen: set[str] = set()
    for node in draft.graph.node:
        if node.op_type in _MIXES:
            continue
        if _selects(node) or any(name in chosen for name in (*node.input, *captured_names(node))):
            chosen.update(name for name in node.output if name)
    found = {}
    for output in draft.graph.output:
        if output.name in chosen:
            values = _chosen_from(output.name, chosen, producer, types)
            if values:
                found[output.name] = values
    return found


def _selects(node: onnx.NodeProto) -> bool:
    return node.op_type in _SELECTORS and node.domain in ONNX_DOMAINS


def _chosen_from(
    output: str, chosen: set[str], producer: Mapping[str, onnx.NodeProto], types: Mapping[str, ValueType]
) -> tuple[str, ...]:
    """Walk back from an output; return the computed float values at which the walk leaves what was chosen."""
    stack, seen, values = [output], {output}, []
    while stack:
        name = stack.pop()
        node = producer.get(name)
        if node is None:
            continue  # a weight or an input of the graph: the same in source and candidate
        if name not in chosen and name in types and types[name].data_type in _FLOATS:
            values.append(name)
            continue
        new = [value for value in (*node.input, *captured_names(node)) if value and value not in seen]
        seen.update(new)
        stack.extend(new)
    return tuple(sorted(values))


def _exposing(draft: Draft, values: tuple[str, ...]) -> Draft:
    probe = draft.copy()
    del probe.graph.output[:]
    for value in values:
        probe.graph.output.append(onnx.ValueInfoProto(name=value))
        probe.graph.output[-1].type.tensor_type.elem_type = TensorProto.FLOAT
    return probe
