"""A tuning without a server: a formula or a recorded grid in place of load tests, with their noise and time.

The findings of a load test (levels that hold, fail or stay undecided) and its duration follow from one number: the
largest rate held by a state of settings. So a search can run thousands of times against surfaces with a known best
setting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.result import SearchStep
from repo_manager.loadtest.search import FAILS, HOLDS, UNDECIDED, LoadSpace, conclude, next_level
from repo_manager.server.transport import ClientOptions
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.measuring import HeldLoad, Loads
from repo_manager.tuning.race import RaceBlock
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.run import TuningRun
from repo_manager.tuning.scratch import Changes, Copies
from repo_manager.tuning.space import BatchTime, Setting, setting_of
from repo_manager.tuning.subjects import Subject, Subjects

__all__ = ["Surface", "simulated", "subjects_of"]

State = Mapping[str, Setting]
_PROOF_PAIR_S = 2.0
_BATCH_S = 0.9
_WARMUP_S = 0.5
_WITHOUT_QUEUE = 0.045


def subjects_of(configs: Mapping[str, str], tops: Sequence[str]) -> Subjects:
    """Return models with a configuration and no files. Ensembles come after their parts."""
    models = {}
    for name, text in configs.items():
        config = parse_config(text)
        models[name] = Subject(name, 1, config, config, {})
    tunable = tuple(name for name, each in models.items() if "ensemble_scheduling" not in each.config.text)
    return Subjects(tuple(tops), models, tunable)


class _Copies(Copies):
    keeps_instances = True

    def __init__(self, subjects: Subjects, cores: int, load_s: float) -> None:
        client: Any = SimpleNamespace(unload=lambda *_args, **_more: None, wait_live=lambda _: None)
        super().__init__(subjects, client, ("grpc://nowhere:1", None, ClientOptions()), cores)
        self.load_s, self.spent_s = load_s, 0.0
        self.asked: list[State] = []

    def named(self, copy: str, model: str) -> str:
        return f"{copy}__{model}"

    def serve(self, served: str, model: str, config: ModelConfig) -> None:
        self.spent_s += self.load_s

    def room(self, *, on_gpu: bool) -> None:
        return None

    def load(self, copy: str, changes: Changes) -> None:
        super().load(copy, changes)

    def state(self, copy: str) -> State:
        return {name: setting_of(self._served[copy][name]) for name in self.subjects.tunable}


class Surface(Loads):
    """Answers for copies.

    Args:
        copies: the served models.
        options: the aim of the search.
        rate_of: the largest rate held by a state, in requests a second. 0: it holds none.
        batch_ms: time of a batch in milliseconds, by model and size.
        seed: seed of the noise.
        noise: noise of one measurement, as a share. One in twenty is disturbed and shows up to a quarter less.
        stalls: share of the levels that would hold and a stall of the machine leaves undecided.
    """

    def __init__(
        self,
        copies: _Copies,
        options: TuneOptions,
        rate_of: Callable[[State], float],
        batch_ms: Callable[[str, int], float],
        seed: int,
        *,
        noise: float = 0.02,
        stalls: float = 0.0,
    ) -> None:
        super().__init__(copies, options, lambda _name, _version: {})
        self._fake, self._tuned = copies, options
        self._rate_of, self._batch_ms = rate_of, batch_ms
        self._random, self._noise, self._stalls = random.Random(seed), noise, stalls
        self.busy: Callable[[State], Mapping[str, float]] = lambda _: {}
        self.asked: list[State] = []

    def now(self) -> float:
        return self._fake.spent_s

    def seen(self, state: State) -> float:
        """The result of one measurement of a state."""
        share = 1 + self._random.gauss(0, self._noise)
        if self._random.random() < 0.05:
            share *= 1 - self._random.random() / 4
        return self._rate_of(state) * share

    def batch_time(self, copy: str, model: str, size: int) -> BatchTime:
        self._fake.spent_s += _BATCH_S
        time_ns = self._batch_ms(model, size) * 1e6 * (1 + abs(self._random.gauss(0, self._noise)))
        return BatchTime(size, time_ns)

    def _rates(self, copy: str, rates: tuple[float, ...]) -> HeldLoad:
        state = self._fake.state(copy)
        self.asked.append(state)
        low, high = (rates[0] / 1024, 1e7) if len(rates) == 1 else rates
        space = LoadSpace("rate", rates[0], low, high)
        steps: list[SearchStep] = []
        answered: list[float] = []
        while len(steps) < 40 and (size := next_level(space, steps)) is not None:
            self.check_budget()
            step, seen = self._level(state, size)
            steps.append(step)
            answered.append(min(seen, size))
        found = conclude(space, (parse_slo("p99<1s"),), steps)
        rows = tuple(
            {
                "label": step.label,
                "level": step.level,
                "p99_ns": None,
                "decision": step.decision,
                "throughput_per_s": each,
            }
            for step, each in zip(steps, answered, strict=True)
        )
        return HeldLoad(found.holds, found.reason, rows, self.busy(state), found.fails)

    rates_together = _rates

    def _level(self, state: State, rate: float) -> tuple[SearchStep, float]:
        """Decide a level as intervals would: early where it is clear, not at all within their reach."""
        seen = self.seen(state)
        distance = seen / rate - 1
        whole_s = self._tuned.level_s * self.patience
        seconds = whole_s * (0.25 if abs(distance) > 0.2 else 0.5 if abs(distance) > 0.08 else 1.0)
        if distance > 0 and self._stalls and self._random.random() < self._stalls / self.patience:
            distance, seconds = 0.0, whole_s
        self._fake.spent_s += seconds + _WARMUP_S
        decision = UNDECIDED if abs(distance) < 0.01 else HOLDS if distance > 0 else FAILS
        return SearchStep(rate, f"rate {rate:g}/s", decision, f"capacity {distance:+.1%}", seconds), seen

    def block(self, copy: str, rate: float) -> RaceBlock:
        """One block, held or not."""
        self.check_budget()
        self._fake.spent_s += self.block_s(rate)
        seen = self.seen(self._fake.state(copy))
        held = seen > rate
        row = {"label": f"rate {rate:g}/s", "level": rate, "p99_ns": None, "decision": HOLDS if held else FAILS}
        # Without a queue the latency does not tell how much more it would hold.
        shift = min(math.log(max(seen, 1.0) / rate), _WITHOUT_QUEUE)
        return RaceBlock(held, None, (row,), shift)

    def proof(self, rate: float, gain: float, seconds: float) -> tuple[Any, ...]:
        """Pairs of blocks, with a mean as noisy as that of twenty."""
        self._fake.spent_s += min(
            max(seconds, 6 * _PROOF_PAIR_S), (8 if gain >= 1.6 else 12 if gain >= 1.3 else 20) * _PROOF_PAIR_S
        )
        today, best = (self._rate_of(self._fake.state(copy)) for copy in ("today", "winner"))
        ratio = best / max(today, 1e-9) * (1 + self._random.gauss(0, self._noise / 3))
        side = "B" if ratio > 1 + self._noise else "A" if ratio < 1 - self._noise else None
        number = SimpleNamespace(name="throughput", better=side, shown=side is not None)
        return (SimpleNamespace(numbers=(number,), verdict=f"throughput of B is {ratio:.3f} of A's"),)


class _SameAnswers:
    notes: tuple[str, ...] = ()

    def record(self, copy: str) -> None:
        """Everything answers alike."""

    def differ(self, copy: str) -> str:
        return ""

    def accuracy(self, copy: str) -> None:
        """Nothing is scored."""


def simulated(
    subjects: Subjects,
    options: TuneOptions,
    folder: Path,
    *,
    cores: int,
    rate_of: Callable[[State], float],
    batch_ms: Callable[[str, int], float],
    seed: int,
    noise: float = 0.02,
    stalls: float = 0.0,
    load_s: float = 0.5,
) -> tuple[TuningRun, Surface]:
    """Return a run whose measurements a surface answers, in simulated time."""
    copies = _Copies(subjects, cores, load_s)
    surface = Surface(copies, options, rate_of, batch_ms, seed, noise=noise, stalls=stalls)
    answers: Any = _SameAnswers()
    journal = Journal(folder, {"model": "simulated", "seed": seed})
    return TuningRun(options, surface, answers, journal, lambda _: None, clock=surface.now), surface
