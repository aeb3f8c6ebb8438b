"""What mirroring recorded requests to two versions showed."""

from __future__ import annotations

import dataclasses

import numpy as np

from repo_manager.gates.verdict import Outcome
from repo_manager.rollout.trial.gates import GateResult
from repo_manager.rollout.trial.recorded import Array
from repo_manager.stats.drift import OutputDrift

__all__ = ["LatencySummary", "ShadowReport"]


@dataclasses.dataclass(frozen=True)
class LatencySummary:
    """Latencies of one version, the client's work included; `None` without an answer."""

    mean_ns: float | None
    p50_ns: float | None
    p95_ns: float | None
    p99_ns: float | None

    @classmethod
    def of(cls, latencies_ns: Array) -> LatencySummary:
        """Summarise `[requests]` latencies."""
        if not latencies_ns.size:
            return cls(None, None, None, None)
        p50, p95, p99 = np.quantile(latencies_ns, (0.5, 0.95, 0.99)).tolist()
        return cls(float(latencies_ns.mean()), p50, p95, p99)


@dataclasses.dataclass(frozen=True)
class ShadowReport:
    """What mirroring showed.

    Attributes:
        model: the model.
        old: the version that was served before.
        new: the version on trial.
        pairs: requests that both versions were sent; those that neither could answer are in `refused_by_both` alone.
        errors_old: of these, how many the old version failed.
        errors_new: of these, how many the new one failed.
        first_error: the new version's first error; `None` without one.
        refused_by_both: recorded requests that neither version could answer.
        skipped: requests that were due while all workers were waiting for answers.
        seconds: how long it took.
        outputs: drift of every output over all answers.
        latency_old: of the pairs that both answered.
        latency_new: likewise.
        gates: every gate's result.
        outcome: of all of them.
    """

    model: str
    old: int
    new: int
    pairs: int
    errors_old: int
    errors_new: int
    first_error: str | None
    refused_by_both: int
    skipped: int
    seconds: float
    outputs: tuple[OutputDrift, ...]
    latency_old: LatencySummary
    latency_new: LatencySummary
    gates: tuple[GateResult, ...]
    outcome: Outcome
