"""The limits a new version must hold: `p99<20ms`, `p99<1.2x`, `mean<5ms`, `errors<0.1%`, `agreement>99%`,
`drift<1e-2`.

Almost every gate is a share of requests: `p99<20ms` means fewer than 1 % take longer than 20 ms, `drift<1e-2` fewer
than 1 % of the answers differ by more. A gate passes when the whole interval is on the right side, fails when it is on
the wrong side, and is undecided in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.files import document
from repo_manager.gates import Gate, GateResult, Outcome, decide, growth_needed, worst
from repo_manager.stats.intervals import share_bounds, spent
from repo_manager.stats.quantiles import PERCENTILES
from repo_manager.stats.resampling import bootstrap_bounds

__all__ = ["Evidence", "judge_gates", "worst_outcome"]

_QUANTILES = {percentile.key: percentile.share for percentile in PERCENTILES}
_DRIFT_SHARE = 0.01
_FEWEST = 8  # observations: the least for a bootstrap
_ALPHA = 0.05
_NOT_COMPARED = {"agreement": "no output looks like class scores", "drift": "no pair of answers was compared"}

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The knowledge of the new version so far.

    Attributes:
        source: `shadow`: mirrored requests. `traffic`: the server's counters, for `errors` and `mean` alone.
        requests: requests the new version was sent, those no version could answer left out.
        errors: of these, how many it failed.
        latencies_ns: `[requests, 2]` of the new and the old version, in order of time. For traffic one row a period
            with its mean latency and its requests.
        compared: rows of class scores compared.
        agreeing: of these, how many have the same top class.
        drifts: relative error of each pair's answers.
    """

    source: str
    requests: int
    errors: int
    latencies_ns: Floats
    compared: int = 0
    agreeing: int = 0
    drifts: Floats = dataclasses.field(default_factory=lambda: np.empty(0))


def worst_outcome(results: Sequence[GateResult]) -> Outcome:
    """Return fail if any failed, else inconclusive if any is, else pass."""
    return worst(result.outcome for result in results)


def judge_gates(gates: Sequence[Gate], evidence: Evidence, *, look: int = 1) -> tuple[GateResult, ...]:
    """Judge every gate this evidence can speak to. 5 % of error are shared by all gates and all looks.

    Args:
        gates: all gates of the trial. For `traffic`, those its counters cannot speak to are left out.
        evidence: what was seen so far.
        look: the number of this judgement, from 1. Only bootstrapped gates depend on it.
    """
    alpha = _ALPHA / max(len(gates), 1)
    results = []
    for gate in gates:
        if evidence.source == "traffic" and (gate.metric not in ("errors", "mean") or gate.relative):
            continue
        judged = _judge_share if gate.metric != "mean" and not gate.relative else _judge_number
        results.append(judged(gate, evidence, alpha, look))
    return tuple(results)


def _judge_share(gate: Gate, evidence: Evidence, alpha: float, look: int) -> GateResult:
    """Judge a limit on a share of requests. `look` does not matter."""
    hits, total, allowed, what = _share_of(gate, evidence)
    if total == 0:
        return _nothing_seen(gate, evidence)
    bounds = share_bounds(hits, total, alpha)
    above = gate.metric == "agreement"
    outcome = decide(bounds, allowed, below=not above)
    words = f"{hits / total:.3%} of {total} {what} [{bounds.low:.3%}, {bounds.high:.3%}], "
    words += f"{'at least' if above else 'allowed'} {allowed:.4g}" if allowed > 1 else f"limit {allowed:.3%}"
    needed = None if outcome is not Outcome.INCONCLUSIVE else _needed(hits, total, allowed, alpha)
    return GateResult(gate.text, evidence.source, outcome, words, needed_requests=needed)


def _share_of(gate: Gate, evidence: Evidence) -> tuple[int, int, float, str]:
    """Return hits, total, the limit of their share, and their name."""
    if gate.metric == "errors":
        return evidence.errors, evidence.requests, gate.limit, "requests failed"
    if gate.metric == "agreement":
        return evidence.agreeing, evidence.compared, gate.limit, "answers have the same top class"
    if gate.metric == "drift":
        over = int(np.count_nonzero(~(evidence.drifts < gate.limit)))
        return over, len(evidence.drifts), _DRIFT_SHARE, f"answers drift by {gate.limit:g} or more"
    over = int(np.count_nonzero(~(evidence.latencies_ns[:, 0] < gate.limit)))
    what = f"requests took {gate.limit / 1e6:g} ms or more"
    return over, len(evidence.latencies_ns), 1 - _QUANTILES[gate.metric], what


def _needed(hits: int, total: int, allowed: float, alpha: float) -> int | None:
    """Estimate how many requests would decide, if the share stays what it is."""
    for power in range(1, 60):
        times = 1.25**power
        scaled_total = round(total * times)
        bounds = share_bounds(round(hits * times), scaled_total, alpha)
        if bounds.high < allowed or bounds.low > allowed:
            return scaled_total
    return None


def _judge_number(gate: Gate, evidence: Evidence, alpha: float, look: int) -> GateResult:
    """Judge a mean, or a latency as a multiple of the old version's."""
    rows = evidence.latencies_ns
    if len(rows) < _FEWEST:
        return _nothing_seen(gate, evidence)
    number = _number_of(gate, evidence.source)
    value = number(rows)
    bounds = bootstrap_bounds(rows, number, spent(alpha, look))
    outcome = decide(bounds, gate.limit, below=True)
    size, unit = (1.0, "x of the old version's") if gate.relative else (1e6, " ms")
    words = f"{gate.metric} {value / size:.4g}{unit} [{bounds.low / size:.4g}, {bounds.high / size:.4g}], "
    words += f"limit {gate.limit / size:g}, {evidence.requests} requests"
    needed = None
    if outcome is Outcome.INCONCLUSIVE:
        times = growth_needed(value, bounds, gate.limit)
        needed = None if times is None else round(evidence.requests * times)
    return GateResult(gate.text, evidence.source, outcome, words, needed_requests=needed)


def _number_of(gate: Gate, source: str) -> Callable[[Floats], float]:
    if source == "traffic":
        return lambda rows: float(np.average(rows[:, 0], weights=rows[:, 1]))

    def of(column: Floats) -> float:
        return float(np.mean(column) if gate.metric == "mean" else np.quantile(column, _QUANTILES[gate.metric]))

    if gate.relative:
        return lambda rows: of(rows[:, 0]) / of(rows[:, 1])
    return lambda rows: of(rows[:, 0])


def _nothing_seen(gate: Gate, evidence: Evidence) -> GateResult:
    what = "too few requests reached the new version"
    if evidence.source == "traffic":
        what += f": do clients follow the weights ({document('canary.md')})?"
    elif gate.metric in _NOT_COMPARED:
        what = _NOT_COMPARED[gate.metric]
    return GateResult(gate.text, evidence.source, Outcome.INCONCLUSIVE, what)
