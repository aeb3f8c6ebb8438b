"""Mirroring recorded requests to two versions: how it is done, and what it showed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from repo_manager.precision import OutputDrift
from repo_manager.rollout.trial.gates import GateOutcome, GateResult
from repo_manager.rollout.trial.recorded import Array

__all__ = ["LatencySummary", "ShadowOptions", "ShadowReport"]


@dataclasses.dataclass(frozen=True)
class ShadowOptions:
    """How to mirror.

    Attributes:
        requests: the file of recorded requests.
        rate_per_s: pairs a second; each is one request to either version.
        duration_s: for how long at most; it ends before when every gate is decided.
        timeout_s: deadline of one request; an answer that is later is an error.
        workers: pairs on their way at the same time, at most.
        seed: of the order of the requests and of the versions in each pair.
    """

    requests: Path
    rate_per_s: float = 20.0
    duration_s: float = 60.0
    timeout_s: float = 10.0
    workers: int = 4
    seed: int = 0


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
    outcome: GateOutcome
