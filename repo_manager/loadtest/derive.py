"""Conclusions from a measured level's numbers: whether it is stable, the server's part, the client's state."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import BUSY_SHARE, ClientUse, Detail, Intervals, Latency, ServerTimes, Window
from repo_manager.loadtest.served_model import ModelStatistics
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram, values_of
from repo_manager.stats.intervals import Interval
from repo_manager.stats.quantiles import PERCENTILES
from repo_manager.stats.resampling import block_weights

__all__ = [
    "agreement",
    "client_use",
    "details_of",
    "growing_queue",
    "intervals_of",
    "outcome_of",
    "server_times",
    "spread_of",
]

_STARVED_SHARE = 0.25
_LATE_SHARE = 0.01
_LATE_SENDS = 5  # requests: at a low rate, one or two late sends happen on any machine
_KEPT_SHARE = 0.95
_FULL_SHARE = 0.9
_RESAMPLES = 400
_MIN_SLICES = 8
_CONFIDENCE = 0.95
_GROUPS = 120
_CHUNKS = 10
_BOOTSTRAPPED = [percentile for percentile in PERCENTILES if percentile.has_interval]
_QUANTILES = [percentile.share for percentile in _BOOTSTRAPPED]

Floats = npt.NDArray[np.float64]


def agreement(windows: list[Window], stability: float) -> tuple[bool, str]:
    """Apply the rule to windows. Return whether they agree, and the rule with its numbers.

    Args:
        windows: the last ones, in order of time.
        stability: largest accepted deviation from the windows' mean, as a share.
    """
    spread = spread_of(windows)
    agree = all(share <= stability for share in spread.values())
    spreads = ", ".join(f"{name} ±{share:.1%}" for name, share in spread.items())
    return agree, f"the last {len(windows)} windows: {spreads} (allowed ±{stability:.0%})"


def spread_of(windows: list[Window]) -> dict[str, float]:
    """Return how far the windows' throughput and mean latency are from their averages, as shares."""
    worst: dict[str, float] = {}
    for name, values in (
        ("throughput", [window.throughput_per_s for window in windows]),
        ("mean latency", [window.mean_ns or 0.0 for window in windows]),
    ):
        mean = sum(values) / len(values)
        worst[name] = max(abs(value - mean) / mean for value in values) if mean > 0 else float("inf")
    return worst


def outcome_of(last: list[Window], used: list[Slice], options: LoadTestOptions) -> tuple[str, str]:
    """Return a level's outcome and the deciding rule, from its last windows and all it measured.

    Args:
        last: the last windows, in order of time.
        used: the measured slices of time.
        options: settings of the load test.
    """
    whole = Slice.merge(used) if used else None
    if whole is None or not whole.latencies.count:
        first = whole.messages[0][0] if whole is not None and whole.messages else "no answer in the measured time"
        return "failed", f"no request ended well: {first}"
    if len(last) < options.stable_windows:
        return (
            "unstable",
            f"{len(last)} windows were measured; {options.stable_windows} have to agree to call it stable",
        )
    agree, rule = agreement(last, options.stability)
    return ("stable" if agree else "unstable"), rule


def growing_queue(series: list[Slice], used: list[Slice], rate: float, in_flight_limit: int) -> str | None:
    """Return a sentence if the server cannot keep up with an open loop and its queue grows, else `None`.

    If the server answers a share d less than the rate, the latency rises by about d seconds each second. Three things
    must hold. Fewer requests end than are due, by more than chance explains. The mean latency rises by at least half
    of the expected rise. The requests are open at the server: a slow client would not have sent them.

    Args:
        series: all slices from the start of the load, in order of time.
        used: the measured slices, in order of time.
        rate: requests a second due by the schedule, held against those ended.
        in_flight_limit: how many may be open at once. Further due requests wait in the client.
    """
    third = len(used) // 3
    if not third:
        return None
    seconds = sum(piece.length_ns for piece in used) / 1e9
    due = rate * seconds
    ended = sum(piece.latencies.count + piece.errors for piece in used)
    shortfall = due - ended
    if ended > _KEPT_SHARE * due or shortfall < 3 * due**0.5:
        return None
    until = used[-1].index
    open_now = sum(each.sent - each.latencies.count - each.errors for each in series if each.index <= until)
    first, last = (Slice.merge(part).latencies.mean_ns for part in (used[:third], used[-third:]))
    if first is None or last is None or open_now < min(shortfall / 2, _FULL_SHARE * in_flight_limit):
        return None
    expected_ns = shortfall / due * seconds * 2 / 3 * 1e9  # between the middles of the first and last third
    if last - first < expected_ns / 2:
        return None
    held = ended / seconds
    return (
        f"the queue grows: {held:.4g} of {rate:g} requests/s were answered, and the mean latency rose from "
        f"{first / 1e6:.4g} to {last / 1e6:.4g} ms; this server holds at most about {held:.4g}/s"
    )


def server_times(before: ModelStatistics, after: ModelStatistics) -> ServerTimes:
    """Return the difference between two readings of the server's counters. Never negative, also after a reset."""
    requests = max(after.requests - before.requests, 0)
    executions = max(after.executions - before.executions, 0)
    inferences = max(after.inferences - before.inferences, 0)

    def mean_ns(stage: str) -> float | None:
        return max(after.stage_ns[stage] - before.stage_ns[stage], 0) / requests if requests else None

    return ServerTimes(
        requests=requests,
        inferences=inferences,
        executions=executions,
        failures=max(after.failures - before.failures, 0),
        cache_hits=max(after.cache_hits - before.cache_hits, 0),
        queue_ns=mean_ns("queue"),
        compute_input_ns=mean_ns("compute_input"),
        compute_infer_ns=mean_ns("compute_infer"),
        compute_output_ns=mean_ns("compute_output"),
        mean_batch=inferences / executions if executions else None,
        batches={
            size: count - before.batches.get(size, 0)
            for size, count in sorted(after.batches.items())
            if count > before.batches.get(size, 0)
        },
        parts={
            name: server_times(before.parts[name], part) for name, part in after.parts.items() if name in before.parts
        },
    )


