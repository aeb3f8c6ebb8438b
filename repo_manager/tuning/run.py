"""The tuning of one model: the curve of batches, today's setting, the descent, and the proof by a paired comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.files import sha256_file
from repo_manager.loadtest.compare import ComparePlan, Comparison, compare
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.run import environment, run_load_test
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.scan import find_model
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.fields import set_fields
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.result import BETTER, TuneOptions, TuneProgress, Tuning, conclude, objective_of
from repo_manager.tuning.scratch import CANDIDATE, TODAY, WINNER, Copies, copies_of, tuning_directory
from repo_manager.tuning.search import Trial, descend
from repo_manager.tuning.space import BatchTime, Bounds, Setting, Space, curve_sizes, setting_of

__all__ = ["TuningRun", "tune", "tuning_run"]

_CURVE_S = 0.6
_WINDOWS = 12
_WARMUP_S = 0.3
_BLOCK_S = 1.0
_PAIRS = (6, 20)
_PROOF_SHARE = 0.25
_MOST_STEPS_UP = 64
_MEMORY_SHARE = 0.8
_COPIES_IN_MEMORY = 2
_MOST_INSTANCES = 16


class _BudgetEndedError(Exception):
    """There is no time for another measurement."""


def tune(
    repository: LocationLike,
    name: str,
    version: int,
    options: TuneOptions,
    *,
    progress: Callable[[TuneProgress], None] = lambda _: None,
) -> Tuning:
    """Search the best setting of a model, on copies of it on a server of its own.

    Args:
        repository: where the model is; nothing in it is changed.
        name: the model.
        version: the version that is measured.
        options: what is sought.
        progress: told after each measurement.

    Raises:
        UsageError: the model is of a kind that cannot be tuned.
        RepositoryError: no such model or version, or it does not fit into memory once more.
        ConfigError: a fixed field does not fit.
        ServerError: the server of the copies does not start, or the model does not load on it.
    """
    with tuning_run(repository, name, version, options, progress=progress) as run:
        return run.go()


@contextlib.contextmanager
def tuning_run(
    repository: LocationLike,
    name: str,
    version: int,
    options: TuneOptions,
    *,
    progress: Callable[[TuneProgress], None] = lambda _: None,
) -> Iterator[TuningRun]:
    """Make what `tune` does ready: the server of the copies runs for as long as the block lasts.

    Raises:
        RepoManagerError: as `tune`.
    """
    repository = as_location(repository)
    config = find_model(repository, name).config()
    if config is None:
        raise RepositoryError(
            f"{name} has no config.pbtxt", hint=f"Write one: repo-manager adopt {name} --write-config"
        )
    base = parse_config(set_fields(format_config(config), options.fixed, where=CONFIG_FILENAME))
    setting_of(base)
    with copies_of(repository, name, version, base, url=options.url, access=options.access) as copies:
        facts = _facts(repository, name, version, copies, base, options)
        journal = Journal(tuning_directory(), facts, fresh=options.fresh)
        yield TuningRun(name, version, options, (config, base), (copies, journal), progress)


def _facts(
    repository: Location, name: str, version: int, copies: Copies, base: ModelConfig, options: TuneOptions
) -> dict[str, Any]:
    """Return all that decides a measurement."""
    files = {place: sha256_file(path) for place, path in copies.files.items() if place.startswith("1/")}
    about = environment()
    return {
        "model": name,
        "version": version,
        "repository": str(repository),
        "files": files,
        "config": base.text,
        "gates": [gate.text for gate in options.gates],
        "rate": options.rate,
        "arrival": options.arrival,
        "load": {key: str(value) for key, value in options.load.items() if key != "command"},
        "machine": [about["cpu"], about["cpus"], about["repo_manager"], options.url or "here"],
    }


class TuningRun:
    """One run, from its start to its result; `benchmarks/tune.py` asks it for every setting instead."""

    def __init__(
        self,
        name: str,
        version: int,
        options: TuneOptions,
        configs: tuple[ModelConfig, ModelConfig],
        means: tuple[Copies, Journal],
        progress: Callable[[TuneProgress], None],
    ) -> None:
        self._name, self._version, self._options = name, version, options
        self._written, self._base = configs
        self.copies, self._journal = means
        self._told = progress
        self._today = setting_of(self._base)
        self._began = time.monotonic()
        self._trials: list[Trial] = []

    def space(self) -> tuple[Space, tuple[BatchTime, ...]]:
        """Measure the time of batches; return the settings that it leaves, and the times.

        Raises:
            RepositoryError: one more copy of the model does not fit into memory.
            ServerRefusedError: the model does not load.
        """
        bounds = self._bounds()
        curve = self._curve(bounds)
        bounds = dataclasses.replace(bounds, batch=max((each.size for each in curve), default=bounds.batch))
        self._start_rate = self._options.rate or _first_rate(curve)
        space = Space.of(self._base, bounds, curve, latency_ns=self._options.latency_ns, search=self._options.search)
        return space, curve

    def go(self) -> Tuning:
        """Measure, and conclude."""
        space, curve = self.space()
        guess, is_complete = _guess(space, self._today, curve), True
        today = self.evaluate(self._today, None, 0.0)
        best = today
        try:
            best = descend(space, today, guess, self.evaluate)
        except _BudgetEndedError:
            is_complete = False
            best = next((trial for trial in reversed(self._trials) if trial.is_better), today)
        comparison = None
        if best is not today and best.value is not None and today.value is not None:
            comparison = self._proof(best)
        outcome, reason = conclude(self._options, self._trials, best, comparison, is_complete=is_complete)
        return Tuning(
            model=self._name,
            version=self._version,
            outcome=outcome,
            reason=reason,
            objective=objective_of(self._options),
            today=today,
            best=best,
            changes=self._changes(best) if outcome == BETTER else {},
            trials=tuple(self._trials),
            curve=curve,
            settings=space.size,
            comparison=comparison,
            is_complete=is_complete,
            seconds=time.monotonic() - self._began,
            journal=str(self._journal.path),
            environment=environment(),
        )

    def _left_s(self) -> float:
        return self._options.budget_s - (time.monotonic() - self._began)

    def _tell(self, text: str) -> None:
        self._told(TuneProgress(text, max(self._left_s(), 0.0)))

    def _changes(self, best: Trial) -> dict[str, str | None]:
        """Return what changes in the file as it is written: what was fixed, and what was found."""
        fixed = parse_config(set_fields(self._written.text, self._options.fixed, where=CONFIG_FILENAME))
        own = self._options.fixed if changed_fields(self._written, fixed) else {}
        return {**own, **best.setting.changes(self._today)}

    def _bounds(self) -> Bounds:
        """Return what the machine and the model allow.

        Raises:
            RepositoryError: one more copy of the model does not fit into memory.
        """
        groups = self._base.message().instance_group
        on_gpu = self._base.backend in ("tensorrt", "tensorrt_rtx") or any(group.kind == 1 for group in groups)
        size = sum(path.stat().st_size for place, path in self.copies.files.items() if place.startswith("1/"))
        room, fit = self.copies.room(on_gpu=on_gpu), _MOST_INSTANCES
        if room is not None:
            fit = int(room.free_bytes * _MEMORY_SHARE / max(size * _COPIES_IN_MEMORY, 1))
            if fit < 2:  # the comparison serves two
                raise RepositoryError(
                    f"{self._name} takes about {size * _COPIES_IN_MEMORY >> 20} MiB, two copies of it do not fit into "
                    f"the {room.free_bytes >> 20} MiB that {room.kind} has free",
                    hint="Unload something else there, or tune on a larger one.",
                )
        cores = 0 if on_gpu else self.copies.cores
        batch = max(self._today.max_batch_size, 64) if self._today.max_batch_size else 0
        return Bounds(cores, fit, batch)

    def _options_of(self, model: str, **levels: Any) -> LoadTestOptions:
        return LoadTestOptions(
            **{
                **self._options.load,
                "url": self.copies.url,
                "metrics_url": self.copies.metrics_url,
                "access": self.copies.access,
                "model": self.copies.named(model),
                "arrival": self._options.arrival,
                "warmup_s": _WARMUP_S,
                **levels,
            }
        )

    def _curve(self, bounds: Bounds) -> tuple[BatchTime, ...]:
        """Return the time of batches of growing size, as long as a larger one answers more samples a second.

        Raises:
            ServerRefusedError: the model does not load.
        """
        known = {each.size: each for each in self._journal.curve()}
        sizes = curve_sizes(bounds) or (1,)
        changes = Setting(1, max(sizes) if bounds.batch else 0, None, self._today.threads).changes(self._today)
        if not known:
            try:
                self.copies.load(CANDIDATE, changes)
            except ServerRefusedError:
                sizes = tuple(size for size in sizes if size <= max(self._today.max_batch_size, 1))
                self.copies.load(CANDIDATE, {})
            for size in sizes:
                options = self._options_of(
                    CANDIDATE, concurrency=(1,), batch_size=size, duration_s=_CURVE_S, window_s=_CURVE_S / 3
                )
                median_ns = run_load_test(options).points[0].latency.p50_ns
                if median_ns is None:
                    break
                found = BatchTime(size, median_ns)
                self._journal.add_batch(found)
                known[size] = found
                self._tell(f"batch of {size}: {median_ns / 1e6:.3g} ms, {found.per_s:,.0f} samples/s")
                limit = self._options.latency_ns
                if (limit is not None and median_ns > limit) or self._left_s() < self._options.budget_s / 2:
                    break
        return tuple(known[size] for size in sorted(known))

    def evaluate(self, setting: Setting, best: Trial | None, margin: float) -> Trial:
        """Measure a setting: how much it holds, or whether it holds more than the best one.

        Raises:
            _BudgetEndedError: there is no time for it.
        """
        against = self._challenge(best, margin)
        trial = self._journal.trial(setting, against)
        if trial is None:
            if best is not None and self._left_s() < self._options.budget_s * _PROOF_SHARE + self._options.level_s:
                raise _BudgetEndedError
            trial = self._measured(setting, against, is_first=best is None)
            self._journal.add_trial(trial)
        self._trials.append(trial)
        verdict = "" if best is None else "better: " if trial.is_better else "not better: "
        self._tell(f"{setting.label}: {verdict}{trial.reason}")
        return trial

    def _challenge(self, best: Trial | None, margin: float) -> float | None:
        """Return what a setting has to hold to be better; `None` where any value is."""
        if best is None or best.value is None:
            return None
        return float(f"{best.value * (1 - margin if self._options.rate else 1 + margin):.4g}")

    def _measured(self, setting: Setting, against: float | None, *, is_first: bool) -> Trial:
        began = time.monotonic()
        try:
            self.copies.load(CANDIDATE, setting.changes(self._today))
        except ServerRefusedError as exc:
            reason = f"it does not load: {exc.reason or exc.message}"
            return Trial(setting, is_better=False, value=None, reason=reason, seconds=0.0, against=against)
        report = run_load_test(self._options_of(CANDIDATE, **self._levels(against)))
        value, reason = self._value(report)
        if against is not None and value is not None and self._options.rate is None:
            # It holds the one level that was asked: now how much more.
            more = (against, against * _MOST_STEPS_UP)
            report = run_load_test(self._options_of(CANDIDATE, **{**self._levels(against), "rate": more}))
            value, reason = self._value(report)
        return Trial(
            setting,
            is_better=value is not None or is_first,
            value=value,
            reason=reason,
            seconds=time.monotonic() - began,
            against=against,
            levels=_levels_of(report),
        )

    def _levels(self, against: float | None) -> dict[str, Any]:
        """Return the levels and gates that answer what a setting holds."""
        rate, gates = self._options.rate, self._options.gates
        level_s = self._options.level_s
        common = {"duration_s": level_s, "window_s": level_s / _WINDOWS}
        if rate is None:
            levels = (self._start_rate,) if against is None else (against, against)
            return {**common, "rate": levels, "until": gates}
        if against is None:
            return {**common, "rate": (rate,)}
        return {**common, "rate": (rate, rate), "until": (*gates, parse_slo(f"p99<{against:.0f}ns"))}

    def _value(self, report: LoadTestReport) -> tuple[float | None, str]:
        """Return what a setting holds, `None` when it holds nothing of what was asked, and what says so."""
        if self._options.rate is None:
            search = report.search
            assert search is not None
            return search.holds, search.reason
        point = report.points[-1]
        p99 = point.latency.p99_ns
        if report.search is not None and report.search.holds is None:
            return None, report.search.reason
        if p99 is None or point.outcome in ("failed", "overloaded"):
            return None, point.reason
        return float(p99), f"p99 {p99 / 1e6:.3g} ms at {point.label}"

    def _proof(self, best: Trial) -> Comparison:
        """Hold today's and the best setting against each other, both served, in paired blocks."""
        self.copies.unload(CANDIDATE)
        self.copies.load(TODAY, {})
        self.copies.load(WINNER, best.setting.changes(self._today))
        rate = self._options.rate or best.value
        assert rate is not None
        fit = int(max(self._left_s(), 0.0) / (2 * (_BLOCK_S + 0.5)))
        plan = ComparePlan(pairs=min(max(fit, _PAIRS[0]), _PAIRS[1]), block_s=_BLOCK_S, settle_s=_WARMUP_S)
        sides = [self._options_of(model, rate=(rate,)) for model in (TODAY, WINNER)]
        comparison = compare(sides[0], sides[1], plan=plan)
        self._tell(f"today's against {best.setting.label}: {comparison.verdict}")
        return comparison


