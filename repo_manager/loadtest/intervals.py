"""Intervals for throughput, mean and quantiles by a moving-block bootstrap over slices of time.

Latencies next to each other in time depend on each other, so single requests must not be resampled. Slices of
time, in blocks of consecutive ones, are (Künsch 1989); each resample adds their histograms up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from repo_manager.loadtest.result import Intervals
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram, values_of
from repo_manager.stats.intervals import Interval

__all__ = ["block_weights", "intervals_of"]

_RESAMPLES = 400
_MIN_SLICES = 8
_CONFIDENCE = 0.95
_GROUPS = 120
_CHUNKS = 10
_QUANTILES = (0.5, 0.9, 0.95, 0.99)  # in the order of Intervals

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
    counts = np.zeros((len(slices), whole.bins.size), np.float32)  # exact up to 16 million a bin and slice
    for row, piece in enumerate(slices):
        counts[row, np.searchsorted(whole.bins, piece.latencies.bins)] = piece.latencies.counts
    weights = block_weights(len(slices), _RESAMPLES, seed)
    parts = [_resampled(part, counts, values_of(whole.bins)) for part in np.array_split(weights, _CHUNKS)]
    requests, quantiles = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
    seconds = weights @ np.array([piece.length_ns / 1e9 for piece in slices])
    totals = weights @ np.array([float(piece.latencies.total_ns) for piece in slices])
    kept = requests > 0
    return Intervals(
        _interval(requests * batch_size / seconds),
        _interval(totals[kept] / requests[kept]),
        *(_interval(quantiles[kept, number]) for number in range(len(_QUANTILES))),
    )


def _resampled(
    weights: Floats, counts: npt.NDArray[np.float32], values: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return each resample's requests `[R]` and quantiles `[R, 4]`; in chunks, because `[R, bins]` is large."""
    cumulative = np.cumsum(weights.astype(np.float32) @ counts, axis=1, dtype=np.float64)
    requests = cumulative[:, -1]
    quantiles = np.empty((len(weights), len(_QUANTILES)))
    for row, ranks in enumerate(np.maximum(np.ceil(np.outer(requests, _QUANTILES) - 1e-6), 1)):
        places = np.searchsorted(cumulative[row], ranks)
        quantiles[row] = values[np.minimum(places, values.size - 1)]
    return requests, quantiles


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
