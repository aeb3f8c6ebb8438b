"""Search for the few layers that have to stay in FP32 for the drift to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from repo_manager.errors import CalibrationError, ModelError
from repo_manager.precision.attempt import Attempt, Attempts
from repo_manager.precision.lowering_rules import FP16_MAX
from repo_manager.precision.ranges import float_values, largest_values
from repo_manager.precision.trace import trace_drift
from repo_manager.types import Precision

__all__ = ["auto_keep"]

_TRACED_SAMPLES = 2
_MOST_DROPS = 8  # attempts to take a layer back out again


def auto_keep(attempts: Attempts, first: Attempt, most: int, folder: Path) -> Attempt:
    """Keep more and more of the layers where drift begins, until the gate passes; then those that are needed only.

    Args:
        attempts: makes and proves candidates.
        first: the attempt that failed by drift alone.
        most: at most so many nodes.
        folder: for temporary models.

    Returns:
        The attempt with the fewest kept nodes that passes; `first` when none does.
    """
    needed = _overflowing(attempts, folder)
    if len(needed) > most:
        return first
    kept = list(needed)
    attempt, step = (attempts.make(kept) if kept else first), 1
    while attempt.proof.failed_only("drift") and len(kept) < most:
        found = _next_nodes(attempts, attempt, kept, folder)
        new = found[: min(step, most - len(kept))]
        if not new:
            break
        kept += new
        step *= 2
        attempt = attempts.make(kept)
    if not attempt.proof.passed:
        return first
    return _fewest(attempts.make, attempt, kept, frozenset(needed))


def _overflowing(attempts: Attempts, folder: Path) -> list[str]:
    """Return the nodes that read or make a value beyond FP16's range: with all of them, and only then, can it pass."""
    builder = attempts.builder
    if builder.precision not in (Precision.FP16, Precision.INT8_FP16):
        return []
    values = float_values(builder.draft, [name for node in builder.draft.graph.node for name in node.output if name])
    samples = attempts.prover.reference.inputs
    try:
        largest = largest_values(builder.draft, values, samples, folder)
    except (CalibrationError, ModelError):  # the source itself is infinite somewhere, or a value is empty
        return []
    beyond = {value for value, size in largest.items() if size > FP16_MAX}
    return [node.name for node in builder.draft.graph.node if beyond.intersection((*node.input, *node.output))]


def _next_nodes(attempts: Attempts, attempt: Attempt, kept: Sequence[str], folder: Path) -> list[str]:
    """Return the nodes to keep next, the most harmful first."""
    source = attempts.builder.draft
    samples = attempts.prover.reference.inputs[:_TRACED_SAMPLES]
    quantizes = attempts.builder.quantizes
    blocks = trace_drift(source, attempt.candidate.stages[-1][1], samples, folder, every_node=not quantizes)
    names = [block.node for block in sorted(blocks, key=lambda block: -block.added) if block.added > 0]
    if quantizes:
        names = [name for name in names if attempts.builder.can_keep(name)]
    return [name for name in dict.fromkeys(names) if name not in kept]


def _fewest(
    make: Callable[[Sequence[str]], Attempt], attempt: Attempt, kept: list[str], needed: frozenset[str]
) -> Attempt:
    """Take nodes back out, latest found first, as long as it still passes."""
    for name in [name for name in reversed(kept) if name not in needed][:_MOST_DROPS]:
        if len(kept) == 1:
            break
        fewer = [other for other in kept if other != name]
        tried = make(fewer)
        if tried.proof.passed:
            attempt, kept = tried, fewer
    return attempt
