"""How copies are measured: the load one set of them holds, and two sets against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from repo_manager.gates import Outcome, worst
from repo_manager.loadtest.compare import ComparePlan, Comparison, compare_together
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadPoint, LoadTestReport, Progress, SearchStep
from repo_manager.loadtest.run import run_load_test
from repo_manager.loadtest.search import DECISIONS, FAILS, HOLDS, LoadSpace, conclude, decided, next_level
from repo_manager.tuning.race import OVERLOAD, TELLING, RaceBlock, judged
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.scratch import TODAY, WINNER, Copies
from repo_manager.tuning.search import is_open
from repo_manager.tuning.space import BatchTime

__all__ = ["BudgetEndedError", "HeldLoad", "Inputs", "Loads"]

_CURVE_S = 0.6
_WINDOWS = 12
_WINDOWS_OF_A_BLOCK = 3
_WARMUP_S = 0.3
_WARMUP_TOGETHER_S = 1.0  # several load tests do not start at the same moment
_BLOCK_S = (0.6, 3.0)
_SETTLE_S = 0.2
_LAST_ANSWERS_S = 1.0  # longest time counted for the last answers of a block
_REQUESTS_OF_A_BLOCK = 30
_WAITS = 2.0  # limits that the last answers of a block wait on an overloaded side
_RACE_GAIN = 1.1  # overload that a block of a race shows
_BLOCK_COST_S = 0.6  # of a block of a race: its warm-up, and the connections of its client
_FEWEST_PAIRS = 6
_STEPS_UP = ((1.0, 1.0), (1.07, 1.15), (1.25, 64.0))  # (low, high) of each search, as shares of the rate to beat
_MOST_LEVELS = 40
_PATIENCE = 2.0
_OF_TOPS_ONLY = ("data", "image", "shapes", "recorded", "parameters", "distinct")
_STAGES = ("queue_ns", "compute_input_ns", "compute_infer_ns", "compute_output_ns")
Inputs = Callable[[str, int], Mapping[str, Any]]
"""Model and version -> the facts of its requests, as settings of `LoadTestOptions`."""


class BudgetEndedError(Exception):
    """There is no time for another measurement, or for the rest of the present one."""


@dataclasses.dataclass(frozen=True)
class HeldLoad:
    """The load a set of copies held.

    Attributes:
        value: in the objective's unit. `None` when it fails at every load.
        reason: the evidence, with its numbers.
        levels: each load level as the journal keeps it, see `MeasuredSetting.levels`.
        busy: model -> time a second its requests waited and were computed, by the server's counters.
        fails: the smallest rate above `value` shown to fail, in requests a second. `None`: none is.
    """

    value: float | None
    reason: str
    levels: tuple[Mapping[str, Any], ...]
    busy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fails: float | None = None


class Loads:
    """Puts load on copies.

    Args:
        copies: sets of copies on the server.
        options: goal and limits of the search.
        inputs: called with a model and its version: its requests' settings of `LoadTestOptions`.

    Attributes:
        rate: requests a second for objectives other than throughput. `None` as long as it is not known.
        start_rate: where the search for today's largest rate begins.
        patience: a load level lasts so many times as long as the options say.
        mix: model under load -> its share of all requests.
        is_over: tells whether the budget has ended: the load under way then ends with `BudgetEndedError`.
    """

    def __init__(self, copies: Copies, options: TuneOptions, inputs: Inputs) -> None:
        self.copies, self._options, self._inputs = copies, options, inputs
        self.is_over: Callable[[], bool] = lambda: False
        self.rate = options.rate
        self.start_rate = options.rate or 10.0
        self.patience = 1.0
        tops = copies.subjects.tops
        self.mix = dict.fromkeys(tops, 1.0)
        self.share_out(options.mix or self.mix)

    def check_budget(self, _told: Progress | None = None) -> None:
        """End the measurement if the budget has ended. Load tests call it as they go.

        Raises:
            BudgetEndedError: it has.
        """
        if self.is_over():
            raise BudgetEndedError

    def share_out(self, parts: Mapping[str, float]) -> None:
        """Let each model have as many of the requests as a mix says, whose sum need not be 1."""
        self.mix = {name: parts[name] / sum(parts.values()) for name in self.mix}

    def options_of(self, copy: str, model: str, **levels: Any) -> LoadTestOptions:
        """Return a load test of one model of a set."""
        subject, load = self.copies.subjects.models[model], dict(self._options.load)
        is_top = model in self.copies.subjects.tops
        known = dict(self._inputs(model, subject.version))
        if is_top:
            known["shapes"] = {**known.get("shapes", {}), **load.get("shapes", {})}
        else:
            load = {key: value for key, value in load.items() if key not in _OF_TOPS_ONLY}
        return LoadTestOptions(
            **{
                "metrics_url": self.copies.metrics_url,
                **load,
                **known,
                "url": self.copies.url,
                "access": self.copies.access,
                "model": self.copies.named(copy, model),
                "arrival": self._options.arrival,
                "warmup_s": _WARMUP_S,
                **levels,
            }
        )

    def batch_time(self, copy: str, model: str, size: int) -> BatchTime | None:
        """Measure the time of a batch. `None` when no request of this size is answered.

        Args:
            copy: the served set to ask: `candidate`, `today` or `winner`.
            model: its name in the repository, not the copy's.
            size: samples in each request. One request is in flight at a time.
        """
        options = self.options_of(
            copy, model, concurrency=(1,), batch_size=size, duration_s=_CURVE_S, window_s=_CURVE_S / 3
        )
        median_ns = run_load_test(options).points[0].latency.p50_ns
        return None if median_ns is None else BatchTime(size, median_ns)

    def measured(self, copy: str, against: float | None) -> HeldLoad:
        """Measure the load a set holds.

        Args:
            copy: the served set to put under load: `candidate`, `today` or `winner`.
            against: value it must hold or beat for further measurements. `None`: nothing.

        Raises:
            BudgetEndedError: the budget ended first.
        """
        tops = self.copies.subjects.tops
        if self._options.seeks == "throughput" or self.rate is None:
            measure = self._rates if len(tops) == 1 else self.rates_together
            if against is None:
                return measure(copy, (self.start_rate,))
            return self._upwards(measure, copy, against)
        if self._options.seeks == "energy":
            return self._energy(copy, tops[0])
        return self._lowest_p99(copy, tops[0], against)

    def _upwards(self, measure: Callable[[str, tuple[float, ...]], HeldLoad], copy: str, against: float) -> HeldLoad:
        """Search from the rate to hold, in growing steps: most settings above it hold little more."""
        held: HeldLoad | None = None
        levels: tuple[Mapping[str, Any], ...] = ()
        for low, high in _STEPS_UP:
            rates = (against * low, against * high)
            try:
                found = measure(copy, rates)
                if held is None and is_open(found.value, found.levels):
                    levels += found.levels
                    found = self._for_longer(measure, copy, rates)
            except BudgetEndedError:
                if held is None:
                    raise
                break
            levels += found.levels
            if found.value is None:
                held = held or found
                break
            held = found
            if found.fails is not None:  # an undecided load leaves the next step open
                break
        assert held is not None
        return dataclasses.replace(held, levels=levels)

    def _for_longer(
        self, measure: Callable[[str, tuple[float, ...]], HeldLoad], copy: str, rates: tuple[float, ...]
    ) -> HeldLoad:
        """Measure with longer levels: a stall of the machine may have left them undecided."""
        self.patience = _PATIENCE
        try:
            return measure(copy, rates)
        finally:
            self.patience = 1.0

    def _level(self) -> dict[str, Any]:
        seconds = self._options.level_s * self.patience
        return {"duration_s": seconds, "window_s": seconds / _WINDOWS}

    def _rates(self, copy: str, rates: tuple[float, ...]) -> HeldLoad:
        """Search the largest rate of the model under load: one rate is where it begins, two bound it."""
        (model,) = self.copies.subjects.tops
        levels = {**self._level(), "rate": rates, "until": self._options.gates_of(model)}
        report = run_load_test(self.options_of(copy, model, **levels), progress=self.check_budget)
        assert report.search is not None
        busy = self._busy(copy, {model: report.points})
        return HeldLoad(report.search.holds, report.search.reason, _rows(report), busy, report.search.fails)

    def _lowest_p99(self, copy: str, model: str, against: float | None) -> HeldLoad:
        assert self.rate is not None
        levels: dict[str, Any] = {**self._level(), "rate": (self.rate,)}
        if against is not None:
            until = (*self._options.gates_of(model), parse_slo(f"p99<{against:.0f}ns"))
            levels |= {"rate": (self.rate, self.rate), "until": until}
        report = run_load_test(self.options_of(copy, model, **levels), progress=self.check_budget)
        point = report.points[-1]
        p99, why = point.latency.p99_ns, point.reason
        is_held = p99 is not None and point.outcome not in ("failed", "overloaded")
        if is_held and report.search is not None:
            is_held, why = report.search.holds is not None, report.search.reason
        elif is_held:
            outcome, said = decided(point, self._options.gates_of(model), 1)
            is_held, why = outcome is not Outcome.FAIL, said or why
        if not is_held or p99 is None:
            return HeldLoad(None, why, _rows(report), self._busy(copy, {model: report.points}))
        reason = f"p99 {p99 / 1e6:.3g} ms at {point.label}"
        return HeldLoad(float(p99), reason, _rows(report), self._busy(copy, {model: report.points}))

    def _energy(self, copy: str, model: str) -> HeldLoad:
        assert self.rate is not None
        report = run_load_test(
            self.options_of(copy, model, **self._level(), rate=(self.rate,)), progress=self.check_budget
        )
        point = report.points[-1]
        outcome, why = decided(point, self._options.gates_of(model), 1)
        value = point.gpu.energy_per_inference_j
        if outcome is Outcome.FAIL or value is None:
            reason = why if outcome is Outcome.FAIL else "; ".join(point.gpu.missing)
            return HeldLoad(None, reason, _rows(report), self._busy(copy, {model: report.points}))
        reason = f"{1 / value:.4g} inferences per joule at {point.label}"
        return HeldLoad(value, reason, _rows(report), self._busy(copy, {model: report.points}))

    def rates_together(self, copy: str, rates: tuple[float, ...]) -> HeldLoad:
        """Search the largest rate of all models together, each with its share of it."""
        low, high = (rates[0] / 256, 1e6) if len(rates) == 1 else rates
        space = LoadSpace("rate", rates[0], low, high, self._options.arrival)
        steps: list[SearchStep] = []
        rows: list[Mapping[str, Any]] = []
        latest: dict[str, list[LoadPoint]] = {}
        while len(steps) < _MOST_LEVELS and (total := next_level(space, steps)) is not None:
            self.check_budget()
            step, points = self._level_together(copy, space.level(total).label, total)
            steps.append(step)
            rows += [_row(point, step, model) for model, point in points.items()]
            latest = {model: [point] for model, point in points.items()}
        found = conclude(space, self._options.gates, steps)
        return HeldLoad(found.holds, found.reason, tuple(rows), self._busy(copy, latest), found.fails)

    def _level_together(self, copy: str, label: str, total: float) -> tuple[SearchStep, dict[str, LoadPoint]]:
        points = self._points(copy, total, self._level())
        judged = [(name, *decided(point, self._options.gates_of(name), 1)) for name, point in points.items()]
        outcome = worst(each for _, each, _ in judged)
        reason = "; ".join(f"{name}: {why}" for name, each, why in judged if each is outcome)
        step = SearchStep(total, label, DECISIONS[outcome], reason, next(iter(points.values())).duration_s)
        return step, points

    def _points(self, copy: str, total: float, level: Mapping[str, Any]) -> dict[str, LoadPoint]:
        """Put all models under load at once, each with its share of the rate."""
        rates = {name: {**level, "rate": (total * share,)} for name, share in self.mix.items()}
        if len(rates) == 1:  # runs in this thread, so Ctrl-C reaches it
            ((name, one),) = rates.items()
            return {name: run_load_test(self.options_of(copy, name, **one), progress=self.check_budget).points[0]}
        together = {"warmup_s": _WARMUP_TOGETHER_S}
        options = [self.options_of(copy, name, **{**one, **together}) for name, one in rates.items()]
        with ThreadPoolExecutor(len(options)) as threads:
            reports = list(threads.map(run_load_test, options))
        return {name: report.points[0] for name, report in zip(rates, reports, strict=True)}

    def block(self, copy: str, rate: float) -> RaceBlock:
        """Run one block of a race.

        Args:
            copy: the served set to put under load.
            rate: requests a second, of all models together.

        Raises:
            BudgetEndedError: the budget ended first.
        """
        seconds = self._block_s(rate, _RACE_GAIN)
        points = self._points(copy, rate, {"duration_s": seconds, "window_s": seconds / _WINDOWS_OF_A_BLOCK})
        held, shift = judged(points, self._options.gates_of)
        told = {"decision": HOLDS if held else FAILS}
        rows = tuple({**_row(each, None, name if len(points) > 1 else ""), **told} for name, each in points.items())
        numbers = {"latency": rows[0]["p99_ns"], "energy": rows[0]["joules_per_inference"]}
        return RaceBlock(held, numbers.get(self._options.seeks), rows, shift)

    def block_s(self, rate: float) -> float:
        """Return how long a block of a race takes, in seconds."""
        return self._block_s(rate, _RACE_GAIN) + _BLOCK_COST_S

    def _busy(self, copy: str, points: Mapping[str, Sequence[LoadPoint]]) -> dict[str, float]:
        """Return each tunable model's time in the queue and computing, by second, at the largest load with counters."""
        found: dict[str, float] = {}
        for top, levels in points.items():
            told = [point for point in levels if point.server is not None and point.duration_s]
            if not told or told[-1].server is None:
                continue
            times = {self.copies.named(copy, top): told[-1].server, **told[-1].server.parts}
            for model in self.copies.subjects.tunable:
                each = times.get(self.copies.named(copy, model))
                if each is not None:
                    spent_ns = sum(getattr(each, field) or 0.0 for field in _STAGES) * each.requests
                    found[model] = found.get(model, 0.0) + spent_ns / 1e9 / told[-1].duration_s
        return found

    def proof_s(self, rate: float | None, gain: float) -> tuple[float, float]:
        """Return the times of the shortest and the longest comparison, with the load of its copies, in seconds.

        Args:
            rate: requests a second, of all models together. `None`: not known yet.
            gain: ratio of the best to today's in the search so far, 1 or more.
        """
        return (_FEWEST_PAIRS + 1) * self._pair_s(rate, gain), (_enough_pairs(gain) + 1) * self._pair_s(rate, gain)

    def _block_s(self, rate: float | None, gain: float) -> float:
        """Return the length of a block of the comparison, in seconds.

        It has as many requests as give an interval, and enough time for the queue of an overloaded side to grow beyond
        the limit: at `gain` times its largest rate, the last request answered after t seconds has waited
        t * (1 - 1 / gain).
        """
        if rate is None:
            return _BLOCK_S[0]
        enough_s = _REQUESTS_OF_A_BLOCK / (rate * min(self.mix.values()))
        limit_s = self._options.tightest_s(self.mix)
        if limit_s and gain > 1 and self._options.seeks == "throughput":
            enough_s = max(enough_s, _WAITS * limit_s / (1 - 1 / gain))
        return min(max(enough_s, _BLOCK_S[0]), _BLOCK_S[1])

    def _overload(self, rate: float | None, gain: float) -> float:
        """Return at how many times the best's rate the comparison runs.

        In a fast moment both hold this rate, and nothing shows. So both are overloaded where the queue tells.
        """
        tells = self._options.tightest_s(self.mix) > TELLING * self._block_s(rate, gain * OVERLOAD)
        return OVERLOAD if tells and self._options.seeks == "throughput" else 1.0

    def _pair_s(self, rate: float | None, gain: float) -> float:
        """Return the time of two blocks, with the last answers of each, and with the queue of an overloaded side."""
        over, last_s = self._overload(rate, gain), min(self._options.tightest_s(self.mix), _LAST_ANSWERS_S)
        block_s = self._block_s(rate, gain * over)
        queues = (1 - 1 / over) + (1 - 1 / max(gain * over, 1.0))
        return 2 * (block_s + 2 * _SETTLE_S + last_s) + (block_s + _SETTLE_S) * queues

    def proof(self, rate: float, gain: float, seconds: float) -> tuple[Comparison, ...]:
        """Hold today's and the best set against each other, both served, in paired blocks.

        Args:
            rate: requests a second, of all models together, which the best set just holds or which is given.
            gain: the search's ratio of the best to today's: a large one takes fewer and shorter pairs to show. Their
                number is fixed before the first of them.
            seconds: longest time for it, in seconds.
        """
        over = self._overload(rate, gain)
        fit = int(max(seconds, 0.0) / self._pair_s(rate, gain))
        pairs = min(max(fit, _FEWEST_PAIRS), _enough_pairs(gain))
        plan = ComparePlan(pairs=pairs, block_s=self._block_s(rate, gain * over), settle_s=_SETTLE_S)
        asked = [(name, (rate * over * share,)) for name, share in self.mix.items()]
        couples = [(self.options_of(TODAY, name, rate=r), self.options_of(WINNER, name, rate=r)) for name, r in asked]
        return compare_together(couples, plan=plan)


def _enough_pairs(gain: float) -> int:
    return 8 if gain >= 1.6 else 12 if gain >= 1.3 else 20


def _rows(report: LoadTestReport) -> tuple[Mapping[str, Any], ...]:
    steps = report.search.steps if report.search is not None else ()
    decisions = {step.label: step for step in steps}
    return tuple(_row(point, decisions.get(point.label)) for point in report.points)


def _row(point: LoadPoint, step: SearchStep | None, model: str = "") -> Mapping[str, Any]:
    """Return a level as it is recorded."""
    return {
        "label": point.label,
        "level": point.level,
        "decision": point.outcome if step is None else step.decision,
        "reason": point.reason if step is None else step.reason,
        "throughput_per_s": point.throughput_per_s,
        "p99_ns": point.latency.p99_ns,
        "seconds": point.duration_s,
        "joules_per_inference": point.gpu.energy_per_inference_j,
        **({"model": model} if model else {}),
    }
