"""Measures one load level with the native client: warm-up, windows, the stability rule, the row.

The rule: the last `stable_windows` windows agree when each one's throughput, and each one's mean latency, is within
`stability` of their average. A window lasts `window_s` and grows, up to ten times that, until 50 requests ended in it.
The row is made of the agreeing windows, or of the last ones when none agreed. With a fixed duration or number of
requests the row is made of the whole measured time, and the rule only labels it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from repo_manager.errors import ServerError
from repo_manager.loadtest.derive import (
    agreement,
    client_use,
    details_of,
    growing_queue,
    intervals_of,
    outcome_of,
    server_times,
    spread_of,
)
from repo_manager.loadtest.gpu import MetricsSource
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import (
    CURVE_QUANTILES,
    ClientUse,
    ErrorCount,
    Latency,
    LoadPoint,
    Progress,
    SeriesPoint,
    Window,
)
from repo_manager.loadtest.served_model import ModelStatistics, ServedModel
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram

__all__ = ["EarlyStop", "Level", "Measurement", "slice_length_ns"]

_MIN_SLICE_NS = 100_000_000
_MIN_REQUESTS = 50
_MAX_GROWTH = 10
_KEPT_RATE = 0.95


@dataclasses.dataclass(frozen=True)
class Level:
    """A load level: `concurrency`, `rate` or `replay`, with its size and how requests arrive."""

    mode: str
    level: float
    arrival: str

    @property
    def label(self) -> str:
        """As `LoadPoint.label`."""
        return LoadPoint(self.mode, self.level, "", "", 1, ClientUse("native")).label


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """A rule to end a level before its fixed time is over.

    Attributes:
        after_windows: numbers of measured windows after which the row so far is looked at.
        may_decide: told the windows. Whether the row's intervals are worth their making, at the cost of a tenth of a
            second of CPU, a disturbance of the measurement.
        is_enough: called with the row. Whether no more is needed.
    """

    after_windows: frozenset[int]
    may_decide: Callable[[list[Window]], bool]
    is_enough: Callable[[LoadPoint], bool]


@dataclasses.dataclass
class _OpenWindow:
    """A window being filled. `snapshot` numbers the server's counters at its start."""

    slices: list[Slice]
    snapshot: int


def slice_length_ns(options: LoadTestOptions) -> int:
    """Return the length of a slice: a tenth of a window, at least 0.1 s, and at most 600 in a fixed duration."""
    length = max(round(options.window_s * 1e8), _MIN_SLICE_NS)
    if options.duration_s is not None:
        length = min(max(length, round(options.duration_s * 1e9 / 600)), max(round(options.duration_s * 1e9), 1))
    return length


