"""A tuning: the curves of batches, today's settings, the descent, and the proof by a paired comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import ServerError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.files import sha256_file, work_folder
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.run import environment
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.sealing import Sealing, seal
from repo_manager.stats.accuracy import Accuracy
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.ensembles import is_ensemble
from repo_manager.tuning.answers import Answers, HeldOut
from repo_manager.tuning.curves import Curves, latency_limit
from repo_manager.tuning.finals import Race
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.measuring import BudgetEndedError, Inputs, Loads
from repo_manager.tuning.result import BETTER, TuneOptions, TuneProgress, Tuning, conclude, objective_of, value_text
from repo_manager.tuning.scratch import CANDIDATE, SEALED, TODAY, WINNER, copies_of, tuning_directory
from repo_manager.tuning.search import MeasuredSetting, descend, likely_good
from repo_manager.tuning.space import BatchTime, Setting, Space, left_out
from repo_manager.tuning.subjects import Subjects, read_subjects

__all__ = ["TuningRun", "tune", "tuning_run"]

_PROOF_SHARE = 0.25
_RACE_SHARE = 0.2
_ENERGY_SHARE = 0.9
_ATTEMPTS = 2
_ANY_ENERGY = 0.0  # baseline for today's setting in its first measurement with energy


def tune(
    repository: LocationLike,
    versions: Mapping[str, int],
    options: TuneOptions,
    *,
    inputs: Inputs = lambda _name, _version: {},
    progress: Callable[[TuneProgress], None] = lambda _: None,
) -> Tuning:
    """Search the best setting of models, on copies of them on a server of their own.

    Of an ensemble the models it is made of are tuned. Several models are under load together, and share the machine.

    Args:
        repository: where the models are. Nothing in it is changed.
        versions: model -> the version measured.
        options: goal and limits of the search.
        inputs: gives the facts of a model's requests.
        progress: called after each measurement: its result, the time left, the best so far.

    Raises:
        UsageError: a model is of an untunable kind, or energy is sought and nothing reports it.
        RepositoryError: no such model or version, or it does not fit into memory once more.
        ConfigError: a fixed field does not fit.
        ServerError: the server of the copies does not start, or a model does not load on it.
    """
    with tuning_run(repository, versions, options, inputs=inputs, progress=progress) as run:
        return run.go()


@contextlib.contextmanager
def tuning_run(
    repository: LocationLike,
    versions: Mapping[str, int],
    options: TuneOptions,
    *,
    inputs: Inputs = lambda _name, _version: {},
    progress: Callable[[TuneProgress], None] = lambda _: None,
) -> Iterator[TuningRun]:
    """Prepare the steps of `tune`: the server of the copies runs for as long as the block lasts.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        versions: name of the model -> its version.
        options: goal and limits of the search.
        inputs: called with a model and its version: its requests' settings of `LoadTestOptions`.
        progress: called with each step of the search.

    Raises:
        RepoManagerError: as `tune`.
    """
    began = time.monotonic()
    options.check_models(tuple(versions))
    with contextlib.ExitStack() as stack:
        subjects = read_subjects(as_location(repository), versions, options.fixed, stack)
        if options.signed_by:
            sealed = _sealed(as_location(repository), subjects, options.signed_by, stack)
            subjects = read_subjects(sealed, versions, options.fixed, stack)
        held_out = HeldOut.of(options.accuracy, subjects)
        copies = stack.enter_context(copies_of(subjects, url=options.url, access=options.access))
        facts = _facts(str(repository), subjects, options)
        if held_out is not None:
            facts["accuracy"] = [dataclasses.asdict(held_out.limits), str(held_out.evaluator.digest)]
        journal = Journal(tuning_directory(), facts, fresh=options.fresh)
        loads = Loads(copies, options, inputs)
        yield TuningRun(options, loads, Answers(loads, held_out), journal, progress, began=began)


def _sealed(repository: Location, subjects: Subjects, keys: Sequence[Path], stack: contextlib.ExitStack) -> Path:
    """Copy the models to a private repository, and check the copies: they run, whatever is exchanged by then.

    Raises:
        RepositoryError: no key vouches for one.
    """
    root = stack.enter_context(work_folder(SEALED, tuning_directory()))
    for name, subject in subjects.models.items():
        seal(repository, name, root, Sealing(keys, versions=(subject.version,)))
    return root


def _facts(repository: str, subjects: Subjects, options: TuneOptions) -> dict[str, Any]:
    """Return the facts behind a measurement."""
    about = environment()
    models = {
        name: {
            "version": subject.version,
            "files": {place: sha256_file(path) for place, path in subject.files.items() if place.startswith("1/")},
            "config": subject.config.text,
        }
        for name, subject in subjects.models.items()
    }
    return {
        "model": "+".join(subjects.tops),
        "repository": repository,
        "models": models,
        "gates": {name: [gate.text for gate in options.gates_of(name)] for name in subjects.tops},
        "seeks": options.seeks,
        "rate": options.rate,
        "mix": dict(options.mix),
        "arrival": options.arrival,
        "load": {key: str(value) for key, value in options.load.items() if key != "command"},
        "machine": [about["cpu"], about["cpus"], about["repo_manager"], options.url or "here"],
    }


class TuningRun:
    """One run, from its start to its result. `benchmarks/tune.py` asks it for every setting instead.

    Args:
        options: goal and limits of the search.
        loads: puts load on the copies.
        answers: checks the answers of the copies.
        journal: keeps each measurement. Those already in it are not repeated.
        progress: called with each step of the search.
        clock: returns the time in seconds.
        began: when the budget began to run. `None`: now.

    Attributes:
        subjects: the models to tune.
        copies: of it.
        loads: puts load on them.
        race: lets two settings take turns.
    """

    def __init__(
        self,
        options: TuneOptions,
        loads: Loads,
        answers: Answers,
        journal: Journal,
        progress: Callable[[TuneProgress], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self._clock = clock
        self.copies, self.subjects = loads.copies, loads.copies.subjects
        self._options, self._journal, self._told = options, journal, progress
        self.loads, self._answers = loads, answers
        self._today = self.subjects.today()
        self._began = clock() if began is None else began
        self._results: list[MeasuredSetting] = []
        self._curves: dict[str, tuple[BatchTime, ...]] = {}
        self._spaces: dict[str, Space] = {}
        self.race = Race(options, loads, journal, self._changes_of, lambda: self._left_s() - self._proof_s, self._tell)
        self._recorded = False
        self._best: MeasuredSetting

    def prepare(self) -> Mapping[str, Space]:
        """Measure the time of batches. Return the settings it leaves of each model.

        Raises:
            RepositoryError: one more copy of the models does not fit into memory.
            ServerRefusedError: a model does not load.
        """
        curves = Curves(self._options, self.loads, self._journal, self._tell, self._left_s)
        for name in self.subjects.tunable:
            self._curves[name], self._spaces[name] = curves.space(name)
        self._set_load()
        return self._spaces

    def _set_load(self) -> None:
        """Say where the search for today's largest rate begins, and how several models share the requests."""
        tops = self.subjects.tops
        alone = {name: self._curves[name][0].per_s if self._curves.get(name) else 20.0 for name in tops}
        self.loads.share_out(self._options.mix or alone)
        total = min(alone[name] / self.loads.mix[name] for name in tops) / len(tops)
        self.loads.start_rate = self._options.rate or float(f"{max(total / 2, 1.0):.3g}")

    def go(self) -> Tuning:
        """Measure, and conclude."""
        if self._options.accuracy is not None:
            self.copies.load(CANDIDATE, {})
            self._answers.record(CANDIDATE)
            self._recorded = True
        self.prepare()
        is_complete = self._search()
        self.loads.is_over = lambda: self._left_s() < self._proof_s
        self._best = self.race.best_of(self._best, self._results)
        today, best = self._results[0], self._best
        comparisons: tuple[Comparison, ...] = ()
        if best.state != today.state and best.value is not None:
            comparisons = self._proof(best)
        concluded = conclude(self._options, self._results, best, comparisons, is_complete=is_complete)
        result = self._result(concluded, (today, best), comparisons, is_complete=is_complete)
        return dataclasses.replace(result, accuracy=self._accuracy(best, WINNER if comparisons else CANDIDATE))

    def _search(self) -> bool:
        """Measure today's settings, and search for better ones. Return whether that ended before the budget did."""
        self.loads.is_over = lambda: self._left_s() <= 0
        try:
            today = self.evaluate(self._today, None, 0.0)
            if self._options.seeks == "energy":
                today = self._with_energy(today)
        except BudgetEndedError:
            today = _unmeasured(self._today, self.subjects.tunable[0])
            self._results, self._best = [today], today
            return False
        self._best = today
        self.loads.is_over = lambda: self._left_s() < self._proof_s + self._race_s
        try:
            for model in self._order():
                self._best = self._tune(model, self._best)
        except BudgetEndedError:
            self._best = self._last_better()
            return False
        return True

    def _last_better(self) -> MeasuredSetting:
        return next((each for each in reversed(self._results) if each.is_better), self._results[0])

    @property
    def _race_s(self) -> float:
        """What the search leaves to the race, in seconds."""
        return min(self._options.budget_s * _RACE_SHARE, self.race.usual_s(self._last_better(), self._results))

    @property
    def _proof_s(self) -> float:
        """What the comparison at the end may take, in seconds."""
        rate = self.loads.rate or (self._results[0].value if self._options.seeks == "throughput" else None)
        shortest, longest = self.loads.proof_s(rate, self._gain(self._last_better()))
        return max(min(self._options.budget_s * _PROOF_SHARE, longest), shortest)

    def _gain(self, best: MeasuredSetting) -> float:
        """Return the ratio of the best to today's in the search. 1 where today's or the best holds nothing."""
        held = self._results[0].value
        if held is None or best.value is None:
            return 1.0
        return best.value / held if self._options.seeks == "throughput" else held / best.value

    def _accuracy(self, best: MeasuredSetting, copy: str) -> Accuracy | None:
        """Score the best settings on the held-out data. A set of copies with these settings already stays."""
        if self._options.accuracy is None:
            return None
        self.copies.load(copy, self._changes_of(best.state))
        return self._answers.accuracy(copy)

    def _changes_of(self, state: Mapping[str, Setting]) -> dict[str, dict[str, str | None]]:
        return {name: setting.changes(self._today[name]) for name, setting in state.items()}

    def _result(
        self,
        concluded: tuple[str, str],
        ends: tuple[MeasuredSetting, MeasuredSetting],
        comparisons: tuple[Comparison, ...],
        *,
        is_complete: bool,
    ) -> Tuning:
        (outcome, reason), (today, best) = concluded, ends
        return Tuning(
            model=self.subjects.title,
            versions={name: subject.version for name, subject in self.subjects.models.items()},
            outcome=outcome,
            reason=reason,
            seeks=self._options.seeks,
            objective=objective_of(self._options),
            today=today,
            best=best,
            changes=self._changes(best) if outcome == BETTER else {},
            trials=tuple(each for each in self._results if each.seconds),
            curves=self._curves,
            settings=sum(space.size for space in self._spaces.values()),
            left_out=(*self._answers.notes, *self._left_out(is_complete=is_complete)),
            finalists=self.race.finalists,
            comparisons=comparisons,
            is_complete=is_complete,
            seconds=self._clock() - self._began,
            journal=str(self._journal.path),
            environment=environment(),
        )

    def _order(self) -> Iterator[str]:
        """Yield the models to tune: each time the one with the most time of requests.

        One searched to its end is not searched again. For an ensemble, nothing more is gained once the same one still
        takes most of the time. Models sharing the machine all get their turn.
        """
        settled: list[str] = []
        while len(settled) < len(self.subjects.tunable):
            busiest = self._busiest(self._best, () if self._is_one_ensemble else settled)
            if busiest in settled:
                return
            yield busiest
            if not self._is_one_ensemble or self._busiest(self._best, ()) == busiest:
                settled.append(busiest)
            elif len(self._results) > self._most_settings:
                return

    @property
    def _most_settings(self) -> int:
        return sum(space.size for space in self._spaces.values())

    @property
    def _is_one_ensemble(self) -> bool:
        return len(self.subjects.tops) == 1 and is_ensemble(self.subjects.models[self.subjects.tops[0]].config)

    def _busiest(self, measured: MeasuredSetting, without: Sequence[str]) -> str:
        names = [name for name in self.subjects.tunable if name not in without]
        return max(names, key=lambda name: measured.busy.get(name, 0.0))

    def _tune(self, model: str, best: MeasuredSetting) -> MeasuredSetting:
        """Search one model's setting, the others as they are in the best."""
        if len(self.subjects.tunable) > 1:
            self._tell(f"{model} is tuned now: {best.busy.get(model, 0.0):.3g} of its requests wait or run on average")
        space, today = self._spaces[model], best.of(model)

        def evaluate(setting: Setting, held: MeasuredSetting | None, margin: float) -> MeasuredSetting:
            return self.evaluate({**best.state, model: setting}, held, margin, model)

        guesses = likely_good(space, today.setting, self._curves[model], latency_limit(self._options, self.subjects))
        return descend(space, today, guesses, evaluate, is_enough=lambda measured: self._is_moved_on(model, measured))

    def _is_moved_on(self, model: str, measured: MeasuredSetting) -> bool:
        """Return whether an ensemble's requests now spend most time in another model than the tuned one."""
        return self._is_one_ensemble and self._busiest(measured, ()) != model

    def _left_s(self) -> float:
        return self._options.budget_s - (self._clock() - self._began)

    def _tell(self, text: str) -> None:
        held, best = self.race.best or (self._last_better() if self._results else None), ""
        if held is not None and held.value is not None:
            best = f"{held.label}: {value_text(self._options.seeks, held.value)}"
        self._told(TuneProgress(text, max(self._left_s(), 0.0), best))

    def _changes(self, best: MeasuredSetting) -> dict[str, dict[str, str | None]]:
        """Return the changes to the files as written: the fixed fields, and the found ones."""
        found = {}
        for name in self.subjects.tunable:
            subject = self.subjects.models[name]
            own: dict[str, str | None] = {}
            if changed_fields(subject.written, subject.config):
                own = {
                    key.rpartition(":")[2]: value
                    for key, value in self._options.fixed.items()
                    if key.rpartition(":")[0] in ("", name)
                }
            own |= best.state[name].changes(self._today[name])
            if own:
                found[name] = own
        return found

    def _left_out(self, *, is_complete: bool) -> Iterator[str]:
        """Yield the settings not tried, and why."""
        for name, space in self._spaces.items():
            subject, of = self.subjects.models[name], f"{name}: " if len(self._spaces) > 1 else ""
            tried = {each.state[name] for each in self._results if name in each.state}
            for said in left_out(space, self._curves[name], tried, self._options.search, subject.config):
                yield f"{of}{said}"
            left = space.size - len(tried)
            if left > 0:
                why = "the search found nothing better on the way to them" if is_complete else "the budget ended"
                yield f"{of}{left} of {space.size} settings: {why}"
        if self.race.waiting:
            yield f"{self.race.waiting} in turn with others under load: the budget ended, or two do not fit into memory"

    def evaluate(
        self, state: Mapping[str, Setting], best: MeasuredSetting | None, margin: float, model: str = ""
    ) -> MeasuredSetting:
        """Measure settings: how much they hold, or whether they hold more than the best ones.

        Args:
            state: the setting of each tunable model.
            best: the best so far. `None`: there is none yet.
            margin: share to beat it by.
            model: the one whose setting is searched. Empty: the first.

        Raises:
            BudgetEndedError: there is no time for it.
            UsageError: energy is sought, and nothing reports it.
        """
        against = self._challenge(best, margin)
        measured = self._journal.measured(state, against)
        if measured is None:
            if best is not None and self._left_s() < self._proof_s + self._race_s + self._options.level_s:
                raise BudgetEndedError
            model = model or self.subjects.tunable[0]
            measured = self._measured(state, model, against, is_first=best is None)
            self._journal.add_measured(measured)
        self._results.append(measured)
        verdict = "" if best is None else "better: " if measured.is_better else "not better: "
        self._tell(f"{measured.label}: {verdict}{measured.reason}")
        return measured

    @property
    def _is_rate_sought(self) -> bool:
        return self.loads.rate is None

    def _challenge(self, best: MeasuredSetting | None, margin: float) -> float | None:
        """Return the value a better setting must hold, or `None` where any value will do."""
        if best is None:
            return None
        if best.value is None:  # no setting holds yet: compare at the smallest failed load
            return min((level["level"] for level in best.levels), default=None) if self._is_rate_sought else None
        return float(f"{best.value * (1 + margin if self._options.seeks == 'throughput' else 1 - margin):.4g}")

    def _load(self, state: Mapping[str, Setting]) -> str:
        """Serve settings. Return why they are out of the question, empty when they are not."""
        changes = self._changes_of(state)
        try:
            self.copies.load(CANDIDATE, changes)
            if not self._recorded and not any(changes.values()):
                self._answers.record(CANDIDATE)
                self._recorded = True
            elif not self._recorded:  # an earlier run measured today's setting
                self.copies.load(TODAY, {})
                self._answers.record(TODAY)
                self.copies.unload(TODAY)
                self._recorded = True
        except ServerRefusedError as exc:
            return f"it does not load: {exc.reason or exc.message}"
        differs = self._answers.differ(CANDIDATE) if any(changes.values()) else ""
        if differs:
            return f"its answers differ from today's: {differs}"
        found = self._answers.accuracy(CANDIDATE) if any(changes.values()) else None
        return f"its accuracy is below the limit: {found.detail}" if found is not None and not found.passed else ""

    def _measured(
        self,
        state: Mapping[str, Setting],
        model: str,
        against: float | None,
        *,
        is_first: bool,
    ) -> MeasuredSetting:
        """Measure settings, and once more if the server ends under them.

        Raises:
            BudgetEndedError: the budget ended first.
            ServerError: a server elsewhere has ended, or the own one does not start again.
        """
        began = self._clock()
        for _ in range(_ATTEMPTS):
            try:
                measured = self._measured_once(state, model, against, is_first=is_first)
            except ServerUnreachableError:
                if not self.copies.revive():
                    raise
            else:
                if not self.copies.revive():
                    return dataclasses.replace(measured, seconds=self._clock() - began)
            self._tell(f"{state[model].label}: the server ended, and starts again")
        problem = f"the server ended {_ATTEMPTS} times under its load"
        return MeasuredSetting(
            state[model], is_first, None, problem, self._clock() - began, against, model=model, state=state
        )

    def _measured_once(
        self, state: Mapping[str, Setting], model: str, against: float | None, *, is_first: bool
    ) -> MeasuredSetting:
        own = state[model]
        problem = self._load(state)
        if problem:
            return MeasuredSetting(own, False, None, problem, 0.0, against, model=model, state=dict(state))
        measured = self.loads.measured(CANDIDATE, against)
        value = measured.value
        is_better = value is not None
        if value is not None and against is not None and self._options.seeks == "energy":
            is_better = value <= against
        return MeasuredSetting(
            own,
            is_better=is_better or is_first,
            value=value,
            reason=measured.reason,
            seconds=0.0,
            against=against,
            levels=measured.levels,
            model=model,
            state=dict(state),
            busy=measured.busy,
        )

    def _with_energy(self, today: MeasuredSetting) -> MeasuredSetting:
        """Return today's setting with its energy, at the given rate or one from its own largest.

        Raises:
            UsageError: nothing reports energy, or there is no rate to measure it at.
        """
        if self.loads.rate is None:
            if today.value is None:
                raise UsageError(
                    f"energy is measured at nine tenths of the largest rate that today's setting holds, and it holds "
                    f"none: {today.reason}",
                    hint="Give a rate: --rate 300.",
                )
            self.loads.rate = float(f"{today.value * _ENERGY_SHARE:.4g}")
            known = self._journal.measured(self._today, _ANY_ENERGY)
            measured = known or self._measured(self._today, self.subjects.tunable[0], _ANY_ENERGY, is_first=True)
            if known is None:
                self._journal.add_measured(measured)
            self._results, today = [measured], measured
            self._tell(f"{today.label}: {today.reason}")
        told = [level for level in today.levels if level["joules_per_inference"] is not None]
        if not told:
            raise UsageError(
                "energy is sought, and neither the server's metrics nor NVML report it",
                hint="It takes a GPU (and for the metrics of Triton, DCGM). Seek the largest rate or the lowest p99.",
            )
        return today

    def _proof(self, best: MeasuredSetting) -> tuple[Comparison, ...]:
        """Hold today's and the best settings against each other, both served, in paired blocks."""
        rate, gain = self.loads.rate or best.value, self._gain(best)
        assert rate is not None
        for attempt in range(1, _ATTEMPTS + 1):
            self.copies.unload(CANDIDATE)
            self.copies.load(TODAY, {})
            self.copies.load(WINNER, self._changes_of(best.state))
            try:
                comparisons = self.loads.proof(rate, gain, self._left_s())
            except ServerError:
                if attempt == _ATTEMPTS or not self.copies.revive():
                    raise
            else:
                break
        for each in comparisons:
            self._tell(f"today's against {best.label}: {each.verdict}")
        return comparisons


def _unmeasured(state: Mapping[str, Setting], model: str) -> MeasuredSetting:
    """Return today's settings for a budget that ended before they were measured."""
    reason = "the budget ended before it was measured"
    return MeasuredSetting(state[model], True, None, reason, 0.0, model=model, state=dict(state))
