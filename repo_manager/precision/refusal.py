"""What a refused conversion says: the checks, the drift of each output, and where it began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import Model
from repo_manager.precision.attempt import Attempt, Attempts
from repo_manager.precision.passes.lowering_rules import FP16_MAX
from repo_manager.precision.proof.checks import drift_limit
from repo_manager.precision.proof.prove import Proof
from repo_manager.precision.proof.trace import BlockDrift, first_drift, trace_drift
from repo_manager.stats.drift import table
from repo_manager.types import Precision

__all__ = ["refusal", "where_it_began"]

_SHOWN_BLOCKS = 10
_SMALL = 400  # nodes; of a larger model only weighted operators are compared


def refusal(model: Model, precision: Precision, proof: Proof, began: str = "") -> str:
    """Return the message of a failed gate."""
    failed = ", ".join(check.name for check in proof.checks if not check.passed)
    lines = [f"{model.path} as {precision}: the gate failed ({failed})"]
    lines += [f"  {'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}" for check in proof.checks]
    if proof.drift:
        lines.append(table(proof.drift))
    return "\n".join([*lines, began] if began else lines)


def where_it_began(attempts: Attempts, attempt: Attempt, folder: Path) -> str:
    """Return the error after each block as a table, one column a stage (int8, fp16); empty when it was not drift."""
    if not attempt.proof.failed_only("drift"):
        return ""
    samples = attempts.prover.reference.inputs[:1]
    limit = drift_limit(attempts.prover.precision, attempts.prover.options)
    source = attempts.builder.draft
    traces: dict[str, tuple[BlockDrift, ...]] = {}
    for name, draft in attempt.candidate.stages:
        try:
            traces[name] = trace_drift(source, draft, samples, folder, every_node=len(source.graph.node) <= _SMALL)
        except ModelError:  # a graph that ONNX Runtime runs only as a whole: the drift itself is known all the same
            return ""
    last = list(traces.values())[-1]
    first = first_drift(last, limit)
    lines = [f"relative error after each block ({', then '.join(traces)}):"]
    for block in _picked(last, first):
        columns = "  ".join(f"{_error(trace, block.value):>9.3g}" for trace in traces.values())
        mark = f"  <- above {limit:g} from here on" if block is first else ""
        if block.largest > FP16_MAX and "fp16" in traces:
            mark += f"  reaches {block.largest:.3g}, FP16 ends at {FP16_MAX:.0f}"
        lines.append(f"  {columns}  {block.op_type} '{block.node}'{mark}")
    return "\n".join(lines)


def _error(trace: Sequence[BlockDrift], value: str) -> float:
    return next((block.relative_error for block in trace if block.value == value), 0.0)


def _picked(blocks: Sequence[BlockDrift], first: BlockDrift | None) -> list[BlockDrift]:
    """Return a few blocks spread over the network, with those around where it began."""
    if len(blocks) <= _SHOWN_BLOCKS:
        return list(blocks)
    step = (len(blocks) - 1) / (_SHOWN_BLOCKS - 3)
    places = {round(number * step) for number in range(_SHOWN_BLOCKS - 2)}
    if first is not None:
        begin = blocks.index(first)
        places |= {max(0, begin - 1), begin}
    return [blocks[place] for place in sorted(places)]
