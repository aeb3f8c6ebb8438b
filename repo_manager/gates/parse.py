"""Reads gates: `p99<20ms`, `throughput>500`, `errors<0.1%`, `p99<1.2x`, `mean<5ms@16`.

A load test and a trial differ in what can be measured, so each has a `Grammar`: its metrics with their units and sides.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from repo_manager.errors import UsageError
from repo_manager.gates.units import FACTOR, Unit

__all__ = ["Gate", "Grammar", "Subject"]

_NUMBER = r"[0-9]*\.?[0-9]+"
_PATTERN = re.compile(
    rf"^\s*([a-z0-9.]+)\s*(<=|>=|<|>)\s*({_NUMBER}(?:e[+-]?[0-9]+)?)\s*([a-zµ%/]*)\s*(?:@\s*({_NUMBER}|[0-9]+\.))?\s*$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        text: as it was given.
        metric: `p99`, `throughput`, `errors`, `drift`, ...
        below: whether the number has to be below the limit (else above).
        limit: in the base unit of the metric, or with `relative` a factor of the old version's number.
        relative: whether the limit is a factor.
        level: only at this load level; `None`: at every one.
    """

    text: str
    metric: str
    below: bool
    limit: float
    relative: bool = False
    level: float | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """A metric that a gate may name.

    Attributes:
        unit: of the limit.
        side: the only sense that the gate may have, `<` or `>`; `None` allows both.
        has_factor: whether the limit may also be a multiple of the old version's number (`1.2x`).
        is_share: whether a limit above 1 is a mistake.
    """

    unit: Unit
    side: str | None = None
    has_factor: bool = False
    is_share: bool = False


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The gates of one command.

    Attributes:
        subjects: by name, in lower case.
        examples: for the message about a text that is no gate.
        has_levels: whether a gate may name a load level (`@16`).
    """

    subjects: Mapping[str, Subject]
    examples: tuple[str, ...]
    has_levels: bool = False

    def parse(self, text: str) -> Gate:
        """Parse one gate.

        Raises:
            UsageError: unknown metric or unit, a side that the metric does not have, or another form.
        """
        name = f"the gate {text.strip()!r}"
        match = _PATTERN.match(text)
        if match is None:
            examples = ", ".join(f'"{example}"' for example in self.examples)
            raise UsageError(
                f"{name} cannot be read",
                hint=f"Expected METRIC < or > LIMIT, as in {examples}. Metrics: {', '.join(self.subjects)}.",
            )
        metric, sign, number, unit = (part.lower() for part in match.groups()[:4])
        level = match.group(5)
        subject = self.subjects.get(metric)
        if subject is None:
            raise UsageError(f"{name} names {metric!r}, expected one of {', '.join(self.subjects)}")
        if subject.side is not None and not sign.startswith(subject.side):
            raise UsageError(f"{name} has {sign}, expected {subject.side}: {metric} has a limit on that side")
        if level is not None and not self.has_levels:
            raise UsageError(f"{name} names a load level (@{level}), which only the gates of a load test have")
        units = {**FACTOR.sizes, **subject.unit.sizes} if subject.has_factor else subject.unit.sizes
        if unit not in units:
            expected = f"{FACTOR.spellings}, {subject.unit.spellings}" if subject.has_factor else subject.unit.spellings
            raise UsageError(f"{name} has the unit {unit!r}, expected one of {expected}")
        limit = float(number) * units[unit]
        if subject.is_share and limit > 1:
            raise UsageError(f"{name} asks for more than 100 %", hint="Write a share with %, or 0 to 1.")
        relative = subject.has_factor and unit in FACTOR.sizes
        return Gate(
            text.strip(), metric, sign.startswith("<"), limit, relative, None if level is None else float(level)
        )

    def parse_all(self, text: str) -> tuple[Gate, ...]:
        """Parse gates separated by commas; empty parts are left out.

        Raises:
            UsageError: as `parse`.
        """
        return tuple(self.parse(part) for part in text.split(",") if part.strip())
