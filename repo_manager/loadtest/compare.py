"""A against B: interleaved blocks in random order, paired, with intervals on the ratios.

Blocks of A and of B alternate in random order, so that whatever drifts (clocks, temperature, neighbours) meets both.
Each pair gives one ratio B/A of every number; the intervals are studentised bootstraps of the mean log ratio over
pairs (Hall 1988), simultaneous over all compared numbers (Bonferroni, 98 % together). A difference is shown only
when such an interval leaves 1 out; the number of pairs is fixed beforehand, because stopping at the first
difference would find one in noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from repo_manager.errors import ServerError, UsageError
from repo_manager.loadtest.comparison import ComparedNumber, ComparePlan, Comparison
from repo_manager.loadtest.histogram import Histogram
from repo_manager.loadtest.inputs import make_samples
from repo_manager.loadtest.measure import Level
from repo_manager.loadtest.metrics import MetricsSource
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.payload import build_endpoint
from repo_manager.loadtest.pool import WorkerPool, default_workers
from repo_manager.loadtest.ratio import ratio_interval
from repo_manager.loadtest.recorder import Slice
from repo_manager.loadtest.run import default_metrics_url, environment, jobs_of
from repo_manager.loadtest.shared_memory import shared_samples
from repo_manager.loadtest.target import Target, TargetFacts, connect
from repo_manager.loadtest.wire import Endpoint

__all__ = ["compare", "compare_batch_sizes"]

_ALPHA = 0.02
_LARGER_IS_BETTER = {
    "throughput": True,
    "inferences per joule": True,
    "mean latency": False,
    "p50 latency": False,
    "p99 latency": False,
}


@dataclasses.dataclass(frozen=True)
class _Side:
    """What one side needs to run a block."""

    options: LoadTestOptions
    target: Target
    facts: TargetFacts
    endpoint: Endpoint
    metrics: MetricsSource


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """One measured block."""

    latencies: Histogram
    seconds: float
    errors: int
    energy_j: float | None
    inferences: int


def compare(
    a: LoadTestOptions,
    b: LoadTestOptions,
    *,
    plan: ComparePlan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two served models, or versions, under the same load.

    Args:
        a: the reference; its first concurrency, or else its first rate, is the load of both.
        b: what is compared with it; may be on another server.
        plan: how long to look.
        progress: is told (finished pairs, all pairs).

    Raises:
        UsageError: no load level, or perf_analyzer is asked for (it cannot pair).
        InputError: bad input data.
        ServerError: a server is unreachable, refuses, or answers only with errors.
    """
    begin, plan = time.monotonic(), plan or ComparePlan()
    level = _level_of(a)
    order = np.random.default_rng(plan.seed).integers(0, 2, plan.pairs)
    blocks: tuple[list[_Block], list[_Block]] = ([], [])
    with contextlib.ExitStack() as stack:
        sides = (_side(a, stack), _side(b, stack))
        pool = stack.enter_context(WorkerPool(a.workers or default_workers()))
        for pair in range(plan.pairs):
            for side in (order[pair], 1 - order[pair]):
                blocks[side].append(_run_block(pool, level, sides[side], plan))
            if progress is not None:
                progress(pair + 1, plan.pairs)
    numbers, ratios = _numbers(blocks, plan)
    return Comparison(
        a=sides[0].facts,
        b=sides[1].facts,
        level=level.label,
        batch_size=a.batch_size,
        plan=plan,
        numbers=numbers,
        verdict=_verdict(numbers),
        is_different=any(number.shown for number in numbers),
        ratios=ratios,
        notes=_notes(blocks, sides),
        seconds=time.monotonic() - begin,
        environment=environment(),
    )


