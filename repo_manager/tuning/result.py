"""What a tuning seeks, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from repo_manager.errors import UsageError
from repo_manager.gates import Gate
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.metrics import metric_of
from repo_manager.loadtest.options import Arrival
from repo_manager.loadtest.search import check_gates
from repo_manager.server.transport import ClientOptions
from repo_manager.tuning.search import Trial
from repo_manager.tuning.space import AXES, BatchTime
from repo_manager.validation import check_fields

__all__ = [
    "BETTER",
    "KEPT",
    "NONE_HOLDS",
    "UNDECIDED",
    "TuneOptions",
    "TuneProgress",
    "Tuning",
    "conclude",
    "objective_of",
]

BETTER, KEPT, NONE_HOLDS, UNDECIDED = "better", "kept", "none holds", "undecided"
_LEVEL_S = (2.0, 6.0)
_LEVEL_SHARE = 1 / 50


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """What is sought, and how.

    Attributes:
        gates: upper limits that have to be held; without `rate`, the largest rate that holds them is sought.
        rate: requests a second at which the lowest p99 is sought; `None` seeks the largest rate.
        arrival: how requests come.
        budget_s: the longest that all may take; a quarter of it is kept for the proof.
        search: the axes that are searched; others keep today's value.
        fixed: fields of config.pbtxt that are set beforehand, in today's configuration as well as in all others.
        load: more settings of `LoadTestOptions`: shapes, ranges, data, seed.
        url: a server that takes the copies, by its load API; `None` starts one on this machine.
        access: how that server is reached; `None` without TLS and headers.
        fresh: forget what an earlier run measured.
    """

    gates: tuple[Gate, ...] = ()
    rate: float | None = None
    arrival: Arrival = "poisson"
    budget_s: float = 900.0
    search: tuple[str, ...] = AXES
    fixed: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str | None = None
    access: ClientOptions | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        """See that they hold together."""
        check_fields(self)
        if not self.gates and self.rate is None:
            raise UsageError(
                "there is nothing to tune for", hint='Give a limit (--slo "p99<20ms"), or a rate (--rate 300), or both.'
            )
        check_gates(self.gates)
        unknown = [axis for axis in self.search if axis not in AXES]
        if unknown or not self.search:
            raise UsageError(f"{', '.join(unknown) or 'nothing'} cannot be searched", hint=f"Axes: {', '.join(AXES)}.")
        if self.budget_s <= 0 or (self.rate is not None and self.rate <= 0):
            raise UsageError("the budget and the rate have to be more than 0")

    @property
    def level_s(self) -> float:
        """The longest that one load level is measured, in seconds: it may be decided earlier."""
        return min(max(self.budget_s * _LEVEL_SHARE, _LEVEL_S[0]), _LEVEL_S[1])

    @property
    def latency_ns(self) -> float | None:
        """The lowest upper limit of a latency among the gates, in nanoseconds."""
        return min((gate.limit for gate in self.gates if metric_of(gate.metric).is_latency), default=None)


@dataclasses.dataclass(frozen=True)
class TuneProgress:
    """Told after each measurement.

    Attributes:
        text: what was measured, and what came of it.
        remaining_s: of the budget.
    """

    text: str
    remaining_s: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What came of a tuning.

    Attributes:
        outcome: `better` (the comparison shows it), `kept` (today's is as good), `none holds` or `undecided` (the
            budget ended first).
        reason: the outcome in one sentence.
        objective: what was sought.
        today: today's setting, measured.
        best: the best that was found; `today` where nothing beat it.
        changes: fields of config.pbtxt from today's to the best; empty unless the outcome is `better`.
        trials: every setting that was measured, in order.
        curve: the time of one batch by its size.
        settings: how many settings there are in the space.
        comparison: today's against the best, paired; `None` where there was nothing to compare.
        is_complete: the search ended by itself, not by the budget.
        journal: the file with every measurement.
    """

    model: str
    version: int
    outcome: str
    reason: str
    objective: str
    today: Trial
    best: Trial
    changes: Mapping[str, str | None]
    trials: tuple[Trial, ...]
    curve: tuple[BatchTime, ...]
    settings: int
    comparison: Comparison | None
    is_complete: bool
    seconds: float
    journal: str
    environment: Mapping[str, str]
    command: str = ""
    schema_version: int = 1


def conclude(
    options: TuneOptions, trials: Sequence[Trial], best: Trial, comparison: Comparison | None, *, is_complete: bool
) -> tuple[str, str]:
    """Return the outcome and its reason.

    Args:
        options: what was sought.
        trials: what was measured, today's setting first.
        best: the best of them.
        comparison: today's against the best; `None` where one of them holds nothing, or they are the same.
        is_complete: whether the search ended by itself.
    """
    today = trials[0]
    if best.value is None:
        nearest = min(trials, key=_distance)
        return (
            NONE_HOLDS if is_complete else UNDECIDED,
            f"no setting holds {objective_of(options)}; the nearest is {nearest.setting.label}: {nearest.reason}",
        )
    found = f"{best.setting.label} {_held(best.value, options)}"
    if today.value is None:
        return BETTER, f"{found}; today's ({today.setting.label}) holds none: {today.reason}"
    if comparison is not None and _shows(comparison):
        return BETTER, f"{found}; today's ({today.setting.label}) {_held(today.value, options)}"
    if not is_complete:
        return UNDECIDED, f"the budget of {options.budget_s:.0f} s ended; the best so far: {found}"
    if comparison is not None:
        return KEPT, f"{found}, but against today's no difference is shown: {comparison.verdict}"
    return KEPT, f"today's setting ({found}) is the best of {len(trials)} that were measured"


def objective_of(options: TuneOptions) -> str:
    """Return what is sought, in words."""
    gates = ", ".join(gate.text for gate in options.gates)
    if options.rate is None:
        return f"the largest rate with {gates}"
    return f"the lowest p99 at {options.rate:g} requests/s" + (f" with {gates}" if gates else "")


def _held(value: float, options: TuneOptions) -> str:
    if options.rate is None:
        return f"holds {value:.4g} requests/s"
    return f"has a p99 of {value / 1e6:.3g} ms"


def _shows(comparison: Comparison) -> bool:
    """Say whether the comparison shows that B is better in latency or throughput, and A in neither."""
    told = {number.name: number.better for number in comparison.numbers if number.shown}
    return "B" in told.values() and "A" not in (told.get("p99 latency"), told.get("throughput"))


def _distance(trial: Trial) -> float:
    """Return how far a setting that holds nothing is from holding: its lowest p99."""
    return min((level["p99_ns"] for level in trial.levels if level["p99_ns"]), default=float("inf"))
