"""A histogram of integer nanoseconds with bounded relative error, mergeable across processes and machines.

The layout is that of HDR histograms (Gil Tene, HdrHistogram): values below 2048 have a bin each. Above, every power of
two is cut into 1024 equal bins, so a bin is never wider than 1/1024 of its value and its middle never further than
1/2048 from any value in it. Percentiles of several load generators come from merged histograms and never from averaged
percentiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from repo_manager.errors import InputError

__all__ = ["Histogram", "bins_of", "values_of"]

_SUB_BITS = 10
_SUB = 1 << _SUB_BITS

Ints = npt.NDArray[np.int64]


def bins_of(values_ns: Sequence[int] | Ints) -> Ints:
    """Return the bin number of each value. Negative values count as 0.

    Args:
        values_ns: integers in nanoseconds, of any shape. The result has the same shape.
    """
    values = np.maximum(np.asarray(values_ns, dtype=np.int64), 0)
    # frexp gives value = m * 2**e with 0.5 <= m < 1. Exact for every int64 below 2**53 ns (104 days).
    shift = np.maximum(np.frexp(values.astype(np.float64))[1].astype(np.int64) - (_SUB_BITS + 1), 0)
    bins: Ints = shift * _SUB + (values >> shift)
    return bins


def values_of(bins: Sequence[int] | Ints) -> Ints:
    """Return the middle value, in nanoseconds, of each bin."""
    numbers = np.asarray(bins, dtype=np.int64)
    shift = np.maximum(numbers // _SUB - 1, 0)
    low = (numbers - shift * _SUB) << shift
    middle: Ints = low + ((np.int64(1) << shift) >> 1)
    return middle


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the non-empty bins, with the exact sum, sum of squares, minimum and maximum.

    Attributes:
        bins: bin numbers, int64 `[B]`, ascending.
        counts: values in each bin, int64 `[B]`.
        total_ns: exact sum of all values, in nanoseconds. Negative ones count as 0.
        squares: sum of all squared values, in ns².
        min_ns: smallest value. `None` when the histogram is empty.
        max_ns: largest value. `None` when the histogram is empty.
    """

    bins: Ints
    counts: Ints
    total_ns: int = 0
    squares: float = 0.0
    min_ns: int | None = None
    max_ns: int | None = None

    @classmethod
    def empty(cls) -> Histogram:
        """Return a histogram of nothing."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(cls, values_ns: Sequence[int] | Ints) -> Histogram:
        """Count values, integers `[N]` in nanoseconds."""
        values = np.maximum(np.asarray(values_ns, dtype=np.int64), 0)
        if not values.size:
            return cls.empty()
        bins, counts = np.unique(bins_of(values), return_counts=True)
        floats = values.astype(np.float64)
        return cls(
            bins,
            counts.astype(np.int64),
            int(values.sum()),
            float(floats @ floats),
            int(values.min()),
            int(values.max()),
        )

    @classmethod
    def merge(cls, parts: Iterable[Histogram]) -> Histogram:
        """Add histograms up. The result is the same as from counting all values at once."""
        filled = [part for part in parts if part.bins.size]
        if len(filled) < 2:
            return filled[0] if filled else cls.empty()
        bins, places = np.unique(np.concatenate([part.bins for part in filled]), return_inverse=True)
        counts = np.zeros(bins.size, np.int64)
        np.add.at(counts, places.reshape(-1), np.concatenate([part.counts for part in filled]))
        return cls(
            bins,
            counts,
            sum(part.total_ns for part in filled),
            sum(part.squares for part in filled),
            min(part.min_ns for part in filled if part.min_ns is not None),
            max(part.max_ns for part in filled if part.max_ns is not None),
        )

    @property
    def count(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def mean_ns(self) -> float | None:
        """The exact mean. `None` when empty."""
        return self.total_ns / self.count if self.bins.size else None

    @property
    def std_ns(self) -> float | None:
        """The standard deviation of the population. `None` when empty."""
        if not self.bins.size:
            return None
        mean = self.total_ns / self.count
        return float(max(self.squares / self.count - mean * mean, 0.0) ** 0.5)

    def quantile_ns(self, quantile: float) -> int | None:
        """Return the smallest value not exceeded by at least `quantile` of all values, within 1/2048.

        Args:
            quantile: share of the values, 0 to 1: 0.99 for the p99.

        Returns:
            Nanoseconds, never outside the exact minimum and maximum. `None` when empty.
        """
        if not self.bins.size or self.min_ns is None or self.max_ns is None:
            return None
        rank = max(int(np.ceil(quantile * self.count - 1e-9)), 1)
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        value = int(values_of(self.bins[place : place + 1])[0])
        return min(max(value, self.min_ns), self.max_ns)

    def quantiles_ns(self, quantiles: Sequence[float]) -> tuple[int | None, ...]:
        """Return `quantile_ns` of each of several quantiles."""
        return tuple(self.quantile_ns(quantile) for quantile in quantiles)

    def share_above(self, limit_ns: int) -> float | None:
        """Return the share of values above a limit (to a bin's width), or `None` when empty."""
        if not self.bins.size:
            return None
        return float(self.counts[self.bins > int(bins_of([limit_ns])[0])].sum() / self.count)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON types for `from_json` to restore an equal histogram."""
        return {
            "unit": "ns",
            "sub_buckets": _SUB,
            "bins": self.bins.tolist(),
            "counts": self.counts.tolist(),
            "total_ns": self.total_ns,
            "squares": self.squares,
            "min_ns": self.min_ns,
            "max_ns": self.max_ns,
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Histogram:
        """Restore the result of `to_json`.

        Raises:
            InputError: the data is not such a histogram or has another bin layout.
        """
        try:
            if data["sub_buckets"] != _SUB:
                raise InputError(f"the histogram has {data['sub_buckets']} sub-buckets, expected {_SUB}")
            return cls(
                np.asarray(data["bins"], np.int64),
                np.asarray(data["counts"], np.int64),
                int(data["total_ns"]),  # type: ignore[call-overload]  # checked by the except below
                float(data["squares"]),  # type: ignore[arg-type]  # checked by the except below
                data["min_ns"],  # type: ignore[arg-type]  # to_json writes an integer or null
                data["max_ns"],  # type: ignore[arg-type]  # to_json writes an integer or null
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise InputError(f"the histogram in the report is damaged: {exc!r}") from exc
