"""What a measured level's numbers say: whether it is stable, what the server did, how the client fared."""

from __future__ import annotations

from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import ClientUse, ServerTimes, Window
from repo_manager.loadtest.target import ModelStatistics
from repo_manager.loadtest.worker.recorder import Slice

__all__ = ["agreement", "client_use", "outcome_of", "server_times", "spread_of"]

_BUSY_SHARE = 0.9
_STARVED_SHARE = 0.25
_LATE_SHARE = 0.01


def agreement(windows: list[Window], stability: float) -> tuple[bool, str]:
    """Apply the rule to windows; return whether they agree, and the rule with its numbers.

    Args:
        windows: the last ones, in order of time.
        stability: the allowed share.
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
    """Return a level's outcome and the rule that decided it, from its last windows and all it measured."""
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


def server_times(before: ModelStatistics, after: ModelStatistics) -> ServerTimes:
    """Return what happened between two readings of the server's counters; never negative, also after a reset."""
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
    )


def client_use(whole: Slice, seconds: float, workers: int, *, is_open: bool) -> ClientUse:
    """Judge the client itself: it is the bottleneck when its CPUs were not enough or its sends came late."""
    if not seconds:
        return ClientUse("native", workers)
    ended = whole.latencies.count + whole.errors
    cpu_share = whole.cpu_ns / 1e9 / seconds / workers
    waiting = whole.run_queue_ns / 1e9 / seconds / workers
    late = whole.late / whole.sent if is_open and whole.sent else None
    notes = []
    if cpu_share > _BUSY_SHARE:
        notes.append(f"its workers used {cpu_share:.0%} of a CPU each: add workers")
    if late is not None and late > _LATE_SHARE:
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
