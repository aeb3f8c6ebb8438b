"""What a comparison is asked to do, and its frozen result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repo_manager.errors import UsageError
from repo_manager.loadtest.target import TargetFacts
from repo_manager.stats.intervals import Interval

__all__ = ["ComparePlan", "CompareProgress", "ComparedNumber", "Comparison"]

_MIN_PAIRS = 6


@dataclasses.dataclass(frozen=True)
class ComparePlan:
    """How long to look.

    Attributes:
        pairs: pairs of blocks, one of A and one of B each; at least 6.
        block_s: measured length of a block.
        settle_s: load before it that is not measured.
        seed: of the order of the blocks and of the resampling.
    """

    pairs: int = 30
    block_s: float = 1.0
    settle_s: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < _MIN_PAIRS or self.block_s <= 0 or self.settle_s < 0:
            raise UsageError(
                f"{self.pairs} pairs of {self.block_s:g} s after {self.settle_s:g} s; expected at least "
                f"{_MIN_PAIRS} pairs, a length above 0 s and 0 s or more before"
            )


@dataclasses.dataclass(frozen=True)
class CompareProgress:
    """Told after each pair of blocks.

    Attributes:
        label: what is compared now: `batch size 8`, and with a control its name.
        pairs_done: of this comparison.
        pairs: of this comparison.
        remaining_s: estimate for this comparison and those after it.
    """

    label: str
    pairs_done: int
    pairs: int
    remaining_s: float


@dataclasses.dataclass(frozen=True)
class ComparedNumber:
    """One number of A and B.

    Attributes:
        name: `throughput`, `mean latency`, `p50 latency`, `p99 latency`, `inferences per joule`.
        a: over all blocks of A (nanoseconds for latencies).
        b: over all blocks of B.
        ratio: B by A, the geometric mean over pairs.
        interval: of the ratio, simultaneous over all compared numbers.
        shown: whether it leaves 1 out.
        better: `A` or `B`; `None` when no difference is shown.
    """

    name: str
    a: float
    b: float
    ratio: float
    interval: Interval
    shown: bool
    better: str | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        verdict: one sentence; "no difference shown" when that is so.
        is_different: whether any number differs.
        ratios: name -> each pair's ratio B/A, in order of time.
        notes: errors, and what was not reported.
    """

    a: TargetFacts
    b: TargetFacts
    level: str
    batch_size: int
    plan: ComparePlan
    numbers: tuple[ComparedNumber, ...]
    verdict: str
    is_different: bool
    ratios: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str]
    schema_version: int = 1
