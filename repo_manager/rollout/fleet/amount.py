"""A number of servers as people write it: `3`, or `10%` of them."""

from __future__ import annotations

import dataclasses
import re

from repo_manager.errors import UsageError

__all__ = ["NONE", "ONE", "Amount"]

_FORM = re.compile(r"(?P<value>\d+(?:\.\d+)?)(?P<percent>\s*%)?")


@dataclasses.dataclass(frozen=True)
class Amount:
    """A number, or a share of a whole.

    Attributes:
        value: the number, or the per cent.
        percent: which of the two.
    """

    value: float
    percent: bool = False

    @classmethod
    def parse(cls, text: str | int, option: str) -> Amount:
        """Read `3` or `10%`.

        Raises:
            UsageError: it is neither, a fraction of a server, or more than 100 %; with the option's name.
        """
        match = _FORM.fullmatch(str(text).strip())
        amount = None if match is None else cls(float(match["value"]), match["percent"] is not None)
        if amount is None or (amount.percent and amount.value > 100) or (not amount.percent and amount.value % 1):
            raise UsageError(f"{option} {text}: expected a number of servers or a share, for instance 2 or 10%")
        return amount

    def of(self, total: int) -> int:
        """Return how many of `total` that is; shares are rounded down, as Kubernetes does for what may be missing."""
        return int(total * self.value / 100 + 1e-9) if self.percent else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.percent else ''}"


ONE = Amount(1)
NONE = Amount(0)
