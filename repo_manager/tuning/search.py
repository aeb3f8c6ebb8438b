"""Coordinate descent over settings each are held against the best one so far.

A candidate must beat the best by a margin. One with less use of the machine only must be as good. So a candidate is a
question with a yes or no, decided by a few seconds of load, and only a better one is measured to its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repo_manager.tuning.space import BatchTime, Setting, Space

__all__ = [
    "MARGIN",
    "MOST_RIVALS",
    "MeasuredSetting",
    "cost_of",
    "descend",
    "is_open",
    "likely_good",
    "rivals_of",
    "score_of",
]

MARGIN = 0.04
MOST_RIVALS = 12
_MOST_ROUNDS = 4
_NEAR = 0.7  # share of the best's value: from here on another setting is a rival
_OPEN = 1.05  # share of a load with an undecided answer, as a guess of the rate held
_MISSES = 2  # in one direction of an axis: a single one may be chance


def is_open(value: float | None, levels: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no load is shown to hold, and the smallest one is not shown to fail either.

    Args:
        value: the load that holds. `None`: none does.
        levels: the measured load levels, as `MeasuredSetting.levels`. Of a level measured again, the last one counts.
    """
    if value is not None:
        return False
    latest = {float(level["level"]): level["decision"] for level in levels}
    return bool(latest) and latest[min(latest)] == "undecided"


@dataclasses.dataclass(frozen=True)
class MeasuredSetting:
    """One setting, measured.

    Attributes:
        setting: the setting of `model`, where there are several. Else the only one.
        is_better: it beats the setting it was compared with. The first one always does.
        value: its value (the largest passing rate, in requests a second, or the p99 in nanoseconds). `None` where it
            was given up before known.
        reason: the deciding fact, with its numbers.
        seconds: time from loading the copies to the result. 0: the budget ended before.
        against: the value it had to hold. `None` for the first one.
        model: owner of the setting, where there are several.
        state: the settings of all models, where there are several. Empty for one.
        busy: model -> time a second its requests waited and were computed, at the largest load.
        levels: each load level: `label`, `decision`, `throughput_per_s`, `p99_ns`, `reason`, `seconds`.
    """

    setting: Setting
    is_better: bool
    value: float | None
    reason: str
    seconds: float
    against: float | None = None
    levels: tuple[Mapping[str, Any], ...] = ()
    model: str = ""
    state: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    busy: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """In words."""
        if len(self.state) < 2:
            return self.setting.label
        return "; ".join(f"{name}: {setting.label}" for name, setting in self.state.items())

    @property
    def is_open(self) -> bool:
        """Whether it is neither shown to hold a load nor to hold none, see `is_open`."""
        return is_open(self.value, self.levels)

    def of(self, model: str) -> MeasuredSetting:
        """Return the same measurement, as one of another model's setting."""
        return dataclasses.replace(self, model=model, setting=self.state.get(model, self.setting))


Evaluate = Callable[[Setting, "MeasuredSetting | None", float], MeasuredSetting]
"""Measures a setting against the best one so far, by the margin it must beat it by."""


def descend(
    space: Space,
    start: MeasuredSetting,
    guesses: Sequence[Setting],
    evaluate: Evaluate,
    *,
    is_enough: Callable[[MeasuredSetting], bool] = lambda _: False,
) -> MeasuredSetting:
    """Return the best setting found.

    Args:
        space: axes to walk along. Settings it does not allow are skipped.
        start: today's, and others known already.
        guesses: settings tried first, in this order, before any axis.
        evaluate: measures. It may raise to end the search: its results until then are known to the caller.
        is_enough: asked of each better setting. The search ends with the first one it is true of.
    """
    best, tried = start, {start.setting}

    def attempt(setting: Setting) -> bool | None:
        """Measure a setting. Return whether it is better, `None` when it makes no sense."""
        nonlocal best
        if not space.allows(setting):
            return None
        if setting in tried:
            return False
        tried.add(setting)
        is_cheaper = setting.cost < best.setting.cost and best.setting != start.setting
        measured = evaluate(setting, best, 0.0 if is_cheaper else MARGIN)
        best = measured if measured.is_better else best
        return measured.is_better

    def walk(direction: Sequence[Setting]) -> bool:
        """Follow a direction for as long as it is worth it. Return whether it led to a better setting."""
        misses, found = 0, False
        for setting in direction:
            is_better = attempt(setting)
            found = found or bool(is_better)
            misses = 0 if is_better else misses + (is_better is False)
            if misses == _MISSES or (is_better and is_enough(best)):
                break
        return found

    for guess in guesses:
        if attempt(guess) and is_enough(best):
            return best
    for _ in range(_MOST_ROUNDS):
        before = best
        for axis in space.axes:
            up, down = space.along(best.setting, axis)
            if not walk(up):
                walk(down)
            if best is not before and is_enough(best):
                return best
        if best is before:
            walk(space.across(best.setting))
        if best is before or is_enough(best):
            break
    return best


