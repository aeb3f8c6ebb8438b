"""How often a model is right on data with known answers, how certain the share is, and whether it is enough."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from repo_manager.stats.intervals import Z_95, Interval, wilson_interval
from repo_manager.types import Digest

__all__ = ["Accuracy", "Score", "drop_interval", "judge_accuracy", "score_interval"]

Doubles = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Score:
    """How good one model is.

    Attributes:
        value: higher is better. For labels the share of correct answers, 0 to 1.
        each: the score of each sample, float64 `[samples]`. `None` where a function returned one number.
    """

    value: float
    each: Doubles | None = dataclasses.field(default=None, repr=False, compare=False, metadata={"json": False})

    @property
    def samples(self) -> int | None:
        """How many samples were scored. `None` where not known."""
        return None if self.each is None else int(self.each.size)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How good a model is on held-out data, beside the model it was made from.

    Attributes:
        data: source of the data, or the scoring function.
        digest: of the data. `None` for a function.
        metric: the quantity: `top-1 accuracy`, `accuracy`, or the function.
        value: of the model. Higher is better.
        source: of the model it was made from.
        samples: how many samples. `None` where a function returned one number.
        interval: 95 % interval of `value`. `None` where it is unknown.
        drop_interval: 95 % interval of `source - value`, from the same samples in pairs. `None` as for `interval`.
        min_accuracy: the smallest value accepted. `None` for none.
        max_drop: the largest accepted drop below `source`. `None` for none.
        passed: whether `value` is finite and holds both limits.
        detail: the numbers and the deciding rule, in words.
    """

    data: str
    digest: Digest | None
    metric: str
    value: float
    source: float
    samples: int | None
    interval: Interval | None
    drop_interval: Interval | None
    min_accuracy: float | None
    max_drop: float | None
    passed: bool
    detail: str

    @property
    def drop(self) -> float:
        """How far the model is below its source. Negative where it is better."""
        return self.source - self.value


def score_interval(score: Score) -> Interval | None:
    """Return a 95 % interval of a score: Wilson's for right and wrong answers, else the normal one of the mean."""
    each = score.each
    if each is None or each.size < 2:
        return None
    if np.isin(each, (0.0, 1.0)).all():
        return wilson_interval(int(each.sum()), int(each.size))
    half = Z_95 * float(np.std(each, ddof=1)) / math.sqrt(each.size)
    return Interval(score.value - half, score.value + half)


def drop_interval(source: Score, found: Score) -> Interval | None:
    """Return a 95 % interval of the drop, from the differences of the same samples.

    Where no sample differs it is the rule of three (Hanley and Lippman-Hand, "If nothing goes wrong, is everything all
    right?", 1983): a change of fewer than 3 in n samples is often not seen.
    """
    if source.each is None or found.each is None or source.each.size != found.each.size or found.each.size < 2:
        return None
    differences = source.each - found.each
    if not differences.any():
        return Interval(-3.0 / differences.size, 3.0 / differences.size)
    half = Z_95 * float(np.std(differences, ddof=1)) / math.sqrt(differences.size)
    mean = float(np.mean(differences))
    return Interval(mean - half, mean + half)


def judge_accuracy(
    source: Score,
    found: Score,
    *,
    data: str,
    digest: Digest | None,
    metric: str,
    min_accuracy: float | None = None,
    max_drop: float | None = None,
    beside: str = "of the source",
) -> Accuracy:
    """Hold a model's score against limits. The measured numbers decide. A limit within their interval is said to be.

    Args:
        source: the score of the model it was made from.
        found: score of the judged model. A value of NaN or infinity does not pass.
        data: where the data came from.
        digest: digest of the held-out data. `None`: unknown.
        metric: what the score is, such as `top-1 accuracy`. Only named in the result.
        min_accuracy: smallest accepted accuracy, as in `Accuracy`. `None`: no limit.
        max_drop: largest accepted loss against the source, as in `Accuracy`. `None`: no limit.
        beside: what `source` is, in words.
    """
    interval, between = score_interval(found), drop_interval(source, found)
    drop = source.value - found.value
    rules, doubts = [], []
    holds = math.isfinite(found.value)
    if min_accuracy is not None:
        holds = holds and found.value >= min_accuracy
        rules.append(f"{_text(found.value)} {'>=' if found.value >= min_accuracy else '<'} {min_accuracy:g}")
        doubts += [interval] if _spans(interval, min_accuracy) else []
    if max_drop is not None:
        # Ignore the last digit: a drop of 0.005 on 200 samples is exactly one sample.
        is_small = drop <= max_drop + 1e-12
        holds = holds and is_small
        rules.append(f"a drop of {_text(drop)} {'<=' if is_small else '>'} {max_drop:g}")
        doubts += [between] if _spans(between, max_drop) else []
    count = "" if found.samples is None else f" on {found.samples} samples"
    words = [f"{metric} {_text(found.value)}, {beside} {_text(source.value)}{count}"]
    if rules:
        words.append(" and ".join(rules))
    if doubts and doubts[0] is not None:
        low, high = doubts[0].low, doubts[0].high
        words.append(f"few samples: the limit is within the 95 % interval [{_text(low)}, {_text(high)}]")
    return Accuracy(
        data=data,
        digest=digest,
        metric=metric,
        value=found.value,
        source=source.value,
        samples=found.samples,
        interval=interval,
        drop_interval=between,
        min_accuracy=min_accuracy,
        max_drop=max_drop,
        passed=holds,
        detail="; ".join(words),
    )


def _text(value: float) -> str:
    return f"{value:.4g}"


def _spans(interval: Interval | None, limit: float) -> bool:
    return interval is not None and interval.low < limit < interval.high