def compare_batch_sizes(
    a: LoadTestOptions,
    b: LoadTestOptions,
    batch_sizes: Sequence[int],
    *,
    plan: ComparePlan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Comparison, ...]:
    """Compare at several batch sizes, one after another. Raises as `compare`."""
    return tuple(
        compare(
            dataclasses.replace(a, batch_size=size),
            dataclasses.replace(b, batch_size=size),
            plan=plan,
            progress=progress,
        )
        for size in batch_sizes
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
    target = connect(options)
    facts = target.facts()
    samples = make_samples(facts, options)
    placement = stack.enter_context(shared_samples(target, facts, samples, options))
    endpoint = build_endpoint(facts, samples, options, placement)
    return _Side(options, target, facts, endpoint, MetricsSource(options.metrics_url or default_metrics_url(options)))


def _run_block(pool: WorkerPool, level: Level, side: _Side, plan: ComparePlan) -> _Block:
    """Run one block; the energy is read at its measured part's ends."""
    slice_ns = max(round(plan.block_s * 1e8), 20_000_000)
    settle = -(-round(plan.settle_s * 1e9) // slice_ns)
    last = settle + max(round(plan.block_s * 1e9 / slice_ns), 1)
    jobs = [
        dataclasses.replace(job, slice_ns=slice_ns) for job in jobs_of(level, side.endpoint, side.options, pool.size)
    ]
    side.metrics.reset()
    pool.begin(jobs)
    measured: list[Slice] = []
    for piece in pool.slices():
        if piece.index == settle - 1:
            side.metrics.sample(0)
        if settle <= piece.index < last and piece.length_ns == slice_ns:
            measured.append(piece)
        if piece.index == last - 1:
            side.metrics.sample(1)
            pool.stop()
    if not measured:
        raise ServerError(f"{side.facts.model} gave no answers in a block of {plan.block_s:g} s")
    whole = Slice.merge(measured)
    if not whole.latencies.count:
        reason = whole.messages[0][0] if whole.messages else "no answer"
        raise ServerError(f"{side.facts.model} answered no request of a block well: {reason}")
    inferences = whole.latencies.count * side.options.batch_size
    return _Block(
        whole.latencies,
        sum(piece.length_ns for piece in measured) / 1e9,
        whole.errors,
        side.metrics.use().energy_j,
        inferences,
    )


def _block_numbers(block: _Block) -> dict[str, float]:
    numbers = {
        "throughput": block.inferences / block.seconds,
        "mean latency": block.latencies.mean_ns or 0.0,
        "p50 latency": float(block.latencies.quantile_ns(0.5) or 0),
        "p99 latency": float(block.latencies.quantile_ns(0.99) or 0),
    }
    if block.energy_j:
        numbers["inferences per joule"] = block.inferences / block.energy_j
    return numbers


def _numbers(
    blocks: tuple[list[_Block], list[_Block]], plan: ComparePlan
) -> tuple[tuple[ComparedNumber, ...], dict[str, tuple[float, ...]]]:
    of_a, of_b = ([_block_numbers(block) for block in side] for side in blocks)
    names = [name for name in _LARGER_IS_BETTER if all(name in numbers for numbers in (*of_a, *of_b))]
    wholes = [
        _block_numbers(
            _Block(
                Histogram.merge(block.latencies for block in side),
                sum(block.seconds for block in side),
                0,
                sum(block.energy_j or 0.0 for block in side),
                sum(block.inferences for block in side),
            )
        )
        for side in blocks
    ]
    compared, ratios = [], {}
    for name in names:
        logs = np.log([numbers[name] for numbers in of_b]) - np.log([numbers[name] for numbers in of_a])
        ratios[name] = tuple(np.exp(logs).tolist())
        interval = ratio_interval(logs, alpha=_ALPHA / len(names), seed=plan.seed)
        shown = interval.low > 1 or interval.high < 1
        larger = float(np.mean(logs)) > 0
        better = ("B" if larger == _LARGER_IS_BETTER[name] else "A") if shown else None
        ratio = float(np.exp(np.mean(logs)))
        compared.append(ComparedNumber(name, wholes[0][name], wholes[1][name], ratio, interval, shown, better))
    return tuple(compared), ratios


def _verdict(numbers: Sequence[ComparedNumber]) -> str:
    shown = [number for number in numbers if number.shown]
    if not shown:
        reach = max(max(number.interval.high, 1 / number.interval.low) - 1 for number in numbers[:1])
        return f"no difference shown (one of about {reach:.1%} in {numbers[0].name} would have been)"
    parts = [
        f"{number.name} of B is {number.ratio:.3f} of A's [{number.interval.low:.3f}, {number.interval.high:.3f}]"
        for number in shown
    ]
    return "; ".join(parts)


def _notes(blocks: tuple[list[_Block], list[_Block]], sides: tuple[_Side, _Side]) -> tuple[str, ...]:
    notes = []
    for name, side, facts in zip("AB", blocks, (sides[0].facts, sides[1].facts), strict=True):
        errors = sum(block.errors for block in side)
        if errors:
            notes.append(f"{name}: {errors} requests ended in an error; they are in no number here")
        if facts.response_cache:
            notes.append(f"{name}: the model has a response cache; repeated inputs are answered from it")
        if not all(block.energy_j for block in side):
            notes.append(f"{name}: the server does not report energy, so there are no inferences per joule")
    return tuple(notes)
