"""Coordinate descent over settings that each are held against the best one so far.

A candidate has to beat the best by a margin; one that takes less of the machine only has to be as good. So a candidate
is a question with a yes or no, which a few seconds of load decide, and only a better one is measured to its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from repo_manager.tuning.space import Setting, Space

__all__ = ["MARGIN", "Trial", "descend"]

MARGIN = 0.05
_MOST_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting, measured.

    Attributes:
        setting: which.
        is_better: it holds more than what it was held against; the first one always is.
        value: what is sought of it (the largest rate that holds, in requests a second, or the p99 in nanoseconds);
            `None` where it was given up before that was known.
        reason: what decided, with its numbers.
        seconds: what the measuring took.
        against: the value that it had to hold; `None` for the first one.
        levels: each load level: `label`, `decision`, `throughput_per_s`, `p99_ns`, `reason`, `seconds`.
    """

    setting: Setting
    is_better: bool
    value: float | None
    reason: str
    seconds: float
    against: float | None = None
    levels: tuple[Mapping[str, Any], ...] = ()


Evaluate = Callable[[Setting, "Trial | None", float], Trial]
"""Measures a setting against the best trial so far, by the margin that it has to beat it by."""


def descend(space: Space, start: Trial, guess: Setting | None, evaluate: Evaluate) -> Trial:
    """Return the best trial that is found.

    Args:
        space: the settings.
        start: today's, or what else is known already.
        guess: a setting to try first; `None` has none.
        evaluate: measures. It may raise to end the search: what it returned until then is known to the caller.
    """
    best, tried = start, {start.setting}

    def attempt(setting: Setting) -> None:
        nonlocal best
        if setting in tried or not space.allows(setting):
            return
        tried.add(setting)
        is_cheaper = setting.cost < best.setting.cost and best.setting != start.setting
        trial = evaluate(setting, best, 0.0 if is_cheaper else MARGIN)
        if trial.is_better:
            best = trial

    if guess is not None:
        attempt(guess)
    for _ in range(_MOST_ROUNDS):
        before = best
        for axis in space.axes:
            for setting in space.along(best.setting, axis):
                attempt(setting)
        if best is before:
            break
    return best
