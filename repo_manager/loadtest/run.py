"""The load test: ask the server, make the requests, measure level after level."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import repo_manager
from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs.samples import drawn_note, make_samples, make_sequences
from repo_manager.loadtest.inputs.shared_memory import shared_samples
from repo_manager.loadtest.level import LevelInterrupted, Report, measure_level, metrics_source
from repo_manager.loadtest.measure import EarlyStop, Level
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.perf_analyzer.drive import find_perf_analyzer, run_perf_analyzer
from repo_manager.loadtest.result import LoadPoint, LoadTestReport, Progress, SearchStep
from repo_manager.loadtest.search import LoadSpace, check_gates, conclude, longest_level_s, search_load
from repo_manager.loadtest.served_model import ServedModel, ServedModelFacts, connect
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.loadtest.worker.pool import WorkerPool, default_workers
from repo_manager.loadtest.worker.schedule import load_replay
from repo_manager.types import as_json

__all__ = ["RANDOM_NOTE", "LoadTestInterrupted", "environment", "find_knee", "is_saturated", "run_load_test"]

_MAX_SATURATION_CONCURRENCY = 1024

_MAX_WAIT_S = 3600.0
RANDOM_NOTE = "The requests were random. If the model refuses such values, give real ones: --input-data, --golden."
_TRIED = 4

Measure = Callable[[Level, EarlyStop | None], LoadPoint]
GAIN = 1.05
KNEE_SHARE = 0.9


class LoadTestInterrupted(KeyboardInterrupt):
    """Ctrl-C during a load test.

    Attributes:
        report: the levels measured until then.
    """

    def __init__(self, report: LoadTestReport) -> None:
        super().__init__("the load test was interrupted")
        self.report = report


def run_load_test(options: LoadTestOptions, *, progress: Report | None = None) -> LoadTestReport:
    """Measure a served model at every level of `options`.

    Args:
        options: settings of the load test.
        progress: called about ten times a second, and with each finished row. `None`: nothing is reported.

    Returns:
        One row a level. A failed level is a row with the outcome `failed`, not an exception.

    Raises:
        UsageError: the options do not fit the model.
        InputError: the input data is bad.
        ServerUnreachableError: no answer from the server before the first level.
        ServerRefusedError: unknown model or version.
        LoadTestInterrupted: Ctrl-C (it is a `KeyboardInterrupt`). With the report so far.
    """
    with connect(options) as served:
        return _run(options, served, progress)


def _run(options: LoadTestOptions, served: ServedModel, progress: Report | None) -> LoadTestReport:
    begin, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    check_gates(options.until)
    facts = served.facts()
    options, fallen_back = _with_accepted_inputs(options, served, facts)
    notes: list[str] = [note] if (note := drawn_note(facts, options)) else []
    notes += fallen_back
    points: list[LoadPoint] = []
    steps: list[SearchStep] = []
    is_interrupted = False
    try:
        for point in _measured(options, (served, facts), (notes, steps), progress):
            points.append(point)
    except LevelInterrupted as exc:
        is_interrupted = True
        points.append(exc.point)
        notes.append("The load test was interrupted: the last row is of the time until then, and levels are missing.")
    if options.until:
        # A level can be measured twice, the second time for its whole duration. The last row counts.
        points = sorted({point.level: point for point in points}.values(), key=lambda point: point.level)
    if any(point.outcome == "failed" and point.error_messages for point in points) and _is_random(options):
        notes.append(RANDOM_NOTE)
    knee, rule = find_knee(points)
    report = LoadTestReport(
        target=facts,
        options=as_json(options),
        points=tuple(points),
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - begin,
        environment=environment(),
        command=options.command,
        knee=None if knee is None else knee.label,
        knee_rule=rule,
        notes=tuple(notes),
        search=conclude(LoadSpace.of(options), options.until, steps) if options.until else None,
    )
    if is_interrupted:
        raise LoadTestInterrupted(report)
    return report


def _is_random(options: LoadTestOptions) -> bool:
    return options.data is None and not options.recorded


def _with_accepted_inputs(
    options: LoadTestOptions, served: ServedModel, facts: ServedModelFacts
) -> tuple[LoadTestOptions, list[str]]:
    """Send the model a few of the random requests. Take the golden sample, and say so, when it refuses one.

    Whether a model takes a value, such as an ID of a vocabulary, shows in no configuration.
    """
    if not options.fallback or not _is_random(options) or facts.sequence or facts.decoupled:
        return options, []
    few = make_samples(facts, dataclasses.replace(options, distinct=min(options.distinct, _TRIED)))
    refusal = next((text for text in map(served.refusal, few) if text is not None), None)
    if refusal is None or served.refusal(options.fallback[0]) is not None:
        return options, []
    note = f"The model refuses random inputs ({refusal:.200}): its golden sample is sent. Real data: --input-data."
    return dataclasses.replace(options, recorded=options.fallback), [note]


def _measured(
    options: LoadTestOptions,
    server: tuple[ServedModel, ServedModelFacts],
    told: tuple[list[str], list[SearchStep]],
    progress: Report | None,
) -> Iterator[LoadPoint]:
    """Yield the rows as they are measured, and add to the notes and to the steps of a search."""
    served, facts = server
    notes, steps = told
    if options.until:
        options = dataclasses.replace(options, duration_s=longest_level_s(options))
    if options.client == "perf_analyzer":
        binary = find_perf_analyzer()
        yield from _levels(options, lambda level, _: run_perf_analyzer(binary, level, facts, options), steps, progress)
        return
    samples, streams = make_sequences(facts, options)
    notes += _notes(facts, len(samples), options)
    if facts.sequence and options.rate:
        # Each sequence has one open request. A request due while all sequences have one waits in the client.
        options = dataclasses.replace(options, max_in_flight=min(options.max_in_flight, options.sequences))
    with (
        shared_samples(served, facts, samples, options) as placement,
        WorkerPool(options.workers or default_workers()) as pool,
    ):
        endpoint = build_endpoint(facts, samples, options, placement, streams=streams)
        metrics = metrics_source(options)
        _wait_until(options.start_at)
        yield from _levels(
            options,
            lambda level, stop: measure_level(
                pool, level, endpoint, options, (served, metrics), progress=progress, early_stop=stop
            ),
            steps,
            progress,
        )


def _wait_until(moment: float | None) -> None:
    """Sleep until a moment of the Unix clock.

    Raises:
        UsageError: it has passed, or is more than an hour away.
    """
    if moment is None:
        return
    left = moment - time.time()
    if not 0 <= left <= _MAX_WAIT_S:
        raise UsageError(
            f"the load is to begin in {left:.1f} s, expected 0 to {_MAX_WAIT_S:.0f} s from now",
            hint="Give --start-at a moment every generator reaches in time, and synchronise the clocks.",
        )
    time.sleep(left)


def _levels(
    options: LoadTestOptions, measure: Measure, steps: list[SearchStep], progress: Report | None
) -> Iterator[LoadPoint]:
    """Yield the rows of the planned levels, or of a search, whose steps are added to `steps`."""
    if options.until:
        for point, step in search_load(LoadSpace.of(options), options, measure):
            steps.append(step)
            if progress is not None:
                decision = f"{step.decision}: {step.reason}"
                progress(Progress(step.label, "done", point.duration_s, point=point, decision=decision))
            yield point
        return
    points: list[LoadPoint] = []
    for level in _planned(options, points):
        points.append(measure(level, None))
        if progress is not None:
            progress(Progress(level.label, "done", points[-1].duration_s, point=points[-1]))
        yield points[-1]


def _planned(options: LoadTestOptions, points: list[LoadPoint]) -> Iterator[Level]:
    """Yield the levels. `points` are the rows so far. They decide how long a search for saturation goes on."""
    if options.until_saturation:
        concurrency = options.concurrency[0] if options.concurrency else 1
        while concurrency <= _MAX_SATURATION_CONCURRENCY:
            yield Level("concurrency", concurrency, "closed loop")
            if is_saturated(points):
                break
            concurrency *= 2
    else:
        for concurrency in options.concurrency:
            yield Level("concurrency", concurrency, "closed loop")
    for rate in options.rate:
        yield Level("rate", rate, options.arrival)
    if options.replay is not None:
        offsets = load_replay(options.replay)
        yield Level("replay", len(offsets) / max(offsets[-1] / 1e9, 1e-9), "replay")


def _notes(facts: ServedModelFacts, distinct: int, options: LoadTestOptions) -> list[str]:
    notes = []
    if facts.response_cache:
        notes.append(
            f"The model has a response cache: with {distinct} distinct requests in rotation, most answers come "
            "from it and not from the model."
        )
    if distinct < options.distinct and options.data is None and not options.recorded:
        notes.append(f"{distinct} distinct requests instead of {options.distinct}, to stay below 256 MiB of inputs.")
    return notes


def is_saturated(points: Sequence[LoadPoint]) -> bool:
    """Return whether the last doubling of the concurrency raised throughput by less than 5 %, or ended in failure."""
    closed = [point for point in points if point.mode == "concurrency"]
    if closed and closed[-1].outcome == "failed":
        return True
    return len(closed) >= 2 and closed[-1].throughput_per_s < GAIN * closed[-2].throughput_per_s


def find_knee(points: Sequence[LoadPoint]) -> tuple[LoadPoint | None, str]:
    """Return the knee of the closed-loop levels and the rule.

    The knee is the lowest concurrency with at least 90 % of the highest throughput: beyond it, requests mostly wait.
    It takes three levels, and the highest throughput must not be at the highest level by more than 5 %: then the
    server was not saturated.
    """
    closed = sorted((point for point in points if point.mode == "concurrency"), key=lambda point: point.level)
    closed = [point for point in closed if point.outcome != "failed"]
    if len(closed) < 3:
        return None, "a knee takes at least three closed-loop levels"
    best = max(point.throughput_per_s for point in closed)
    if closed[-1].throughput_per_s > GAIN * closed[-2].throughput_per_s:
        return None, "throughput still rises by more than 5 % at the highest level: not saturated"
    knee = next(point for point in closed if point.throughput_per_s >= KNEE_SHARE * best)
    return knee, f"the lowest concurrency with at least {KNEE_SHARE:.0%} of the highest throughput ({best:.0f}/s)"


def environment() -> dict[str, str]:
    """Return the client's machine and versions."""
    return {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "repo_manager": repo_manager.__version__,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # read line by line
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return "unknown"
    return "unknown"
