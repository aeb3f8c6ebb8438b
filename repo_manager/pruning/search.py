"""Find the largest set of layers within a budget, and solve it as it will be served."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from repo_manager.errors import GateError
from repo_manager.onnx_model.draft import Weight
from repo_manager.pruning.budget import Budget, FrontStep, Meter, gain_of, greedy, loss_of, points_of
from repo_manager.pruning.calibrate import Progress, Run, Solved, replacements, solve_alone, solve_layers
from repo_manager.pruning.judge import Judge, Judgement, is_shared
from repo_manager.pruning.layers import Layer
from repo_manager.sparsity.prune_report import BudgetEvidence
from repo_manager.stats.intervals import spent

__all__ = ["Search", "Tried", "scaled", "within_budget"]

_TRIES = 4
_LOOKS = 3  # further looks at the held-out samples
_ALPHA = 0.05  # risk of a drift above its bound, over all looks
_SMALLER = 0.9  # after a miss on held-out samples, the next set costs at most this share
_LEAST_FRACTION = 0.2  # lowest expected cost of a set solved in order, as a share of its cost alone
_ALONE, _MEASURED, _IN_ORDER = 0.4, 0.6, 0.9  # shares of the progress at the ends of the phases


@dataclass(frozen=True)
class Tried:
    """A set of layers, solved one behind the other.

    Attributes:
        step: its cost, on the samples to choose by.
        layers: the pruned layers. `step` has only their names.
        solved: layer name -> its solution behind the other pruned layers.
        changed: layer -> the constants it changes.
    """

    step: FrontStep
    layers: tuple[Layer, ...]
    solved: Mapping[str, Solved]
    changed: Mapping[str, Mapping[str, Weight]]

    @property
    def constants(self) -> dict[str, Weight]:
        """All changed constants, by name."""
        return {name: weight for layer in self.layers for name, weight in self.changed[layer.name].items()}


@dataclass
class Search:
    """The sets along the front, from few layers to all.

    Attributes:
        run: the dense model, and the samples to solve on.
        meter: measures, on samples to choose by.
        layers: all layers open to pruning, by name.
        budget: the limit, and the dense model's metric if a metric counts.
        steps: the front of `greedy`, each step with more layers than the one before.
        progress: called with the share done, 0 to 1, and the present work in words.
        changed: layer -> the constants it changes when it alone is pruned.
        tried: the sets solved in order.
    """

    run: Run
    meter: Meter
    layers: Mapping[str, Layer]
    budget: Budget
    changed: Mapping[str, Mapping[str, Weight]]
    steps: list[FrontStep]
    progress: Progress
    tried: dict[frozenset[str], Tried] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, layers: Sequence[Layer], judge: Judge, budget: Budget, progress: Progress) -> Search:
        """Measure every layer, and the front.

        Args:
            run: solves layers and builds models.
            layers: layers to prune, in the graph's order.
            judge: measures sets of layers, on samples to choose by.
            budget: limit of the drift or of the metric's loss. Layers far beyond it come last in the front.
            progress: called with the share of the whole search done, and the present work in words.
        """
        solved = solve_alone(run.within("alone"), layers, scaled(progress, 0.0, _ALONE))
        weights, store = run.graph.draft.weights, run.store
        changed = {layer.name: replacements(layer, solved[layer.name], weights, store) for layer in layers}
        del solved
        memory, count, seen = None, 0, 2 * len(layers)
        if run.options.work is not None:
            memory = run.options.work / "alone" / "measured.json"

        def told() -> None:
            nonlocal count
            count += 1
            share = min(count / seen, 1.0)
            progress(_ALONE + (_MEASURED - _ALONE) * share, f"measuring sets of layers ({count})")

        gains = {layer.name: gain_of(layer) for layer in layers}
        meter = Meter(judge, run.graph.draft, gains, memory, told)
        steps = greedy(meter, changed, budget)
        return cls(run, meter, {layer.name: layer for layer in layers}, budget, changed, steps, progress)

    def best(self, limit: float) -> Tried:
        """Return the largest set within the budget, as it will be served.

        A set costs less when its layers are solved one behind the other than the front says, where each is solved by
        itself. How much less is learnt from each try.

        Raises:
            GateError: not even one layer stays within the limit.
        """
        steps = self.steps
        if limit < self.budget.limit:  # a lower limit prefers other layers
            steps = greedy(self.meter, self.changed, replace(self.budget, limit=limit))
        fraction, highest = 1.0, len(steps)
        best: int | None = None
        for _ in range(_TRIES):
            fits = [at for at in range(highest) if steps[at].cost(self.budget) * fraction <= limit]
            place = max(fits, default=0)
            if place == best or not highest:
                break
            step, alone = self._solved(steps[place]).step, steps[place].cost(self.budget)
            cost = step.cost(self.budget)
            if alone > 0:
                fraction = min(max(cost / alone, _LEAST_FRACTION), 2.0)
            if cost <= limit:
                best = place if best is None else max(best, place)
            else:
                highest = place
        if best is None:
            raise GateError(
                self._too_dear(limit), hint="Allow more, or give more samples: the bound comes closer then."
            )
        return self._solved(steps[best])

    def _too_dear(self, limit: float) -> str:
        what = "the metric falls by" if self.budget.is_metric else "with 95 % confidence the drift is below"
        least = min(self.tried.values(), key=lambda tried: tried.step.cost(self.budget))
        names = ", ".join(f"'{layer.label}'" for layer in least.layers[:3])
        more = f" and {len(least.layers) - 3} more" if len(least.layers) > 3 else ""
        return (
            f"no set of layers stays within the budget of {limit:.3g}: pruning {names}{more}, {what} "
            f"{least.step.cost(self.budget):.3g}"
        )

    def _solved(self, alone: FrontStep) -> Tried:
        """Solve the layers of a step one behind the other, once."""
        names = alone.layers
        key = frozenset(names)
        if key in self.tried:
            return self.tried[key]
        chosen = [layer for name, layer in self.layers.items() if name in key]
        name = "set-" + hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
        start, end = (_MEASURED, _IN_ORDER) if not self.tried else (_IN_ORDER, 1.0)
        solved = solve_layers(self.run.within(name), chosen, scaled(self.progress, start, end))
        weights, store = self.run.graph.draft.weights, self.run.store
        changed = {layer.name: replacements(layer, solved[layer.name], weights, store) for layer in chosen}
        step = self.meter.step(names, changed, "in order")
        self.tried[key] = Tried(step, tuple(chosen), solved, changed)
        return self.tried[key]


def within_budget(
    run: Run, layers: Sequence[Layer], wanted: float, chooser: Judge, judge: Judge, macs: float, progress: Progress
) -> tuple[Tried, Judgement, BudgetEvidence]:
    """Choose layers, and see on the held-out samples that the budget holds there. If not, choose fewer.

    Args:
        run: solves layers and builds models.
        layers: layers to prune, in the graph's order.
        wanted: largest drift, or largest loss of the judges' metric.
        chooser: measures by the samples for choosing.
        judge: measures by samples the search never sees. Each look costs confidence in its bound.
        macs: multiply-accumulates of the whole model.
        progress: called with the share done, 0 to 1, and the present work in words.

    Raises:
        GateError: not even one layer stays within the budget.
    """
    search = Search.of(run, layers, chooser, Budget(wanted, chooser.dense_metric), progress)
    limit, looks = wanted, 0
    while True:
        tried, looks = search.best(limit), looks + 1
        found = judge.measure(run.graph.draft, tried.constants, alpha=spent(_ALPHA, looks))
        loss = found.worst if judge.dense_metric is None else loss_of(judge.dense_metric, found.metric)
        if loss <= wanted or looks > _LOOKS:
            break
        limit = tried.step.cost(search.budget) * min(wanted / loss, _SMALLER)
    if loss > wanted:
        what = "drift" if judge.dense_metric is None else "loss of the metric"
        raise GateError(
            f"on the held-out samples the {what} is {loss:.3g}, more than the {wanted:.3g} that is allowed, "
            f"for {looks} sets of layers that stay within it on other samples",
            hint="Give more samples of more kinds, or allow more.",
        )
    labels = {layer.name: layer.label for layer in layers}
    final = sorted((one.step for one in search.tried.values()), key=lambda step: step.gain)
    front = points_of(search.steps, macs, labels) + points_of(final, macs, labels, alone=False)
    kind = "drift" if judge.dense_metric is None else "metric"
    shared = judge.metric is not None and is_shared(judge.metric)
    samples = 0 if judge.metric is not None else chooser.data.count
    return tried, found, BudgetEvidence(kind, wanted, samples, looks, judge.dense_metric, found.metric, front, shared)


def scaled(progress: Progress, start: float, end: float) -> Callable[[float, str], None]:
    """Return a progress as a part of another.

    Args:
        progress: progress of the whole. It gets shares from `start` to `end`.
        start: share at the start of the part, 0 to 1.
        end: share at the end of the part, 0 to 1.
    """
    return lambda share, now: progress(start + share * (end - start), now)
