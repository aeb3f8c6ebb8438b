"""Choose the layers worth their harm: the most sparse arithmetic within a budget.

Each layer's harm is measured, not guessed: the layer alone is pruned, and the model runs. Then layers are added
greedily: the layer with the least harm for its multiply-accumulates is measured again on top of those chosen already,
and taken if it still comes first. Each step is a point of the front (share of the arithmetic against harm).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.onnx_model.draft import Draft, Weight
from repo_manager.pruning.judge import Judge
from repo_manager.pruning.layers import Layer
from repo_manager.sparsity.prune_report import FrontPoint

__all__ = ["Budget", "FrontStep", "Meter", "gain_of", "greedy", "loss_of", "points_of"]

_BEYOND = 1.5  # factor on the budget: up to it, a set may still fit after its layers are solved in order
_LOTS = 6
_PATIENCE = 1.05  # a layer worse than estimated by this factor waits behind the next one


@dataclass(frozen=True)
class Budget:
    """The limit on pruning's harm.

    Attributes:
        limit: of the drift's upper bound, or of how far the metric may fall.
        dense_metric: the dense model's. `None`: the drift counts.
    """

    limit: float
    dense_metric: float | None = None

    @property
    def is_metric(self) -> bool:
        """Whether the user's metric counts, and not the drift."""
        return self.dense_metric is not None


@dataclass(frozen=True)
class FrontStep:
    """One point of the front.

    Attributes:
        layers: names of those pruned, in the order of their choice.
        gain: multiply-accumulates able to run sparse.
        drift: the worst output's. `None` if the metric counts.
        upper: bound of `drift`, see `Judgement.upper`. `None` if the metric counts.
        metric: the user's metric, greater is better. `None` if the drift counts.
    """

    layers: tuple[str, ...]
    gain: float
    drift: float | None
    upper: float | None
    metric: float | None

    def cost(self, budget: Budget) -> float:
        """Return the quantity the budget limits."""
        if budget.dense_metric is not None:
            return loss_of(budget.dense_metric, self.metric)
        return self.upper or 0.0

    def harm(self, budget: Budget) -> float:
        """Return the quantity to add up over layers: the squared drift, or the metric's loss."""
        if budget.dense_metric is not None:
            return max(self.cost(budget), 0.0)
        return (self.drift or 0.0) ** 2


def loss_of(dense: float, metric: float | None) -> float:
    """Return how far a metric falls, to 12 digits: 0.99 - 0.98 is one of 100 samples, and no more than 0.01.

    Args:
        dense: the dense model's metric. Greater is better.
        metric: the pruned model's. `None`: 0.
    """
    return round(dense - (metric or 0.0), 12)


def gain_of(layer: Layer) -> float:
    """Return a layer's multiply-accumulates. Its size where they are not known."""
    return float(layer.weight.size if layer.macs is None else layer.macs)


@dataclass
class Meter:
    """Measures sets of layers, each once, and remembers them over runs.

    Attributes:
        judge: on samples to choose by.
        draft: the dense model, not changed. Each measurement replaces constants in a copy.
        gains: layer -> multiply-accumulates able to run sparse, see `gain_of`.
        memory: file of earlier measurements. `None` keeps nothing.
        told: called after each set of layers, measured or remembered.
    """

    judge: Judge
    draft: Draft
    gains: Mapping[str, float]
    memory: Path | None
    told: Callable[[], None] = lambda: None
    _known: dict[str, list[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory.is_file():
            self._known = json.loads(self.memory.read_text(encoding="utf-8"))

    def step(
        self, layers: Sequence[str], changed: Mapping[str, Mapping[str, Weight]], kind: str = "alone"
    ) -> FrontStep:
        """Measure the model with some layers pruned.

        Args:
            layers: layers to prune, in the graph's order.
            changed: layer -> the constants it changes.
            kind: kind of the solutions remembered.
        """
        key = hashlib.sha256("\n".join([kind, *sorted(layers)]).encode()).hexdigest()
        if key not in self._known:
            constants = {name: weight for layer in layers for name, weight in changed[layer].items()}
            found = self.judge.measure(self.draft, constants, drift=self.judge.metric is None)
            has_drift = self.judge.metric is None
            drift, upper = (found.worst, found.worst_upper) if has_drift else (None, None)
            self._known[key] = [drift, upper, found.metric]
            if self.memory is not None:
                temporary = self.memory.with_suffix(".tmp")
                temporary.write_text(json.dumps(self._known), encoding="utf-8")
                temporary.replace(self.memory)
        self.told()
        return FrontStep(tuple(layers), sum(self.gains[name] for name in layers), *self._known[key])


def greedy(meter: Meter, changed: Mapping[str, Mapping[str, Weight]], budget: Budget) -> list[FrontStep]:
    """Add layers until all are pruned, the cheapest for its gain first.

    Args:
        meter: measures a choice of layers.
        changed: layer -> the constants it changes when it is pruned.
        budget: a layer far beyond it waits until no other one fits. Then the rest is added in lots.

    Returns:
        The steps, each with more layers than the one before.
    """
    scores: dict[str, float] = {}
    for name in changed:  # kept by the meter for another walk with another limit
        scores[name] = meter.step([name], changed).harm(budget) / max(meter.gains[name], 1.0)
    waiting, harm = sorted(scores, key=scores.__getitem__), 0.0
    taken: list[str] = []
    steps: list[FrontStep] = []
    deferred: list[str] = []
    seen: set[str] = set()  # measured together with the layers taken so far
    while waiting:
        first = waiting[0]
        step = meter.step([*taken, first], changed)
        score = max(step.harm(budget) - harm, 0.0) / max(meter.gains[first], 1.0)
        if len(waiting) > 1 and first not in seen and score > _PATIENCE * scores[waiting[1]]:
            seen.add(first)
            scores[first] = score
            waiting.sort(key=scores.__getitem__)
            continue
        waiting.remove(first)
        if step.cost(budget) > _BEYOND * budget.limit:  # smaller layers may still fit
            deferred.append(first)
            continue
        taken, seen, harm = [*taken, first], set(), step.harm(budget)
        steps.append(step)
    return steps + _rest(meter, changed, taken, deferred)


def _rest(
    meter: Meter, changed: Mapping[str, Mapping[str, Weight]], taken: Sequence[str], waiting: Sequence[str]
) -> list[FrontStep]:
    lot = math.ceil(len(waiting) / _LOTS) or 1
    ends = range(lot, len(waiting) + lot, lot)
    return [meter.step([*taken, *waiting[:end]], changed) for end in ends]


def points_of(
    steps: Collection[FrontStep], macs: float, labels: Mapping[str, str], *, alone: bool = True
) -> tuple[FrontPoint, ...]:
    """Return steps as they are reported.

    Args:
        steps: steps of the front, from dense to pruned.
        macs: multiply-accumulates of the whole model. 0 makes each share 0.
        labels: layer -> its name for people.
        alone: each layer was solved behind dense ones.
    """
    points, before = [], 0
    for step in steps:
        points.append(
            FrontPoint(
                layers=len(step.layers),
                added=tuple(labels[name] for name in step.layers[before:]) if alone else (),
                macs_share=step.gain / macs if macs else 0.0,
                drift=step.drift,
                drift_upper=step.upper,
                metric=step.metric,
                final=not alone,
            )
        )
        before = len(step.layers)
    return tuple(points)
