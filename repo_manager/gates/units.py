"""The units in which limits are written and numbers are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repo_manager.stats.intervals import Interval

__all__ = ["ENERGY", "FACTOR", "RATE", "RATIO", "SHARE", "TIME", "Unit"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One kind of number.

    Attributes:
        sizes: each accepted spelling, in lower case, and its size in the base unit; an empty spelling is no unit.
        shown: spellings for display with their sizes, largest first; a number takes the first that it reaches.
    """

    sizes: Mapping[str, float]
    shown: tuple[tuple[str, float], ...]

    @property
    def spellings(self) -> str:
        """The accepted spellings, for a message."""
        named = ", ".join(filter(None, self.sizes))
        return f"{named} or no unit" if "" in self.sizes else named

    def text(self, value: float, interval: Interval | None = None) -> str:
        """Return `1.39 ms`, or with an interval `1.39 ms [1.23, 1.53]`."""
        name, size = next(((name, size) for name, size in self.shown if value >= size), self.shown[-1])
        text = f"{value / size:.4g} {name}"
        return text if interval is None else f"{text} [{interval.low / size:.4g}, {interval.high / size:.4g}]"


TIME = Unit({"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}, (("s", 1e9), ("ms", 1e6), ("us", 1e3), ("ns", 1.0)))
"""Nanoseconds."""
RATE = Unit({"": 1.0, "/s": 1.0, "infer/s": 1.0, "k/s": 1e3}, (("/s", 1.0),))
"""Inferences a second."""
SHARE = Unit({"%": 0.01, "": 1.0}, (("%", 0.01),))
"""A share, 0 to 1."""
ENERGY = Unit({"j": 1.0, "mj": 1e-3, "": 1.0}, (("J", 1.0),))
"""Joules an inference."""
RATIO = Unit({"": 1.0}, (("", 1.0),))
"""A number without a unit; gates do not take it."""
FACTOR = Unit({"x": 1.0}, (("x of the old version's", 1.0),))
"""A multiple of the old version's number."""
