"""The aim of a tuning, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from repo_manager.accuracy.evaluate import AccuracyOptions
from repo_manager.errors import UsageError
from repo_manager.gates import Gate
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.metrics import metric_of
from repo_manager.loadtest.options import Arrival
from repo_manager.loadtest.search import check_gates
from repo_manager.server.transport import ClientOptions
from repo_manager.stats.accuracy import Accuracy
from repo_manager.tuning.race import Finalist
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import AXES, BatchTime
from repo_manager.validation import check_fields

__all__ = [
    "BETTER",
    "KEPT",
    "NONE_HOLDS",
    "UNDECIDED",
    "Objective",
    "TuneOptions",
    "TuneProgress",
    "Tuning",
    "conclude",
    "objective_of",
    "value_text",
]

Objective = Literal["throughput", "latency", "energy"]

BETTER, KEPT, NONE_HOLDS, UNDECIDED = "better", "kept", "none holds", "undecided"
_LEVEL_S = (2.0, 6.0)
_LEVEL_SHARE = 1 / 50


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """The aim of a tuning, and the way to it.

    Attributes:
        gates: upper limits for every model asked.
        own_gates: model -> further ones it must hold.
        objective: `throughput` (the largest rate within the gates), `latency` (the lowest p99 at `rate`) or `energy`
            (the most inferences per joule at `rate`). `None`: latency where a rate is given, else throughput.
        rate: requests a second. `None`: for energy nine tenths of the largest rate today's setting holds.
        mix: model -> how many of the requests it gets beside the others', where several are tuned together. Where none
            are given, as many as it answers when it is asked alone, one request at a time.
        arrival: `poisson`, `constant` or another arrival of requests, as in `loadtest`.
        budget_s: longest duration of the whole tuning. Up to a quarter of it is kept for the proof.
        search: the axes searched. Others keep today's value.
        fixed: fields of config.pbtxt (of one of several models: MODEL:FIELD) set in advance, in today's configuration
            as well as in all others.
        load: more settings of `LoadTestOptions`: shapes, ranges, data, seed.
        url: a server for the copies, by its load API. `None` starts one on this machine.
        access: how the server is reached. `None` without TLS and headers.
        fresh: forget an earlier run's measurements.
        accuracy: held-out data each setting is scored on, by one request per sample, and the limits of the score. The
            source of `max_drop` is today's setting. `None` scores nothing.
        signed_by: public keys of which one must vouch for each version run. Empty asks for no signature.
    """

    gates: tuple[Gate, ...] = ()
    own_gates: Mapping[str, tuple[Gate, ...]] = dataclasses.field(default_factory=dict)
    objective: Objective | None = None
    rate: float | None = None
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arrival: Arrival = "poisson"
    budget_s: float = 900.0
    search: tuple[str, ...] = AXES
    fixed: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str | None = None
    access: ClientOptions | None = None
    fresh: bool = False
    accuracy: AccuracyOptions | None = None
    signed_by: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Check whether they fit together."""
        check_fields(self)
        gates = (*self.gates, *(gate for own in self.own_gates.values() for gate in own))
        if not gates and self.rate is None:
            raise UsageError(
                "there is nothing to tune for", hint='Give a limit (--slo "p99<20ms"), or a rate (--rate 300), or both.'
            )
        if self.objective == "latency" and self.rate is None:
            raise UsageError("the lowest p99 needs a rate, but none is given", hint="Give one: --rate 300.")
        if self.objective == "throughput" and self.rate is not None:
            raise UsageError("the largest rate is sought, and a rate is given", hint="Leave --rate out.")
        check_gates(gates)
        unknown = [axis for axis in self.search if axis not in AXES]
        if unknown or not self.search:
            raise UsageError(f"{', '.join(unknown) or 'nothing'} cannot be searched", hint=f"Axes: {', '.join(AXES)}.")
        if self.budget_s <= 0 or (self.rate is not None and self.rate <= 0):
            raise UsageError("the budget and the rate have to be more than 0")
        if any(share <= 0 for share in self.mix.values()):
            raise UsageError("each model's part of the mix has to be more than 0")

    def check_models(self, tops: Sequence[str]) -> None:
        """Check options of single models: each must be of a model asked, and be given for each of them.

        Args:
            tops: names of the models to tune.

        Raises:
            UsageError: an option is of another model, or missing for one.
        """
        strange = [name for name in (*self.own_gates, *self.mix) if name not in tops]
        if strange:
            raise UsageError(f"{', '.join(strange)} is not tuned", hint=f"Models: {', '.join(tops)}.")
        if self.mix and set(self.mix) != set(tops):
            raise UsageError("the mix leaves models out", hint=f"Give a number for each of {', '.join(tops)}.")
        if len(tops) > 1 and self.accuracy is not None:
            raise UsageError("held-out data belong to one model, and several are tuned", hint="Leave --eval out.")
        if len(tops) > 1 and self.seeks != "throughput":
            raise UsageError(
                "several models together are tuned for the largest rate only",
                hint='Give limits instead: --slo "p99<20ms", or for one of them --slo "NAME:p99<20ms".',
            )
        without = [name for name in tops if not self.gates_of(name)]
        if without and self.seeks == "throughput":
            raise UsageError(f"{', '.join(without)} has no limit to hold", hint='Give one: --slo "NAME:p99<20ms".')

    @property
    def seeks(self) -> Objective:
        """The objective."""
        return self.objective or ("throughput" if self.rate is None else "latency")

    def gates_of(self, model: str) -> tuple[Gate, ...]:
        """Return the gates a model must hold."""
        return (*self.gates, *self.own_gates.get(model, ()))

    @property
    def level_s(self) -> float:
        """The longest time of one load level, in seconds. It may be decided earlier."""
        return min(max(self.budget_s * _LEVEL_SHARE, _LEVEL_S[0]), _LEVEL_S[1])

    def latency_ns(self, model: str) -> float | None:
        """Return the lowest upper limit of a latency among the gates of a model, in nanoseconds. `None` has none."""
        return min((gate.limit for gate in self.gates_of(model) if metric_of(gate.metric).is_latency), default=None)

    def tightest_s(self, models: Iterable[str]) -> float:
        """Return the lowest of these upper limits among several models, in seconds. 0: none of them has one."""
        return min((limit for name in models if (limit := self.latency_ns(name)) is not None), default=0.0) / 1e9


