"""Searches the largest load within gates: bisection, each level measured only until its intervals decide.

The gates are upper limits, harder to hold under more load, so passing levels are below failing ones. From the first
level on the load doubles until one does not hold (or halves until one does). Then the gap is halved until both sides
are within the resolution, or are neighbours. A level is looked at a few times while it runs, at growing distances. It
ends early when a gate fails, or when every gate holds and the windows agree. The intervals are widened so that all
looks at a level together are wrong in 5 % of the cases. A level its whole time does not decide is `undecided`: the
search goes on below it for a level shown to hold, and above it for one shown to fail. The load found is measured once
more for its whole time. When it does not hold then, the search goes on below it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from repo_manager.errors import UsageError
from repo_manager.gates import Gate, Outcome, Verdict, worst
from repo_manager.loadtest.judge import judge_point
from repo_manager.loadtest.measure import EarlyStop, Level
from repo_manager.loadtest.metrics import metric_of
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadPoint, LoadSearch, SearchStep, Window

__all__ = [
    "DECISIONS",
    "LoadSpace",
    "check_gates",
    "conclude",
    "decided",
    "early_stop",
    "longest_level_s",
    "next_level",
    "search_load",
    "search_verdict",
]

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
_LARGEST = {"concurrency": 1024.0, "rate": 1e6}
_SMALLEST_SHARE = 1 / 1024  # share of the first rate of the search
_FEWEST_REQUESTS = 50
_UNDECIDED_IN_A_ROW = 3
_WHOLE_SHARE = 0.9
_MOST_LEVELS = 40
_IS = {HOLDS: "holds", FAILS: "fails", UNDECIDED: "is undecided"}
DECISIONS = {Outcome.PASS: HOLDS, Outcome.FAIL: FAILS, Outcome.INCONCLUSIVE: UNDECIDED}

Measure = Callable[[Level, EarlyStop | None], LoadPoint]


@dataclasses.dataclass(frozen=True)
class LoadSpace:
    """The loads to search for the largest.

    Attributes:
        mode: `concurrency` (whole numbers) or `rate` (requests a second).
        start: level measured first. The load doubles or halves from it.
        lowest: smallest level tried. If it fails, the search ends with `fail`.
        highest: largest level tried. If it holds, it is the answer.
        arrival: how the requests of a rate come.
        resolution: share of the smaller level. Between two levels closer than this, no third one is tried.
    """

    mode: str
    start: float
    lowest: float
    highest: float
    arrival: str = "closed loop"
    resolution: float = 0.05

    @classmethod
    def of(cls, options: LoadTestOptions) -> LoadSpace:
        """Return the space of the options: one level is its beginning, several bound it."""
        mode, given = ("rate", options.rate) if options.rate else ("concurrency", options.concurrency or (1,))
        start, largest = float(min(given)), float(max(given))
        is_bounded = len(given) > 1
        if mode == "concurrency":
            lowest, arrival = (start if is_bounded else 1.0), "closed loop"
        else:
            # Below this rate, even the longest level has too few requests for a confidence interval.
            smallest = max(start * _SMALLEST_SHARE, _FEWEST_REQUESTS / longest_level_s(options))
            lowest, arrival = (start if is_bounded else min(smallest, start)), options.arrival
        highest = largest if is_bounded else max(_LARGEST[mode], start)
        return cls(mode, start, lowest, highest, arrival, options.resolution)

    def level(self, size: float) -> Level:
        """Return one level of the space."""
        return Level(self.mode, size, self.arrival)

    def between(self, low: float, high: float) -> float | None:
        """Return the level to try between two, or `None` when they are close enough."""
        if high <= low * (1 + self.resolution):
            return None
        if self.mode == "concurrency":
            middle = (int(low) + int(high)) // 2
            return None if middle in (int(low), int(high)) else float(middle)
        return float(f"{(low + high) / 2:.4g}")


def check_gates(gates: Sequence[Gate]) -> None:
    """Check whether a load can be searched by the gates.

    Raises:
        UsageError: one is bound to a level, or is no upper limit of a number growing with the load.
    """
    for gate in gates:
        if gate.level is not None:
            raise UsageError(f"the gate {gate.text!r} names a level, and the search is to find it")
        metric = metric_of(gate.metric)
        if not gate.below or not (metric.is_latency or gate.metric in ("errors", "queue")):
            raise UsageError(
                f"no load can be searched by the gate {gate.text!r}",
                hint="Expected an upper limit of a latency, of errors or of queue, which more load makes harder to "
                "hold; --slo judges any gate at the load that is found.",
            )


def search_load(space: LoadSpace, options: LoadTestOptions, measure: Measure) -> Iterator[tuple[LoadPoint, SearchStep]]:
    """Measure level after level until the largest load within `options.until` is known, or cannot be known.

    Args:
        space: the loads to search, and the first one.
        options: gates and the longest time of a level.
        measure: measures one level until the early stop says it is enough. For its whole time without one.

    Yields:
        Each level's row and decision, in the order of measurement. A level on which no request ended
        well is the last: the server has failed.
    """
    steps: list[SearchStep] = []
    early = early_stop(options)
    while len(steps) < _MOST_LEVELS:
        stop: EarlyStop | None = early
        size = next_level(space, steps)
        if size is None:
            size, stop = _unconfirmed(steps, longest_level_s(options)), None
        if size is None:
            return
        point = measure(space.level(size), stop)
        outcome, reason = decided(point, options.until, 1 if stop is None else len(early.after_windows))
        steps.append(SearchStep(size, point.label, DECISIONS[outcome], reason, point.duration_s))
        yield point, steps[-1]
        if point.outcome == "failed":
            return


def _unconfirmed(steps: Sequence[SearchStep], longest_s: float) -> float | None:
    """Return the largest passing load when its decision comes from a part of the time only."""
    holds, _, _ = _bracket(steps)
    is_whole = any(step.level == holds and step.seconds > _WHOLE_SHARE * longest_s for step in steps)
    return None if is_whole else holds


def longest_level_s(options: LoadTestOptions) -> float:
    """Return how long a level of a search is measured at most."""
    return options.duration_s or options.max_windows * options.window_s


def early_stop(options: LoadTestOptions) -> EarlyStop:
    """Return the moments to look at a level of the search, and the rule to end it."""
    longest_s = longest_level_s(options)
    windows = max(round(longest_s / min(options.window_s, longest_s / options.stable_windows)), 1)
    looks, following = [], [2, 3]
    while following[0] < windows:
        looks.append(following[0])
        following = [following[1], sum(following)]
    after = frozenset({*looks, windows})

    def may_decide(measured: list[Window]) -> bool:
        """Return whether no gate has windows on both sides of its limit."""
        for gate in options.until:
            of_window = metric_of(gate.metric).of_window
            values = [value for window in measured if (value := of_window(window)) is not None]
            if len({value < gate.limit for value in values}) > 1:
                return False
        return True

    def is_enough(point: LoadPoint) -> bool:
        outcome, _ = decided(point, options.until, len(after))
        return outcome is Outcome.FAIL or (outcome is Outcome.PASS and point.outcome == "stable")

    return EarlyStop(after, may_decide, is_enough)


def decided(point: LoadPoint, gates: Sequence[Gate], looks: int) -> tuple[Outcome, str]:
    """Return the decision of a level's numbers on all gates together, and the deciding gates.

    Args:
        point: row of the load level.
        gates: limits for the level to hold, all of them. Not bound to a level.
        looks: how often the level is judged while it runs, see `judge_point`.
    """
    if point.outcome in ("failed", "overloaded"):
        return Outcome.FAIL, point.reason
    results = [judge_point(point, gate, looks=looks) for gate in gates]
    outcome = worst(result.outcome for result in results)
    return outcome, "; ".join(result.why for result in results if result.outcome is outcome)


def next_level(space: LoadSpace, steps: Sequence[SearchStep]) -> float | None:
    """Return the level to measure after `steps`, or `None` when no further one would say more."""
    if not steps:
        return space.start
    holds, fails, undecided = _bracket(steps)
    tried = {step.level for step in steps}
    if holds is None:
        return _without_hold(space, steps)
    above = min((level for level in (*undecided, fails) if level is not None), default=None)
    if above is None:
        return None if holds >= space.highest else min(holds * 2, space.highest)
    middle = space.between(holds, above)
    if middle is not None and middle not in tried:
        return middle
    if not undecided:
        return None
    top = max(undecided)
    if fails is None:
        return None if top >= space.highest else min(top * 2, space.highest)
    middle = space.between(top, fails)
    return None if middle is None or middle in tried else middle


def _without_hold(space: LoadSpace, steps: Sequence[SearchStep]) -> float | None:
    """Return the next level while none passes: below a failing one, above one undecided for want of requests."""
    steps = _latest(steps)
    lowest, highest = (pick(steps, key=lambda step: step.level) for pick in (min, max))
    if highest.decision == UNDECIDED and highest.level < space.highest:
        return min(highest.level * 2, space.highest)
    last = sorted(steps, key=lambda step: step.level)[:_UNDECIDED_IN_A_ROW]
    is_hopeless = len(last) == _UNDECIDED_IN_A_ROW and all(step.decision == UNDECIDED for step in last)
    return None if lowest.level <= space.lowest or is_hopeless else _smaller(space, lowest.level)


def _smaller(space: LoadSpace, size: float) -> float:
    half = float(int(size) // 2) if space.mode == "concurrency" else float(f"{size / 2:.4g}")
    return max(half, space.lowest)


def _latest(steps: Sequence[SearchStep]) -> list[SearchStep]:
    """Return the steps to count: of a level measured again, the last one."""
    return list({step.level: step for step in steps}.values())


def _bracket(steps: Sequence[SearchStep]) -> tuple[float | None, float | None, list[float]]:
    """Return the largest passing level, the smallest failing one above it, and the undecided ones between."""
    steps = _latest(steps)
    holds = max((step.level for step in steps if step.decision == HOLDS), default=None)
    above = [step for step in steps if holds is None or step.level > holds]
    fails = min((step.level for step in above if step.decision == FAILS), default=None)
    undecided = [step.level for step in above if step.decision == UNDECIDED and (fails is None or step.level < fails)]
    return holds, fails, undecided


def conclude(space: LoadSpace, gates: Sequence[Gate], steps: Sequence[SearchStep]) -> LoadSearch:
    """Return the conclusion of the measured levels on the largest load.

    Args:
        space: the loads of the search.
        gates: gates of the search. Only their texts are kept, the decisions are in `steps`.
        steps: the measured levels, in order.
    """
    holds, fails, undecided = _bracket(steps)
    outcome, reason = _answer(space, steps, (holds, fails, undecided))
    return LoadSearch(
        gates=tuple(gate.text for gate in gates),
        mode=space.mode,
        outcome=str(outcome),
        reason=reason,
        holds=holds,
        fails=fails,
        steps=tuple(steps),
        resolution=space.resolution,
    )


def _answer(
    space: LoadSpace, steps: Sequence[SearchStep], bracket: tuple[float | None, float | None, list[float]]
) -> tuple[Outcome, str]:
    holds, fails, undecided = bracket

    def name(size: float) -> str:
        return space.level(size).label

    open_levels = f"; {', '.join(map(name, sorted(undecided)))} undecided" if undecided else ""
    if holds is None:
        lowest = min(_latest(steps), key=lambda step: step.level, default=None)
        if lowest is None:
            return Outcome.INCONCLUSIVE, "no level was measured"
        if lowest.decision == FAILS and (lowest.level <= space.lowest):
            return Outcome.FAIL, f"no load holds: {lowest.label} already fails ({lowest.reason})"
        return (
            Outcome.INCONCLUSIVE,
            f"no load is shown to hold: {lowest.label} {_IS[lowest.decision]} ({lowest.reason})",
        )
    contrary = [step.label for step in _latest(steps) if step.decision == FAILS and step.level < holds]
    if contrary:
        return (
            Outcome.INCONCLUSIVE,
            f"{name(holds)} holds although {', '.join(contrary)} failed: the server or the machine was not steady",
        )
    if fails is None:
        if holds >= space.highest:
            return Outcome.PASS, f"{name(holds)} holds, the largest load to be tried"
        return Outcome.INCONCLUSIVE, f"{name(holds)} holds, and no load is shown to fail{open_levels}"
    words = f"{name(holds)} holds, {name(fails)} fails{open_levels}"
    if undecided and space.between(holds, fails) is not None:
        return Outcome.INCONCLUSIVE, f"{words}: measure longer (--duration) to tell them apart"
    return (Outcome.PASS if space.between(holds, fails) is None else Outcome.INCONCLUSIVE), words


def search_verdict(search: LoadSearch, points: Sequence[LoadPoint]) -> Verdict:
    """Return a search as a verdict: its outcome and the passing levels. The reasons are in the search itself."""
    held = {step.level for step in _latest(search.steps) if step.decision == HOLDS}
    return Verdict(Outcome(search.outcome), (), tuple(point.label for point in points if point.level in held))
