"""A against B: interleaved blocks in random order, paired, with intervals on the ratios.

Blocks of A and of B alternate in random order, so whatever drifts (clocks, temperature, neighbours) meets both. Each
pair gives one ratio B/A of every number. The intervals are studentised bootstraps of the mean log ratio over pairs
(Hall 1988), simultaneous over all compared numbers (Bonferroni, 98 % together). A difference is shown only when such
an interval leaves 1 out. The number of pairs is fixed in advance, because stopping at the first difference would find
one in noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from repo_manager.errors import ServerError, UsageError
from repo_manager.loadtest.gpu import MetricsSource
from repo_manager.loadtest.inputs.samples import drawn_note, make_sequences, resolve_shapes
from repo_manager.loadtest.inputs.shared_memory import shared_samples
from repo_manager.loadtest.level import jobs_of, metrics_source
from repo_manager.loadtest.measure import Level
from repo_manager.loadtest.metrics import Block, metrics_in
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import RANDOM_NOTE, environment
from repo_manager.loadtest.served_model import ServedModel, ServedModelFacts, connect
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.loadtest.worker.pool import WorkerPool, default_workers
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.resampling import ComparedNumber, compared_numbers, verdict_of
from repo_manager.summary import Summarized
from repo_manager.validation import check_fields

__all__ = [
    "ComparePlan",
    "CompareProgress",
    "Comparison",
    "compare",
    "compare_all",
    "compare_together",
]


_MIN_PAIRS = 6
_LONGEST_BLOCK = 10  # in block lengths: the longest wait for a block's first answer


@dataclasses.dataclass(frozen=True)
class ComparePlan:
    """How long to look.

    Attributes:
        pairs: pairs of blocks, one of A and one of B each. At least 6.
        block_s: measured length of a block.
        settle_s: seconds of load before it, not measured.
        seed: of the order of the blocks and of the resampling.
    """

    pairs: int = 30
    block_s: float = 1.0
    settle_s: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pairs < _MIN_PAIRS:
            raise UsageError(
                f"pairs is {self.pairs}, expected {_MIN_PAIRS} or more",
                hint="An interval of the ratio needs this many pairs of blocks.",
            )
        if self.block_s <= 0 or self.settle_s < 0:
            raise UsageError(
                f"block_s is {self.block_s:g} and settle_s is {self.settle_s:g}, expected above 0 s and 0 s or more"
            )


@dataclasses.dataclass(frozen=True)
class CompareProgress:
    """Told after each pair of blocks.

    Attributes:
        label: name of the comparison under way: `batch size 8`, and with a control its name.
        pairs_done: pairs of blocks measured so far in this comparison.
        pairs: pairs of blocks this comparison takes.
        remaining_s: estimate for this comparison and those after it.
    """

    label: str
    pairs_done: int
    pairs: int
    remaining_s: float


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Summarized):
    """A whole comparison.

    Attributes:
        verdict: one sentence. "no difference shown" when there is none.
        is_different: `True` when the interval of any of `numbers` leaves the ratio 1 out.
        ratios: name -> each pair's ratio B/A, in order of time.
        notes: errors, and numbers not reported.
        started: when it began, before it connected: UTC, ISO 8601, whole seconds.
        command: the command line. Empty from Python.
        precisions: of A and of B, from their manifests. Empty where they are not known.
    """

    a: ServedModelFacts
    b: ServedModelFacts
    level: str
    batch_size: int
    plan: ComparePlan
    numbers: tuple[ComparedNumber, ...]
    verdict: str
    is_different: bool
    ratios: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str]
    started: str = ""
    command: str = ""
    precisions: tuple[str, str] = ("", "")
    schema_version: int = 1

    def _summary(self) -> Mapping[str, Any]:
        return {
            "A": f"{self.a.model}:{self.a.version}",
            "B": f"{self.b.model}:{self.b.version}",
            "load": f"{self.level}, batch size {self.batch_size}",
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True)
class _Side:
    """Everything one side needs to run a block."""

    options: LoadTestOptions
    served: ServedModel
    facts: ServedModelFacts
    endpoint: Endpoint
    metrics: MetricsSource


def compare(
    a: LoadTestOptions,
    b: LoadTestOptions,
    *,
    plan: ComparePlan | None = None,
    progress: Callable[[CompareProgress], None] | None = None,
    following: int = 0,
) -> Comparison:
    """Compare two served models, or versions, under the same load.

    Args:
        a: the reference. Its first concurrency, or else its first rate, is the load of both.
        b: the side compared with it. May be on another server.
        plan: number and length of the blocks. `None`: the defaults of `ComparePlan`.
        progress: called after each pair of blocks. `None`: nothing is reported.
        following: comparisons after this one, for the estimate of the time left.

    Raises:
        UsageError: no load level, or perf_analyzer is asked for (it cannot pair).
        InputError: bad input data.
        ServerError: a server is unreachable, refuses, or answers only with errors.
    """
    return compare_together([(a, b)], plan=plan, progress=progress, following=following)[0]


def compare_together(
    couples: Sequence[tuple[LoadTestOptions, LoadTestOptions]],
    *,
    plan: ComparePlan | None = None,
    progress: Callable[[CompareProgress], None] | None = None,
    following: int = 0,
) -> tuple[Comparison, ...]:
    """Compare couples (A, B) under load at once: in each block all A run beside each other, or all B.

    Args:
        couples: the pairs of sides to compare, each under its own load.
        plan: number and length of the blocks. `None`: the defaults of `ComparePlan`.
        progress: called after each pair of blocks. `None`: nothing is reported.
        following: comparisons after this one, for the estimate of the time left.

    Raises:
        UsageError: as `compare`.
        InputError: as `compare`.
        ServerError: as `compare`.
    """
    begin, plan = time.monotonic(), plan or ComparePlan()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    levels = [_level_of(a) for a, _ in couples]
    order = np.random.default_rng(plan.seed).integers(0, 2, plan.pairs)
    blocks: list[tuple[list[Block], list[Block]]] = [([], []) for _ in couples]
    with contextlib.ExitStack() as stack:
        sides = [(_side(a, stack), _side(b, stack)) for a, b in couples]
        pools = [stack.enter_context(WorkerPool(a.workers or default_workers())) for a, _ in couples]
        threads = stack.enter_context(ThreadPoolExecutor(len(couples)))
        for pair in range(plan.pairs):
            for side in (order[pair], 1 - order[pair]):
                chosen = [both[side] for both in sides]
                if len(couples) == 1:  # runs in this thread, so Ctrl-C reaches it
                    measured = [_run_block(pools[0], levels[0], chosen[0], plan)]
                else:
                    measured = list(threads.map(_run_block, pools, levels, chosen, [plan] * len(couples)))
                for found, block in zip(blocks, measured, strict=True):
                    found[side].append(block)
            if progress is not None:
                each_s = (time.monotonic() - begin) / (pair + 1)
                left = plan.pairs - pair - 1 + following * plan.pairs
                progress(CompareProgress(f"batch size {couples[0][0].batch_size}", pair + 1, plan.pairs, left * each_s))
    return tuple(
        _comparison(both, found, level, plan, (begin, started))
        for both, found, level in zip(sides, blocks, levels, strict=True)
    )


def _comparison(
    sides: tuple[_Side, _Side],
    blocks: tuple[list[Block], list[Block]],
    level: Level,
    plan: ComparePlan,
    began: tuple[float, str],
) -> Comparison:
    numbers, ratios = _numbers(blocks, plan)
    return Comparison(
        a=sides[0].facts,
        b=sides[1].facts,
        level=level.label,
        batch_size=sides[0].options.batch_size,
        plan=plan,
        numbers=numbers,
        verdict=verdict_of(numbers),
        is_different=any(number.shown for number in numbers),
        ratios=ratios,
        notes=_notes(blocks, sides),
        seconds=time.monotonic() - began[0],
        environment=environment(),
        started=began[1],
        command=sides[0].options.command,
    )


def compare_all(
    couples: Sequence[tuple[LoadTestOptions, LoadTestOptions]],
    batch_sizes: Sequence[int] = (LoadTestOptions.batch_size,),
    *,
    concurrency: int = 8,
    plan: ComparePlan | None = None,
    progress: Callable[[CompareProgress], None] | None = None,
) -> tuple[Comparison, ...]:
    """Compare several couples (A, B), each at several batch sizes, one after another.

    The facts for every couple are asked of the servers first: a wrong name or batch size ends it before the first
    block.

    Args:
        couples: the pairs of sides to compare.
        batch_sizes: samples in a request, in place of each couple's own.
        concurrency: requests in flight, for a couple whose options name no level.
        plan: number and length of the blocks. `None`: the defaults of `ComparePlan`.
        progress: called after each pair of blocks. `None`: nothing is reported.

    Raises:
        UsageError: as `compare`, or no couple or batch size.
        ServerError: as `compare`.
    """

    def sized(options: LoadTestOptions, size: int) -> LoadTestOptions:
        levels = options.concurrency or (() if options.rate else (concurrency,))
        return dataclasses.replace(options, batch_size=size, concurrency=levels)

    runs = [(sized(a, size), sized(b, size)) for a, b in couples for size in batch_sizes]
    if not runs:
        raise UsageError("there is nothing to compare: no models, or no batch sizes")
    for options in (one for run in runs for one in run):
        with connect(options) as served:
            facts = served.facts()
        if options.data is None:
            resolve_shapes(facts, options)
    return tuple(
        compare(a, b, plan=plan, progress=progress, following=len(runs) - place - 1)
        for place, (a, b) in enumerate(runs)
    )


def _level_of(options: LoadTestOptions) -> Level:
    if options.client == "perf_analyzer":
        raise UsageError("perf_analyzer cannot run interleaved blocks", hint="Compare with --client native.")
    if options.concurrency:
        return Level("concurrency", options.concurrency[0], "closed loop")
    if options.rate:
        return Level("rate", options.rate[0], options.arrival)
    raise UsageError("a comparison needs one concurrency or one rate")


def _side(options: LoadTestOptions, stack: contextlib.ExitStack) -> _Side:
    served = stack.enter_context(connect(options))
    facts = served.facts()
    samples, streams = make_sequences(facts, options)
    placement = stack.enter_context(shared_samples(served, facts, samples, options))
    endpoint = build_endpoint(facts, samples, options, placement, streams=streams)
    return _Side(options, served, facts, endpoint, metrics_source(options))


def _run_block(pool: WorkerPool, level: Level, side: _Side, plan: ComparePlan) -> Block:
    """Run one block, which lasts until it has an answer. The energy is read at its measured part's ends."""
    slice_ns = max(round(plan.block_s * 1e8), 20_000_000)
    settle = -(-round(plan.settle_s * 1e9) // slice_ns)
    last = settle + max(round(plan.block_s * 1e9 / slice_ns), 1)
    jobs = [
        dataclasses.replace(job, slice_ns=slice_ns) for job in jobs_of(level, side.endpoint, side.options, pool.size)
    ]
    side.metrics.reset()
    pool.begin(jobs)
    measured: list[Slice] = []
    has_answer = is_over = False
    for piece in pool.slices():
        if piece.index == settle - 1:
            side.metrics.sample(0)
        if settle <= piece.index and not is_over and piece.length_ns == slice_ns:
            measured.append(piece)
            has_answer = has_answer or bool(piece.latencies.count or piece.errors)
        is_late = piece.index >= settle + (last - settle) * _LONGEST_BLOCK - 1
        if not is_over and piece.index >= last - 1 and (has_answer or is_late):
            is_over = True
            side.metrics.sample(1)
            pool.stop()
    if not measured:
        raise ServerError(f"{side.facts.model} gave no answers in a block of {plan.block_s:g} s")
    whole = Slice.merge(measured)
    if not whole.latencies.count:
        reason = whole.messages[0][0] if whole.messages else "no answer"
        raise ServerError(
            f"{side.facts.model} answered no request of a block well: {reason}",
            hint=RANDOM_NOTE if side.options.data is None and not side.options.recorded else None,
        )
    inferences = whole.latencies.count * side.options.batch_size
    return Block(
        whole.latencies,
        sum(piece.length_ns for piece in measured) / 1e9,
        whole.errors,
        side.metrics.use().energy_j,
        inferences,
    )


def _block_numbers(block: Block) -> dict[str, float]:
    found = {metric.title: metric.of_block(block) for metric in metrics_in("compare")}
    return {title: float(value) for title, value in found.items() if value is not None}


def _numbers(
    blocks: tuple[list[Block], list[Block]], plan: ComparePlan
) -> tuple[tuple[ComparedNumber, ...], dict[str, tuple[float, ...]]]:
    of_a, of_b = ([_block_numbers(block) for block in side] for side in blocks)
    wholes = [
        _block_numbers(
            Block(
                Histogram.merge(block.latencies for block in side),
                sum(block.seconds for block in side),
                0,
                sum(block.energy_j or 0.0 for block in side),
                sum(block.inferences for block in side),
            )
        )
        for side in blocks
    ]
    lower_is_better = {metric.title: metric.lower_is_better for metric in metrics_in("compare")}
    return compared_numbers(of_a, of_b, (wholes[0], wholes[1]), lower_is_better=lower_is_better, seed=plan.seed)


def _notes(blocks: tuple[list[Block], list[Block]], sides: tuple[_Side, _Side]) -> tuple[str, ...]:
    """Return the notes on the sides. A note true of both is given once."""
    found: dict[str, list[str]] = {}
    for name, side, (facts, options) in zip("AB", blocks, ((s.facts, s.options) for s in sides), strict=True):
        errors = sum(block.errors for block in side)
        notes = [
            f"{errors} requests ended in an error; they are in no number here" if errors else None,
            drawn_note(facts, options),
            "the model has a response cache; repeated inputs are answered from it" if facts.response_cache else None,
            None
            if all(block.energy_j for block in side)
            else "neither the server nor NVML reports energy, so there are no inferences per joule",
        ]
        for note in filter(None, notes):
            found.setdefault(note, []).append(name)
    return tuple(f"{' and '.join(names)}: {note}" for note, names in found.items())
