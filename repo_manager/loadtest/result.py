"""The frozen results of a load test. Measured times are integer nanoseconds, lengths of the test seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval
from repo_manager.stats.quantiles import PERCENTILES, Quantiles
from repo_manager.summary import Summarized

__all__ = [
    "BUSY_SHARE",
    "SCHEMA_VERSION",
    "ClientUse",
    "Detail",
    "ErrorCount",
    "GpuUse",
    "Intervals",
    "Latency",
    "LoadPoint",
    "LoadSearch",
    "LoadTestReport",
    "Progress",
    "SearchStep",
    "SeriesPoint",
    "ServerTimes",
    "Window",
]

SCHEMA_VERSION = 1
CURVE_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals(Quantiles[Interval]):
    """Intervals of a point's numbers by a block bootstrap over slices of time. `None` where there is no data."""

    throughput_per_s: Interval | None = None
    mean_ns: Interval | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency(Quantiles[int]):
    """Latencies of the successful requests, in nanoseconds. `None` where the client does not report it."""

    mean_ns: float | None = None
    std_ns: float | None = None
    min_ns: int | None = None
    max_ns: int | None = None

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        """Summarise a histogram."""
        values = histogram.quantiles_ns([percentile.share for percentile in PERCENTILES])
        return cls(
            mean_ns=histogram.mean_ns,
            std_ns=histogram.std_ns,
            min_ns=histogram.min_ns,
            max_ns=histogram.max_ns,
            **{percentile.field: value for percentile, value in zip(PERCENTILES, values, strict=True)},
        )


@dataclasses.dataclass(frozen=True)
class Detail:
    """The numbers of sequences, or of single responses.

    Attributes:
        count: how many ended in the measured time: sequences, first responses, or further ones.
        per_s: `count` divided by the measured seconds.
        histogram: of these times, in the form of `LoadPoint.histogram`.
    """

    count: int
    per_s: float
    latency: Latency
    intervals: Intervals
    histogram: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ErrorCount:
    """An error message and how often it came."""

    message: str
    count: int


@dataclasses.dataclass(frozen=True)
class Window:
    """One measuring window. `used`: it is part of the point's numbers."""

    start_s: float
    duration_s: float
    requests: int
    errors: int
    throughput_per_s: float
    mean_ns: float | None
    p50_ns: int | None
    p99_ns: int | None
    used: bool