def _guess(space: Space, today: Setting, curve: Sequence[BatchTime]) -> Setting | None:
    """Return what is likely good: the batch with the most samples a second, and an instance a core where that fits."""
    best = max(curve, key=lambda each: each.per_s, default=None)
    sizes, delays = space.axes["max_batch_size"], space.axes["queue_delay"]
    size = today.max_batch_size
    if best is not None and len(sizes) > 1:
        size = max((each for each in sizes if each <= best.size), default=size)
    delay = 0 if size > 1 and 0 in delays else today.queue_delay
    threads = space.axes["threads"][-1] if len(space.axes["threads"]) > 1 else today.threads
    guess = Setting(1 if 1 in space.axes["instances"] else today.instances, size, delay, threads)
    return guess if guess != today and space.allows(guess) else None


def _first_rate(curve: Sequence[BatchTime]) -> float:
    """Return where the search for today's largest rate begins: half of what single requests one by one give."""
    return float(f"{max(curve[0].per_s / 2, 1.0):.3g}") if curve else 10.0


def _levels_of(report: LoadTestReport) -> tuple[dict[str, Any], ...]:
    steps = report.search.steps if report.search is not None else ()
    decisions = {step.label: step for step in steps}
    return tuple(
        {
            "label": point.label,
            "level": point.level,
            "decision": decisions[point.label].decision if point.label in decisions else point.outcome,
            "reason": decisions[point.label].reason if point.label in decisions else point.reason,
            "throughput_per_s": point.throughput_per_s,
            "p99_ns": point.latency.p99_ns,
            "seconds": point.duration_s,
        }
        for point in report.points
    )
