"""The space of each model of a tuning: the times of its batches are measured, memory and cores bound it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.triton_config.ensembles import models_of
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.measuring import Loads
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.scratch import CANDIDATE
from repo_manager.tuning.space import LEAST_GAIN, BatchTime, Bounds, Setting, Space, curve_sizes, runs_on_gpu
from repo_manager.tuning.subjects import Subject, Subjects

__all__ = ["Curves", "latency_limit"]

_MEMORY_SHARE = 0.8
_COPIES_IN_MEMORY = 2
_MOST_INSTANCES = 16
_LARGEST_BATCH = 64
_MISSES = 2  # in a row: a single worse size may be chance


def latency_limit(options: TuneOptions, subjects: Subjects) -> float | None:
    """Return the limit no batch of any model may exceed, in nanoseconds: the loosest of those asked."""
    limits = [options.latency_ns(name) for name in subjects.tops]
    return None if None in limits else max(limit for limit in limits if limit is not None)


class Curves:
    """Measures the time of batches.

    Args:
        options: goal and limits of the search.
        loads: puts load on the copies.
        journal: keeps each time. Batch sizes already in it are not measured again.
        tell: called with one line of text after each batch size measured.
        left_s: seconds of the budget left.
    """

    def __init__(
        self,
        options: TuneOptions,
        loads: Loads,
        journal: Journal,
        tell: Callable[[str], None],
        left_s: Callable[[], float],
    ) -> None:
        self._options, self._loads, self._journal = options, loads, journal
        self._tell, self._left_s = tell, left_s
        self._copies, self._subjects = loads.copies, loads.copies.subjects
        self._today = self._subjects.today()

    def space(self, name: str) -> tuple[tuple[BatchTime, ...], Space]:
        """Measure a model's batches. Return their times and the settings they leave.

        Raises:
            RepositoryError: one more copy of the models does not fit into memory.
            ServerRefusedError: the model does not load.
        """
        bounds = self._bounds(self._subjects.models[name], self._instances_in_memory)
        curve = self._curve(name, bounds)
        bounds = dataclasses.replace(bounds, batch=max((each.size for each in curve), default=bounds.batch))
        space = Space.of(
            self._subjects.models[name].config,
            bounds,
            curve,
            latency_ns=latency_limit(self._options, self._subjects),
            search=self._options.search,
        )
        return curve, space

    @functools.cached_property
    def _instances_in_memory(self) -> int:
        """Return how many instances of each model fit into memory.

        Raises:
            RepositoryError: the comparison's two do not.
        """
        on_gpu = any(runs_on_gpu(self._subjects.models[name].config) for name in self._subjects.tunable)
        size = sum(subject.size_bytes for subject in self._subjects.models.values())
        room = self._copies.room(on_gpu=on_gpu)
        if room is None:
            return _MOST_INSTANCES
        fit = int(room.free_bytes * _MEMORY_SHARE / max(size * _COPIES_IN_MEMORY, 1))
        if fit < 2:  # the comparison serves two copies
            raise RepositoryError(
                f"{self._subjects.title} takes about {size * _COPIES_IN_MEMORY >> 20} MiB, two copies of it do not fit "
                f"into the {room.free_bytes >> 20} MiB that {room.kind} has free",
                hint="Unload something else there, or tune on a larger one.",
            )
        return min(fit, _MOST_INSTANCES)

    def _bounds(self, subject: Subject, fit: int) -> Bounds:
        """Return the bounds set by the machine and the model."""
        today = self._today[subject.name].max_batch_size
        best, most = subject.profile or (None, _LARGEST_BATCH)
        batch = max(today, min(_LARGEST_BATCH, most)) if today else 0
        cores = 0 if runs_on_gpu(subject.config) else self._copies.cores
        users = [each.config for each in self._subjects.models.values() if subject.name in models_of(each.config)]
        least = max((int(each.message().max_batch_size) for each in users), default=0)
        return Bounds(cores, fit, batch, best, least)

    def _curve(self, name: str, bounds: Bounds) -> tuple[BatchTime, ...]:
        """Return the time of batches of growing size, as long as a larger one answers more samples a second.

        Raises:
            ServerRefusedError: the model does not load.
        """
        known = {each.size: each for each in self._journal.curve(name)}
        today = self._today[name]
        sizes = curve_sizes(bounds) or (1,)
        if self._journal.has_whole_curve(name):
            return tuple(known[size] for size in sorted(known))
        changes = {name: Setting(1, max(sizes) if bounds.batch else 0, None, today.threads).changes(today)}
        try:
            self._copies.load(CANDIDATE, changes)
        except ServerRefusedError:
            sizes = tuple(size for size in sizes if size <= max(today.max_batch_size, 1))
            changes = {}
            self._copies.load(CANDIDATE, changes)
        share = self._options.budget_s * (
            1 - 0.5 * (self._subjects.tunable.index(name) + 1) / len(self._subjects.tunable)
        )
        misses = 0
        for size in (size for size in sizes if size not in known):
            found = self._loads.batch_time(CANDIDATE, name, size)
            if found is None and self._copies.revive():
                self._copies.load(CANDIDATE, changes)
                found = self._loads.batch_time(CANDIDATE, name, size)
            if found is None:
                break
            most = max((each.per_s for each in known.values()), default=0.0)
            if found.per_s < most:
                # Larger batches usually have more throughput. Measure again in case of a disturbance.
                again = self._loads.batch_time(CANDIDATE, name, size) or found
                found = min(found, again, key=lambda each: each.median_ns)
            self._journal.add_batch(name, found)
            known[size] = found
            self._tell(f"{name}, batch of {size}: {found.median_ns / 1e6:.3g} ms, {found.per_s:,.0f} samples/s")
            limit = latency_limit(self._options, self._subjects)
            misses = misses + 1 if found.per_s < most * LEAST_GAIN else 0
            if (limit is not None and found.median_ns > limit) or misses == _MISSES:
                break
            if self._left_s() < share:
                return tuple(known[size] for size in sorted(known))
        self._journal.end_curve(name)
        return tuple(known[size] for size in sorted(known))
