"""The percentiles of latency reported, each written once.

A percentile is one field of `Quantiles`: the load test's rows and their intervals, the gates of load tests and of
trials, and every report take it from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, Literal, TypeVar

__all__ = ["PERCENTILES", "Percentile", "Place", "Quantiles"]

T = TypeVar("T")
Place = Literal["terminal", "markdown", "html", "html interval", "baseline", "compare"]
"""Where a number is a column (the three reports), has its interval shown, or is compared."""

_REPORTS: tuple[Place, ...] = ("terminal", "markdown", "html")


def _row(share: float, *places: Place, has_interval: bool = True) -> dict[str, Any]:
    """Return the names of a percentile.

    Args:
        share: the quantile, 0 to 1: 0.99 for `p99`.
        places: where it is shown. Gates and OpenMetrics take every percentile.
        has_interval: whether a bootstrap over a few thousand requests can give it one.
    """
    return {"share": share, "places": frozenset(places), "has_interval": has_interval}


@dataclasses.dataclass(frozen=True)
class Quantiles(Generic[T]):
    """Something about each percentile. `None` where it is not known."""

    p50_ns: T | None = dataclasses.field(default=None, metadata=_row(0.5, *_REPORTS, "baseline", "compare"))
    p90_ns: T | None = dataclasses.field(default=None, metadata=_row(0.9, *_REPORTS))
    p95_ns: T | None = dataclasses.field(default=None, metadata=_row(0.95, *_REPORTS))
    p99_ns: T | None = dataclasses.field(
        default=None, metadata=_row(0.99, *_REPORTS, "html interval", "baseline", "compare")
    )
    p995_ns: T | None = dataclasses.field(default=None, metadata=_row(0.995, "html"))
    p999_ns: T | None = dataclasses.field(default=None, metadata=_row(0.999, has_interval=False))


@dataclasses.dataclass(frozen=True)
class Percentile:
    """One field of `Quantiles`.

    Attributes:
        key: name in gates and reports, as a percentage: `p99.9`.
        field: name of the field: `p999_ns`.
    """

    key: str
    field: str
    share: float
    places: frozenset[Place]
    has_interval: bool


PERCENTILES = tuple(
    Percentile(f"p{100 * field.metadata['share']:g}", field.name, **field.metadata)
    for field in dataclasses.fields(Quantiles)
)