@dataclasses.dataclass(frozen=True)
class TuneProgress:
    """Told after each measurement.

    Attributes:
        text: the measurement, and its result.
        remaining_s: seconds left of the budget, never below 0.
        best: the best setting so far, and its value. Empty as long as there is none.
    """

    text: str
    remaining_s: float
    best: str = ""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of a tuning.

    Attributes:
        model: the tuned models asked for, with their versions.
        versions: every measured model -> its version.
        outcome: `better` (the comparison shows it), `kept` (today's is as good), `none holds` or `undecided` (the
            budget ended first).
        reason: the outcome in one sentence.
        seeks: `throughput`, `latency` or `energy`, and so the unit of values: requests a second, nanoseconds, joules
            an inference.
        objective: the aim in words, with its gates and rate, by `objective_of`.
        today: today's setting, measured. Its `seconds` are 0 if the budget ended before it.
        best: the best found. `today` where nothing beat it.
        changes: model -> fields of config.pbtxt from today's to the best. Empty unless the outcome is `better`.
        trials: every setting measured, in order. Empty where the budget ended before today's was.
        curves: model -> the time of one batch by its size.
        settings: how many settings there are in the space.
        left_out: settings not tried, and why.
        finalists: the best settings of the search as the race left them, the winner first.
        comparisons: today's against the best, paired, for each model asked. Empty where there was nothing to compare.
        is_complete: the search ended on its own, not by the budget.
        journal: the file with every measurement.
        accuracy: the best setting's score on the held-out data, with today's as the source. `None` without data.
    """

    model: str
    versions: Mapping[str, int]
    outcome: str
    reason: str
    seeks: Objective
    objective: str
    today: MeasuredSetting
    best: MeasuredSetting
    changes: Mapping[str, Mapping[str, str | None]]
    trials: tuple[MeasuredSetting, ...]
    curves: Mapping[str, tuple[BatchTime, ...]]
    settings: int
    left_out: tuple[str, ...]
    finalists: tuple[Finalist, ...]
    comparisons: tuple[Comparison, ...]
    is_complete: bool
    seconds: float
    journal: str
    environment: Mapping[str, str]
    command: str = ""
    accuracy: Accuracy | None = None
    schema_version: int = 1


def conclude(
    options: TuneOptions,
    measured: Sequence[MeasuredSetting],
    best: MeasuredSetting,
    comparisons: Sequence[Comparison],
    *,
    is_complete: bool,
) -> tuple[str, str]:
    """Return the outcome and its reason.

    Args:
        options: goal and limits of the search.
        measured: the measurements, today's setting first.
        best: the best of `measured`. Its `value` is `None` where none is shown to hold.
        comparisons: today's against the best. None where nothing holds, or they are the same.
        is_complete: whether the search ended on its own.
    """
    today = measured[0]
    if best.value is None:
        nearest = min(measured, key=_distance)
        said = f"the nearest is {nearest.label}: {nearest.reason}"
        ended = f"the budget of {options.budget_s:.0f} s ended before"
        if not today.seconds:
            return UNDECIDED, f"{ended} today's setting ({today.label}) was measured"
        if not is_complete:
            return UNDECIDED, f"{ended} a setting was shown to hold {objective_of(options)}; {said}"
        if any(each.is_open for each in measured):
            return UNDECIDED, f"no setting is shown to hold {objective_of(options)}, or to fail it; {said}"
        return NONE_HOLDS, f"no setting holds {objective_of(options)}; {said}"
    found = f"{best.label} {_held(best.value, options)}"
    fails = today.value is None and not today.is_open
    if _show(comparisons, options, is_enough_not_worse=fails):
        own = f"holds none: {today.reason}" if today.value is None else _held(today.value, options)
        return BETTER, f"{found}; today's ({today.label}) {own}"
    if not is_complete:
        return UNDECIDED, f"the budget of {options.budget_s:.0f} s ended; the best so far: {found}"
    if comparisons:
        verdict = "; ".join(each.verdict for each in comparisons)
        return KEPT, f"{found}, but the comparison with today's shows no gain in the objective: {verdict}"
    return KEPT, f"today's setting ({found}) is the best of {len(measured)} that were measured"


def objective_of(options: TuneOptions) -> str:
    """Return the aim, in words."""
    own = [f"{name}: {gate.text}" for name, gates in options.own_gates.items() for gate in gates]
    gates = ", ".join([*(gate.text for gate in options.gates), *own])
    if options.seeks == "throughput":
        return f"the largest rate with {gates}"
    at = "nine tenths of today's largest rate" if options.rate is None else f"{options.rate:g} requests/s"
    what = "lowest p99" if options.seeks == "latency" else "most inferences per joule"
    return f"the {what} at {at}" + (f" with {gates}" if gates else "")


def value_text(seeks: Objective, value: float) -> str:
    """Return a value with its unit."""
    if seeks == "throughput":
        rounded = float(f"{value:.4g}")
        return f"{rounded:,.0f} requests/s" if rounded >= 1000 else f"{rounded:.4g} requests/s"
    return f"p99 {value / 1e6:.3g} ms" if seeks == "latency" else f"{1 / value:.4g} inferences/J"


def _held(value: float, options: TuneOptions) -> str:
    text = value_text(options.seeks, value)
    return f"holds {text}" if options.seeks == "throughput" else f"has {text}"


def _show(comparisons: Sequence[Comparison], options: TuneOptions, *, is_enough_not_worse: bool) -> bool:
    """Return whether the comparisons show B better in the objective somewhere, and A nowhere.

    Under the same load the larger rate shows as a shorter p99, as a shorter latency of a gate or as more throughput.
    Another latency is no evidence: a smaller queue delay shortens the median, and the machine answers no more. For
    energy a longer p99 is no loss: the gates hold it.

    Args:
        comparisons: today's, A, against the best, B.
        options: the objective decides the numbers in which B must and A may not be better.
        is_enough_not_worse: the measurements of the search show that B holds the limits and A does not.
    """
    told = [{number.name: number.better for number in each.numbers if number.shown} for each in comparisons]
    names = ("inferences per joule",) if options.seeks == "energy" else ("p99 latency", "throughput")
    if any(each.get(name) == "A" for each in told for name in names):
        return options.seeks == "energy" and any("B" in (each.get(name) for name in names) for each in told)
    if options.seeks == "throughput":
        gates = (*options.gates, *(gate for own in options.own_gates.values() for gate in own))
        names = (*names, *(f"{gate.metric} latency" for gate in gates))
    return is_enough_not_worse or any(each.get(name) == "B" for each in told for name in names)


def _distance(measured: MeasuredSetting) -> float:
    """Return how far a failed setting is from passing: its lowest p99."""
    return min((level["p99_ns"] for level in measured.levels if level["p99_ns"]), default=float("inf"))