def likely_good(
    space: Space, today: Setting, curve: Sequence[BatchTime], latency_ns: float | None = None
) -> tuple[Setting, ...]:
    """Return likely good settings: one instance with the whole machine, and as many instances as allowed.

    Args:
        space: values of each axis. The returned settings are all allowed in it.
        today: present setting, never returned. Gives the values not searched.
        curve: measured times of batches. Empty: today's batch size is kept.
        latency_ns: the upper limit of the latency. `None` has none.
    """
    sizes, delays = space.axes["max_batch_size"], space.axes["queue_delay"]
    most = space.axes["instances"][-1]
    found = []
    for instances in dict.fromkeys((1 if 1 in space.axes["instances"] else today.instances, most)):
        # Concurrent instances share the machine: each batch takes longer by their number and waits for the one before
        # it.
        fit = [each for each in curve if latency_ns is None or each.median_ns * instances * 2 <= latency_ns]
        best = max(fit or curve[:1], key=lambda each: each.per_s, default=None)
        size = today.max_batch_size
        if best is not None and len(sizes) > 1:
            size = max((each for each in sizes if each <= best.size), default=sizes[0])
        delay = 0 if size > 1 and 0 in delays else today.queue_delay
        threads = today.threads
        if len(space.axes["threads"]) > 1:
            fair = max(1, space.cores // instances)
            threads = max((each for each in space.axes["threads"] if each is not None and each <= fair), default=None)
        found.append(space.as_by_default(Setting(instances, size, delay, threads)))
    return tuple(each for each in found if each != today and space.allows(each))


def rivals_of(best: MeasuredSetting, measured: Sequence[MeasuredSetting], seeks: str) -> list[MeasuredSetting]:
    """Return the few settings that may be better than the best one, the most promising first.

    Args:
        best: the best setting of the search. It holds a value.
        measured: every measurement of the search.
        seeks: `throughput`, `latency` or `energy`.
    """
    found: dict[str, tuple[float, MeasuredSetting]] = {}
    for each in measured:
        score = score_of(each, seeks)
        if score is not None and each.state != best.state:
            known = found.get(each.label)
            found[each.label] = max(known, (score, each), key=lambda pair: pair[0]) if known else (score, each)
    own = score_of(best, seeks)
    assert own is not None
    near = [pair for pair in found.values() if pair[0] >= own * _NEAR]
    near.sort(key=lambda pair: (-pair[0], cost_of(pair[1])))
    return [each for _, each in near[:MOST_RIVALS]]


def score_of(measured: MeasuredSetting, seeks: str) -> float | None:
    """Return how good a setting seems, more is better: also one that was only shown not to beat the best."""
    if seeks != "throughput":
        last = measured.levels[-1] if measured.levels else {}
        number: float | None = measured.value or last.get("p99_ns" if seeks == "latency" else "joules_per_inference")
        return 1 / number if number else None
    if measured.value is not None:
        return measured.value
    asked = [level for level in measured.levels if level.get("throughput_per_s")]
    if not asked:
        return None
    smallest = min(float(level["level"]) for level in asked)
    answered = {level.get("model"): float(level["throughput_per_s"]) for level in asked if level["level"] == smallest}
    return min(smallest, sum(answered.values())) * (_OPEN if measured.is_open else 1.0)


def cost_of(measured: MeasuredSetting) -> tuple[int, ...]:
    """Return what the settings of all models take of the machine, see `Setting.cost`."""
    states = list(measured.state.values()) or [measured.setting]
    return tuple(sum(numbers) for numbers in zip(*(each.cost for each in states), strict=True))
