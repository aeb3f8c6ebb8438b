"""Intervals for throughput, mean and quantiles by a moving-block bootstrap over slices of time.

Latencies next to each other in time depend on each other, so single requests must not be resampled. Slices of
time, in blocks of consecutive ones, are (Künsch 1989); each resample adds their histograms up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from repo_manager.loadtest.histogram import Histogram, values_of
from repo_manager.loadtest.recorder import Slice
from repo_manager.loadtest.result import Interval, Intervals

__all__ = ["block_weights", "intervals_of"]

_RESAMPLES = 400
_MIN_SLICES = 8
_CONFIDENCE = 0.95
_GROUPS = 120

Floats = npt.NDArray[np.float64]


def block_weights(slices: int, resamples: int, seed: int) -> Floats:
    """Return how often each slice is drawn in each resample, `[resamples, slices]`; rows sum to `slices`."""
    length = max(round(slices ** (1 / 3)), 1)
    blocks = -(-slices // length)
    starts = np.random.default_rng(seed).integers(0, slices, size=(resamples, blocks))
    # Circular blocks: every slice is drawn with the same probability.
    drawn = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :slices] % slices
    weights = np.zeros((resamples, slices))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1)
    return weights


def intervals_of(slices: list[Slice], *, batch_size: int, seed: int = 0) -> Intervals:
    """Return 95 % intervals; all `None` with fewer than 8 slices or without a request.

    Args:
        slices: measured slices of equal length, in order of time.
        batch_size: inferences in a request.
        seed: of the resampling.
    """
    slices = _grouped(slices)
    whole = Histogram.merge(piece.latencies for piece in slices)
    if len(slices) < _MIN_SLICES or not whole.count:
        return Intervals()
    weights = block_weights(len(slices), _RESAMPLES, seed)
    counts = np.zeros((len(slices), whole.bins.size))
    for row, piece in enumerate(slices):
        counts[row, np.searchsorted(whole.bins, piece.latencies.bins)] = piece.latencies.counts
    resampled = weights @ counts
    requests = resampled.sum(axis=1)
    seconds = weights @ np.array([piece.length_ns / 1e9 for piece in slices])
    totals = weights @ np.array([float(piece.latencies.total_ns) for piece in slices])
    kept = requests > 0
    cumulative = np.cumsum(resampled[kept], axis=1)
    values = values_of(whole.bins)

    def quantile(share: float) -> Interval:
        ranks = np.maximum(np.ceil(share * requests[kept] - 1e-9), 1)
        return _interval(values[np.argmax(cumulative >= ranks[:, None], axis=1)].astype(np.float64))

    return Intervals(
        throughput_per_s=_interval(requests * batch_size / seconds),
        mean_ns=_interval(totals[kept] / requests[kept]),
        p50_ns=quantile(0.5),
        p90_ns=quantile(0.9),
        p95_ns=quantile(0.95),
        p99_ns=quantile(0.99),
    )


def _grouped(slices: list[Slice]) -> list[Slice]:
    """Merge neighbours until at most 120 are left: more would only cost memory."""
    size = -(-len(slices) // _GROUPS)
    if size <= 1:
        return slices
    merged = []
    for start in range(0, len(slices) - size + 1, size):
        part = slices[start : start + size]
        whole = Slice.merge(part)
        merged.append(Slice(whole.index, sum(piece.length_ns for piece in part), whole.latencies, whole.errors))
    return merged


def _interval(values: Floats) -> Interval:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high))
