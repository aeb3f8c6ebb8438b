"""Find where drift begins: the error after each block, beside the float32 source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from repo_manager.onnx_model.draft import Array, Draft, exposing
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision.passes.value_types import infer_types, type_table
from repo_manager.stats.drift import relative_error

__all__ = ["BlockDrift", "first_drift", "trace_drift"]

_MOST_BLOCKS = 96
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "Einsum"}


@dataclass(frozen=True)
class BlockDrift:
    """The error of one value.

    Attributes:
        node: name of the node behind the value.
        op_type: operator of the node.
        value: name of the value in the graph.
        relative_error: |candidate - source| / |source|, the largest over the samples.
        largest: the largest absolute value it has in the source.
        added: the part its own inputs did not bring: sqrt(error^2 - largest input error^2).
    """

    node: str
    op_type: str
    value: str
    relative_error: float
    added: float
    largest: float


def trace_drift(
    source: Draft, candidate: Draft, samples: Iterable[Mapping[str, Array]], folder: Path, *, every_node: bool = False
) -> tuple[BlockDrift, ...]:
    """Run source and candidate beside each other and compare the values both have.

    Args:
        source: the float32 draft of the source.
        candidate: a draft whose values are float32, too (`rounded` for 16-bit ones).
        samples: input samples: input name -> array, batch axis included.
        folder: scratch folder for the temporary models. They stay in it.
        every_node: compare each node's results, else those of weighted operators, at most about 100.

    Returns:
        One entry per compared value, in the order of appearance made.

    Raises:
        ModelError: one of the two does not run.
    """
    blocks = _blocks(source, candidate, every_node)
    values = [value for _, value in blocks]
    errors = dict.fromkeys(values, 0.0)
    largest = dict.fromkeys(values, 0.0)
    inputs = list(samples)
    for start in range(0, len(values), _MOST_BLOCKS):
        part = values[start : start + _MOST_BLOCKS]
        before, after = (
            Session(write_draft(exposing(draft, part), folder / f"trace{number}.onnx").files[0], optimize=False)
            for number, draft in enumerate((source, candidate))
        )
        for sample in inputs:
            truth, found = before.run(sample), after.run(sample)
            for value in part:
                largest[value] = max(largest[value], float(np.abs(truth[value]).max(initial=0.0)))
                errors[value] = max(errors[value], relative_error(found[value], truth[value]))
    return _with_added(source, blocks, errors, largest)


def first_drift(blocks: Sequence[BlockDrift], limit: float) -> BlockDrift | None:
    """Return the block from which on the error stays above `limit`, or `None`."""
    first = None
    for block in reversed(blocks):
        if block.relative_error <= limit:
            break
        first = block
    return first or next((block for block in blocks if block.relative_error > limit), None)


def _blocks(source: Draft, candidate: Draft, every_node: bool) -> list[tuple[onnx.NodeProto, str]]:
    types, others = (type_table(infer_types(draft).graph) for draft in (source, candidate))
    made = {name for node in candidate.graph.node for name in node.output}
    found = [
        (node, name)
        for node in source.graph.node
        for name in node.output
        if name in made and all(t.get(name) and t[name].data_type == TensorProto.FLOAT for t in (types, others))
    ]
    if every_node:
        return found
    weighted = [pair for pair in found if pair[0].op_type in _WEIGHTED] or found
    step = -(-len(weighted) // _MOST_BLOCKS)
    outputs = {value.name for value in source.graph.output}
    chosen = {name for _, name in weighted[::step]} | {name for _, name in found if name in outputs} if step else set()
    return [pair for pair in found if pair[1] in chosen]


def _with_added(
    source: Draft,
    blocks: Sequence[tuple[onnx.NodeProto, str]],
    errors: Mapping[str, float],
    largest: Mapping[str, float],
) -> tuple[BlockDrift, ...]:
    """Carry each compared error forward through the nodes not compared."""
    carried: dict[str, float] = {}
    compared = {value: node for node, value in blocks}
    result = []
    for node in source.graph.node:
        incoming = max((carried.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            error = errors.get(name, incoming)
            carried[name] = error
            if name in compared:
                added = error if not np.isfinite(incoming) else max(0.0, error**2 - incoming**2) ** 0.5
                if not np.isfinite(error) and not np.isfinite(incoming):
                    added = 0.0
                result.append(BlockDrift(node.name, node.op_type, name, error, added, largest[name]))
    return tuple(result)