class Measurement:
    """Takes the slices of one level, decides when it has seen enough, and makes the row.

    Args:
        level: the load: requests in flight, or a rate.
        options: settings of the load test.
        served: connection to the server. Asked for the model's counters around windows.
        metrics: reads the server's metrics page.
        progress: called about ten times a second, and with each finished row. `None`: nothing is reported.
        early_stop: decides after each slice whether the level can end. `None`: it runs to its end.
    """

    def __init__(
        self,
        level: Level,
        options: LoadTestOptions,
        served: ServedModel,
        metrics: MetricsSource,
        progress: Callable[[Progress], None] | None,
        early_stop: EarlyStop | None = None,
    ) -> None:
        self.finished = False
        self.start_unix_s: float | None = None  # start of the load, Unix time in seconds; `None` before
        self._level = level
        self._options = options
        self._served = served
        self._metrics = metrics
        self._progress = progress
        self._early_stop = early_stop
        self._slice_ns = slice_length_ns(options)
        self._warmup = 0 if level.mode == "replay" else round(options.warmup_s * 1e9 / self._slice_ns)
        self._windows: list[list[Slice]] = []
        self._marks: list[int] = []
        self._open = _OpenWindow([], 0)
        self._snapshots: list[ModelStatistics] = []
        self._series: list[Slice] = []
        self._workers = 1
        metrics.reset()
        if self._warmup == 0:
            self._snapshot()

    def _snapshot(self) -> int:
        statistics = self._served.statistics()
        self._snapshots.append(statistics)
        self._metrics.sample(statistics.inferences)
        return len(self._snapshots) - 1

    def take(self, piece: Slice, workers: int) -> None:
        """Take the next slice. Sets `finished` when no more is needed."""
        if self.finished:
            return
        self._workers = workers
        self._series.append(piece)
        if piece.index < self._warmup:
            if piece.index == self._warmup - 1:
                self._snapshot()
                self._open.snapshot = 0
            self._tell("warming up", piece)
            return
        if piece.length_ns < self._slice_ns and self._level.mode != "replay":
            return  # the partial slice at the end, up to the last answer
        self._open.slices.append(piece)
        if self._window_is_full():
            self._close_window()
        self._tell("measuring", piece)

    def _window_is_full(self) -> bool:
        slices = self._open.slices
        elapsed_ns = sum(piece.length_ns for piece in slices)
        if self._is_enough():
            return True
        window_ns = self._options.window_s * 1e9
        if self._options.duration_s is not None:  # the stability rule needs several windows in the duration
            window_ns = min(window_ns, self._options.duration_s * 1e9 / self._options.stable_windows)
        if elapsed_ns < window_ns - self._slice_ns / 2:
            return False
        ended = sum(piece.latencies.count + piece.errors for piece in slices)
        return ended >= _MIN_REQUESTS or elapsed_ns >= _MAX_GROWTH * window_ns or self._options.duration_s is not None

    def _is_enough(self) -> bool:
        """Whether a fixed duration or number of requests is reached."""
        options = self._options
        slices = [piece for window in [*self._windows, self._open.slices] for piece in window]
        if options.duration_s is not None:
            return sum(piece.length_ns for piece in slices) >= options.duration_s * 1e9 - self._slice_ns / 2
        if options.request_count is not None:
            return sum(piece.latencies.count + piece.errors for piece in slices) >= options.request_count
        return False

    def _close_window(self) -> None:
        enough = self._is_enough()
        self._windows.append(self._open.slices)
        self._marks.append(self._open.snapshot)
        options = self._options
        is_fixed = options.duration_s is not None or options.request_count is not None
        stop = self._early_stop
        is_looked_at = (
            stop is not None
            and len(self._windows) in stop.after_windows
            and stop.may_decide(self._summaries(self._windows))
        )
        if is_fixed and not (enough or is_looked_at) and any(piece.latencies.count for piece in self._open.slices):
            # All windows are used, so the counters between them are not needed. Reading them would disturb the
            # measurement.
            if self._metrics.tells:
                self._metrics.sample(self._snapshots[-1].inferences)
            self._open = _OpenWindow([], len(self._snapshots) - 1)
        else:
            self._open = _OpenWindow([], self._snapshot())
        if self._level.mode == "replay":
            return
        if is_fixed:
            self.finished = enough or (stop is not None and is_looked_at and stop.is_enough(self.point()))
            return
        count = len(self._windows)
        if count >= options.stable_windows:
            last = self._summaries(self._windows)[-options.stable_windows :]
            agree, _ = agreement(last, options.stability)
            self.finished = agree or count >= options.max_windows or not any(window.requests for window in last)

    def _tell(self, phase: str, piece: Slice) -> None:
        if self._progress is None:
            return
        seconds = piece.length_ns / 1e9
        elapsed_s = len(self._series) * self._slice_ns / 1e9
        options = self._options
        last = self._summaries(self._windows[-options.stable_windows :])
        self._progress(
            Progress(
                label=self._level.label,
                phase=phase,
                elapsed_s=elapsed_s,
                throughput_per_s=piece.latencies.count * options.batch_size / seconds if seconds else 0.0,
                p50_ns=piece.latencies.quantile_ns(0.5),
                p99_ns=piece.latencies.quantile_ns(0.99),
                errors=sum(part.errors for part in self._series),
                windows=len(self._windows),
                remaining_s=self._remaining_s(elapsed_s),
                spread=max(spread_of(last).values()) if len(last) > 1 else None,
                allowed=options.stability,
            )
        )

    def _remaining_s(self, elapsed_s: float) -> float | None:
        """Return how long the level lasts at most, or `None` when a number of requests or a replay ends it."""
        options = self._options
        if options.request_count is not None or self._level.mode == "replay":
            return None
        total_s = options.max_windows * options.window_s if options.duration_s is None else options.duration_s
        return max(total_s + options.warmup_s - elapsed_s, 0.0)

    def _summaries(self, groups: list[list[Slice]]) -> list[Window]:
        windows = []
        for slices in groups:
            whole, seconds = Slice.merge(slices), sum(piece.length_ns for piece in slices) / 1e9
            windows.append(
                Window(
                    start_s=slices[0].index * self._slice_ns / 1e9,
                    duration_s=seconds,
                    requests=whole.latencies.count,
                    errors=whole.errors,
                    throughput_per_s=whole.latencies.count * self._options.batch_size / max(seconds, 1e-9),
                    mean_ns=whole.latencies.mean_ns,
                    p50_ns=whole.latencies.quantile_ns(0.5),
                    p99_ns=whole.latencies.quantile_ns(0.99),
                    used=False,
                )
            )
        return windows

    def stop(self) -> None:
        """Read the server's counters before a row is made of an interrupted measurement."""
        if self._snapshots and (self._windows or self._open.slices):
            with contextlib.suppress(ServerError):
                self._snapshot()

    def point(self) -> LoadPoint:
        """Make the row of the measurements."""
        if self._open.slices and (self._level.mode == "replay" or not self._windows):
            self._windows.append(self._open.slices)
            self._marks.append(self._open.snapshot)
            self._open = _OpenWindow([], self._snapshot())
        options = self._options
        fixed = options.duration_s is not None or options.request_count is not None or self._level.mode == "replay"
        windows = self._summaries(self._windows)
        count = len(windows) if fixed else min(options.stable_windows, len(windows))
        used = [piece for window in self._windows[len(windows) - count :] for piece in window]
        windows = [
            dataclasses.replace(window, used=place >= len(windows) - count) for place, window in enumerate(windows)
        ]
        judged = self._summaries(_parts(used, options.stable_windows)) if fixed else windows[-options.stable_windows :]
        return self._row(windows, used, outcome_of(judged, used, options))

    def _row(self, windows: list[Window], used: list[Slice], outcome: tuple[str, str]) -> LoadPoint:
        options = self._options
        whole = Slice.merge(used) if used else Slice(0, 0, Histogram.empty())
        histogram, seconds = whole.latencies, sum(piece.length_ns for piece in used) / 1e9
        answered = histogram.count / seconds if seconds else 0.0
        due = self._level.level * seconds
        # A Poisson process often has fewer arrivals than its rate. The server is not to blame for them.
        spread = 3 * due**0.5 if self._level.arrival == "poisson" else 0.0
        steady = self._level.mode == "rate" and self._level.arrival != "ramp"
        if steady and histogram.count < min(_KEPT_RATE * due, due - spread):
            outcome = (
                outcome[0],
                f"{outcome[1]}; only {answered:.0f} of {self._level.level:g} requests/s were answered",
            )
        if self._level.mode == "rate" and self._level.arrival != "ramp" and outcome[0] != "failed":
            grows = growing_queue(self._series, used, self._level.level, options.max_in_flight * self._workers)
            outcome = outcome if grows is None else ("overloaded", grows)
        first = next((mark for mark, window in zip(self._marks, windows, strict=True) if window.used), 0)
        inside = {piece.index for piece in used}
        return LoadPoint(
            mode=self._level.mode,
            level=self._level.level,
            outcome=outcome[0],
            reason=outcome[1],
            batch_size=options.batch_size,
            client=client_use(whole, seconds, self._workers, is_open=self._level.mode != "concurrency"),
            arrival=self._level.arrival,
            duration_s=seconds,
            requests=histogram.count,
            errors=whole.errors,
            error_messages=tuple(ErrorCount(message, count) for message, count in whole.messages),
            throughput_per_s=histogram.count * options.batch_size / seconds if seconds else 0.0,
            latency=Latency.of(histogram),
            intervals=intervals_of(used, batch_size=options.batch_size, seed=options.seed),
            server=server_times(self._snapshots[first], self._snapshots[-1]) if len(self._snapshots) > 1 else None,
            gpu=self._metrics.use(first),
            windows=tuple(windows),
            series=tuple(self._series_point(piece, piece.index in inside) for piece in self._series),
            curve=tuple(
                (quantile, value)
                for quantile in CURVE_QUANTILES
                if (value := histogram.quantile_ns(quantile)) is not None
            ),
            histogram=histogram.to_json(),
            details=details_of(used, seed=options.seed) if used else {},
            measured_from=self._moment_of(used),
        )

    def _moment_of(self, used: list[Slice]) -> float | None:
        """Return when the first used slice began, in seconds of the Unix clock."""
        if self.start_unix_s is None or not used:
            return None
        return self.start_unix_s + used[0].index * self._slice_ns / 1e9

    def _series_point(self, piece: Slice, measured: bool) -> SeriesPoint:
        seconds = max(piece.length_ns / 1e9, 1e-9)
        return SeriesPoint(
            t_s=piece.index * self._slice_ns / 1e9,
            throughput_per_s=piece.latencies.count * self._options.batch_size / seconds,
            p50_ns=piece.latencies.quantile_ns(0.5),
            p99_ns=piece.latencies.quantile_ns(0.99),
            errors=piece.errors,
            measured=measured,
        )


def _parts(slices: list[Slice], count: int) -> list[list[Slice]]:
    """Cut a fixed measurement into equal parts for the rule. Fewer when there are not enough slices."""
    size = len(slices) // count
    if not size:
        return [[piece] for piece in slices]
    return [slices[number * size : (number + 1) * size] for number in range(count)]
