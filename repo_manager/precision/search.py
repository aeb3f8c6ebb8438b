"""Search for the few layers that have to stay in FP32 for the drift to pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repo_manager.precision.attempt import Attempt, Attempts
from repo_manager.precision.proof.trace import trace_drift

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
        The attempt with the fewest kept nodes that passes; `first`, without its files, when none does.
    """
    kept: list[str] = []
    attempt, step = first, 1
    while attempt.proof.failed_only("drift") and len(kept) < most:
        new = _next_nodes(attempts, attempt, kept, folder)[: min(step, most - len(kept))]
        if not new:
            break
        kept += new
        step *= 2
        attempts.forget(attempt)
        attempt = attempts.make(kept)
    return _fewest(attempts, attempt, kept) if attempt.proof.passed else first


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


def _fewest(attempts: Attempts, attempt: Attempt, kept: list[str]) -> Attempt:
    """Take nodes back out, latest found first, as long as it still passes."""
    for name in list(reversed(kept))[:_MOST_DROPS]:
        if len(kept) == 1:
            break
        fewer = [other for other in kept if other != name]
        tried = attempts.make(fewer)
        if tried.proof.passed:
            attempts.forget(attempt)
            attempt, kept = tried, fewer
        else:
            attempts.forget(tried)
    return attempt