def client_use(whole: Slice, seconds: float, workers: int, *, is_open: bool) -> ClientUse:
    """Judge the client itself: it is the bottleneck when its CPUs were not enough or its sends came late.

    Args:
        whole: the measured slices of all workers as one, by `Slice.merge`.
        seconds: measured time in seconds. 0 returns a `ClientUse` without numbers.
        workers: load processes. CPU and waiting times are divided by it.
        is_open: whether the loop is open (requests sent at a rate).
    """
    if not seconds:
        return ClientUse("native", workers)
    ended = whole.latencies.count + whole.errors
    cpu_share = whole.cpu_ns / 1e9 / seconds / workers
    waiting = whole.run_queue_ns / 1e9 / seconds / workers
    late = whole.late / whole.sent if is_open and whole.sent else None
    notes = []
    if cpu_share > BUSY_SHARE:
        notes.append(f"its workers used {cpu_share:.0%} of a CPU each: add workers")
    if late is not None and late > _LATE_SHARE and whole.late >= _LATE_SENDS:
        notes.append(f"{late:.1%} of the sends were more than 0.5 ms late, at most {whole.max_late_ns / 1e6:.1f} ms")
    bottleneck = bool(notes)
    if waiting > _STARVED_SHARE:
        notes.append(f"it waited for a CPU {waiting:.0%} of the time: it shares its CPUs with the server or others")
    return ClientUse(
        name="native",
        workers=workers,
        cpu_share=cpu_share,
        cpu_us_per_request=whole.cpu_ns / 1e3 / ended if ended else None,
        run_queue_share=waiting,
        late_share=late,
        max_late_ns=whole.max_late_ns if is_open else None,
        bottleneck=bottleneck,
        note="; ".join(notes),
    )


def intervals_of(slices: list[Slice], *, batch_size: int, seed: int = 0) -> Intervals:
    """Return 95 % intervals. All `None` with fewer than 8 slices or without a request.

    Args:
        slices: measured slices of equal length, in order of time.
        batch_size: inferences in a request: turns requests into `throughput_per_s`.
        seed: seed of the random numbers. Equal seeds give equal results.
    """
    slices = _grouped(slices)
    whole = Histogram.merge(piece.latencies for piece in slices)
    if len(slices) < _MIN_SLICES or not whole.count:
        return Intervals()
    counts = np.zeros((len(slices), whole.bins.size), np.float32)  # float32 counts exactly up to 16 million
    for row, piece in enumerate(slices):
        counts[row, np.searchsorted(whole.bins, piece.latencies.bins)] = piece.latencies.counts
    weights = block_weights(len(slices), _RESAMPLES, seed)
    parts = [_resampled(part, counts, values_of(whole.bins)) for part in np.array_split(weights, _CHUNKS)]
    requests, quantiles = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
    seconds = weights @ np.array([piece.length_ns / 1e9 for piece in slices])
    totals = weights @ np.array([float(piece.latencies.total_ns) for piece in slices])
    kept = requests > 0
    return Intervals(
        throughput_per_s=_interval(requests * batch_size / seconds),
        mean_ns=_interval(totals[kept] / requests[kept]),
        **{percentile.field: _interval(quantiles[kept, number]) for number, percentile in enumerate(_BOOTSTRAPPED)},
    )


def details_of(slices: list[Slice], *, seed: int = 0) -> dict[str, Detail]:
    """Return the numbers of sequences and of single responses in measured slices. See `LoadPoint.details`."""
    seconds = sum(piece.length_ns for piece in slices) / 1e9
    found = {}
    for name in dict.fromkeys(name for piece in slices for name in piece.details):
        parts = [dataclasses.replace(piece, latencies=piece.details.get(name, Histogram.empty())) for piece in slices]
        whole = Histogram.merge(piece.latencies for piece in parts)
        intervals = intervals_of(parts, batch_size=1, seed=seed)
        found[name] = Detail(whole.count, whole.count / seconds, Latency.of(whole), intervals, whole.to_json())
    return found


def _resampled(
    weights: Floats, counts: npt.NDArray[np.float32], values: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return each resample's requests `[R]` and percentiles `[R, P]`. In chunks, because `[R, bins]` is large."""
    cumulative = np.cumsum(weights.astype(np.float32) @ counts, axis=1, dtype=np.float64)
    requests = cumulative[:, -1]
    quantiles = np.empty((len(weights), len(_QUANTILES)))
    for row, ranks in enumerate(np.maximum(np.ceil(np.outer(requests, _QUANTILES) - 1e-6), 1)):
        places = np.searchsorted(cumulative[row], ranks)
        quantiles[row] = values[np.minimum(places, values.size - 1)]
    return requests, quantiles


def _grouped(slices: list[Slice]) -> list[Slice]:
    """Merge neighbours until at most 120 are left: more would only cost memory."""
    size = -(-len(slices) // _GROUPS)
    if size <= 1:
        return slices
    merged = []
    for start in range(0, len(slices) - size + 1, size):
        part = slices[start : start + size]
        whole = Slice.merge(part)
        merged.append(Slice(whole.index, sum(piece.length_ns for piece in part), whole.latencies, whole.errors))
    return merged


def _interval(values: Floats) -> Interval:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high))