@dataclasses.dataclass(frozen=True)
class ServerTimes:
    """The server's own counters over the measured windows. Times are means per request in nanoseconds.

    Attributes:
        mean_batch: inferences per execution of the model. `None` without an execution.
        cache_hits: requests answered from the response cache.
        batches: batch size -> executions of this size.
        parts: of an ensemble, the same of each model it is made of, anyone who asked it in that time.
    """

    requests: int
    inferences: int
    executions: int
    failures: int
    cache_hits: int
    queue_ns: float | None
    compute_input_ns: float | None
    compute_infer_ns: float | None
    compute_output_ns: float | None
    mean_batch: float | None
    batches: Mapping[int, int]
    parts: Mapping[str, ServerTimes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GpuUse:
    """Readings of GPUs in the measured windows, by the server's metrics or NVML. `None` and in `missing` if absent.

    Attributes:
        utilization: mean share of time, 0 to 1, over GPUs and samples.
        memory_used_bytes: largest sum over the GPUs.
        power_w: mean of the sum over the GPUs.
        energy_j: joules used between the first and the last sample, summed over the GPUs.
        energy_per_inference_j: `energy_j` by inferences in the same time.
        missing: numbers reported neither by the server nor by NVML, and the likely reason.
        source: the numbers from NVML. Empty when all are the server's.
    """

    utilization: float | None = None
    memory_used_bytes: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    energy_per_inference_j: float | None = None
    missing: tuple[str, ...] = ()
    source: str = ""


BUSY_SHARE = 0.9
"""Limit of a worker's CPU share: above it the client limits the numbers."""


@dataclasses.dataclass(frozen=True)
class ClientUse:
    """The load client's own use of the machine.

    Attributes:
        name: client behind the numbers: `native`, or `perf_analyzer` (its CPU use and lateness are unknown).
        workers: processes of the native client. 1 for perf_analyzer.
        cpu_share: CPU time by wall time and worker. 1 is a whole CPU each. `None`: unknown.
        cpu_us_per_request: CPU microseconds of all workers for each ended request, failed ones too. `None`: unknown.
        run_queue_share: share of time a worker was ready to run and had no CPU (scheduling delay).
        late_share: open loop: share of the sends more than 0.5 ms after their scheduled moment.
        max_late_ns: open loop: the largest such delay.
        bottleneck: the client, not the server, limited the numbers.
        note: the reason, or another remark.
    """

    name: str
    workers: int = 1
    cpu_share: float | None = None
    cpu_us_per_request: float | None = None
    run_queue_share: float | None = None
    late_share: float | None = None
    max_late_ns: int | None = None
    bottleneck: bool = False
    note: str = ""

    @property
    def is_late(self) -> bool:
        """Whether late sends alone limited the numbers: the machine was busy, and the client's workers were not."""
        return self.bottleneck and bool(self.late_share) and (self.cpu_share or 0.0) <= BUSY_SHARE


@dataclasses.dataclass(frozen=True)
class SeriesPoint:
    """One slice of time, with its latency. `measured`: inside a used window."""

    t_s: float
    throughput_per_s: float
    p50_ns: int | None
    p99_ns: int | None
    errors: int
    measured: bool


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """One load level's row. There is one for every level, in any case.

    Attributes:
        mode: kind of load, and so the unit of `level`: `concurrency`, `rate` or `replay`.
        level: requests in flight, requests a second, or the mean rate of the replayed schedule.
        outcome: `stable`, `unstable` (the windows never agreed), `overloaded` (the queue of an open loop
            grows), `over_limit` (the client stopped at a latency limit) or `failed` (nothing to measure).
        reason: the rule behind the outcome, with its numbers.
        duration_s: length of the measured time.
        requests: successful requests in the measured time.
        throughput_per_s: inferences (requests times batch size) a second.
        curve: (quantile, nanoseconds) pairs of the latency, quantiles ascending from 0 to 1.
        histogram: of all measured latencies, without loss, mergeable. `None` when the client only reports percentiles.
        details: `sequence` (from a sequence's first request to its last answer), `first` (from a request to its first
            response), `between` (from one response to the next). Empty where the model has none.
        measured_from: when the measured time began, in seconds of the Unix clock. `None` when it is not known.
    """

    mode: str
    level: float
    outcome: str
    reason: str
    batch_size: int
    client: ClientUse
    arrival: str = "closed loop"
    duration_s: float = 0.0
    requests: int = 0
    errors: int = 0
    error_messages: tuple[ErrorCount, ...] = ()
    throughput_per_s: float = 0.0
    latency: Latency = Latency()
    intervals: Intervals = Intervals()
    server: ServerTimes | None = None
    gpu: GpuUse = GpuUse()
    windows: tuple[Window, ...] = ()
    series: tuple[SeriesPoint, ...] = ()
    curve: tuple[tuple[float, int], ...] = ()
    histogram: Mapping[str, Any] | None = None
    details: Mapping[str, Detail] = dataclasses.field(default_factory=dict)
    measured_from: float | None = None

    @property
    def responses_per_s(self) -> float | None:
        """Responses a second of a decoupled model. `None` when the model is none."""
        found = [self.details[name].per_s for name in ("first", "between") if name in self.details]
        return sum(found) if found else None

    @property
    def label(self) -> str:
        """`concurrency 8`, `rate 200/s`, `replay`."""
        if self.mode == "concurrency":
            return f"concurrency {self.level:g}"
        return f"rate {self.level:g}/s" if self.mode == "rate" else "replay"

    @property
    def error_share(self) -> float | None:
        """Errors divided by all finished requests. `None` when none did."""
        ended = self.requests + self.errors
        return self.errors / ended if ended else None


@dataclasses.dataclass(frozen=True)
class SearchStep:
    """One level of a search for the largest load.

    Attributes:
        level: requests in flight, or requests a second.
        label: `level` in words, as `LoadPoint.label`: `rate 200/s`.
        decision: `holds` (every gate passes), `fails` (one fails) or `undecided` (none fails, not all pass).
        reason: the deciding gate, with its numbers.
        seconds: seconds measured until the decision.
    """

    level: float
    label: str
    decision: str
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class LoadSearch:
    """The search for the largest load within gates.

    Attributes:
        gates: each as it was written: `p99<20ms`.
        mode: kind of load searched: `concurrency` or `rate`.
        outcome: `pass` (found), `fail` (no load holds) or `inconclusive`.
        reason: the answer in one sentence.
        holds: the largest level shown to hold every gate. `None` when none is.
        fails: the smallest level above it shown to fail. `None` when none is.
        steps: every level, in the order of measurement.
        resolution: how close `holds` and `fails` had to come, as a share.
    """

    gates: tuple[str, ...]
    mode: str
    outcome: str
    reason: str
    holds: float | None
    fails: float | None
    steps: tuple[SearchStep, ...]
    resolution: float


@dataclasses.dataclass(frozen=True)
class Progress:
    """Told while a level runs. `point` is set once, when its row is finished.

    Attributes:
        decision: of a search, with `point`: the decision on the level. Empty otherwise.
        elapsed_s: since the level's start, the warm-up included.
        windows: ended windows of this level. The one being filled is not counted.
        remaining_s: until the level ends for certain. It may be stable earlier.
        spread: how far the last windows are from agreeing, as a share. `None` before there are enough.
        allowed: largest spread of agreeing windows.
    """

    label: str
    phase: str
    elapsed_s: float
    throughput_per_s: float = 0.0
    p50_ns: int | None = None
    p99_ns: int | None = None
    errors: int = 0
    windows: int = 0
    remaining_s: float | None = None
    spread: float | None = None
    allowed: float | None = None
    point: LoadPoint | None = None
    decision: str = ""


def _level_text(point: LoadPoint) -> str:
    p99 = "" if point.latency.p99_ns is None else f", p99 {point.latency.p99_ns / 1e6:.3g} ms"
    return f"{point.throughput_per_s:.4g}/s{p99} ({point.outcome})"


@dataclasses.dataclass(frozen=True, repr=False)
class LoadTestReport(Summarized):
    """A whole load test.

    Attributes:
        target: the server and the model under load. The name is that of the JSON key.
        schema_version: of this document. Raised when a field changes its meaning or goes away.
        knee: label of the knee of the closed-loop levels, and the rule behind it. `None` when there is none.
        notes: remarks for a reader (a response cache, inputs in rotation, ...).
        environment: the client's machine and versions.
        started: when the test began: UTC, ISO 8601, whole seconds. Of merged reports the earliest.
        search: for the largest load. `None` when none was asked for.
    """

    target: ServedModelFacts
    options: Mapping[str, Any]
    points: tuple[LoadPoint, ...]
    started: str
    seconds: float
    environment: Mapping[str, str]
    command: str = ""
    knee: str | None = None
    knee_rule: str = ""
    notes: tuple[str, ...] = ()
    search: LoadSearch | None = None
    schema_version: int = SCHEMA_VERSION

    def _summary(self) -> Mapping[str, Any]:
        facts = {
            "model": f"{self.target.model}:{self.target.version}",
            "server": self.target.url,
            "started": self.started,
        }
        return facts | {point.label: _level_text(point) for point in self.points} | {"knee": self.knee}
