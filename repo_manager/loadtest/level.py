"""One level of a load test on running workers: how it is shared out among them, and measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from repo_manager.errors import ServerError, UsageError
from repo_manager.loadtest.gpu import MetricsSource, is_local, open_nvml
from repo_manager.loadtest.measure import EarlyStop, Level, Measurement, slice_length_ns
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import ClientUse, LoadPoint, Progress
from repo_manager.loadtest.served_model import ServedModel
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.worker.pool import WorkerPool
from repo_manager.loadtest.worker.schedule import Job, Schedule, load_replay

__all__ = ["LevelInterrupted", "Report", "default_metrics_url", "jobs_of", "measure_level", "metrics_source"]

_SLOTS_FOR_TWO = 8

Report = Callable[[Progress], None]


class LevelInterrupted(KeyboardInterrupt):
    """Ctrl-C during a level. `point` is its row so far."""

    def __init__(self, point: LoadPoint) -> None:
        super().__init__()
        self.point = point


def measure_level(
    pool: WorkerPool,
    level: Level,
    endpoint: Endpoint,
    options: LoadTestOptions,
    sources: tuple[ServedModel, MetricsSource],
    *,
    progress: Report | None = None,
    early_stop: EarlyStop | None = None,
) -> LoadPoint:
    """Measure one level on running workers.

    If the server goes away in the middle, the row has the outcome `failed`.

    Args:
        pool: running load workers. Restarted when the server goes away, closed by other exceptions.
        level: the load: requests in flight, or a rate.
        endpoint: address, path, headers and messages of the requests.
        options: settings of the load test.
        sources: the served model, and the server's metrics page.
        progress: called about ten times a second, and with each finished row. `None`: nothing is reported.
        early_stop: decides after each slice whether the level can end. `None`: it runs to its end.
    """
    measurement: Measurement | None = None
    try:
        measurement = Measurement(level, options, *sources, progress, early_stop)
        start_ns = pool.begin(jobs_of(level, endpoint, options, pool.size))
        measurement.start_unix_s = time.time() + (start_ns - time.monotonic_ns()) / 1e9
        for piece in pool.slices():
            measurement.take(piece, pool.size)
            if measurement.finished:
                pool.stop()
        return measurement.point()
    except ServerError as exc:
        pool.restart()
        return LoadPoint(
            level.mode,
            level.level,
            "failed",
            exc.message,
            options.batch_size,
            ClientUse("native", pool.size),
            level.arrival,
        )
    except KeyboardInterrupt as exc:
        pool.close()
        if measurement is None:
            raise
        measurement.stop()
        point = measurement.point()
        raise LevelInterrupted(dataclasses.replace(point, reason=f"interrupted; {point.reason}")) from exc
    except BaseException:
        pool.close()
        raise


def jobs_of(level: Level, endpoint: Endpoint, options: LoadTestOptions, workers: int) -> list[Job]:
    """Share a level among workers: requests in flight as evenly as they divide, or every n-th arrival.

    Args:
        level: the load: requests in flight, or a rate.
        endpoint: address, path, headers and messages of the requests.
        options: settings of the load test.
        workers: how many processes share the level. As many jobs are returned.
    """
    is_closed = level.mode == "concurrency"
    sequences = 0 if endpoint.sequences is None else int(level.level) if is_closed else options.sequences
    schedule = None if is_closed else schedule_of(level, options)
    seed = time.monotonic_ns()
    total = int(level.level) if is_closed else min(max(int(level.level * 0.02), 4), 64)
    slots = [
        total // workers + (number < total % workers) if is_closed else max(total // workers, 1)
        for number in range(workers)
    ]
    return [
        Job(
            protocol=options.wire,
            endpoint=endpoint,
            slots=slots[number],
            connections=options.connections or _connections(endpoint, slots[number], is_closed=is_closed),
            schedule=schedule,
            worker=number,
            workers=workers,
            slice_ns=slice_length_ns(options),
            max_in_flight=max(options.max_in_flight // workers, 1),
            sequences=sequences and max(sequences // workers + (number < sequences % workers), 1),
            seed=seed,
        )
        for number in range(workers)
    ]


def _connections(endpoint: Endpoint, slots: int, *, is_closed: bool) -> int:
    """Return how many gRPC connections a worker opens.

    A server handles a connection in one thread at a time. With many requests in flight, a second connection brings 14 %
    more of them. An open loop sends what is due in one write.
    """
    is_plain = endpoint.sequences is None and not endpoint.decoupled and not endpoint.keeps_streams
    return 2 if is_plain and is_closed and slots >= _SLOTS_FOR_TWO else 1


def schedule_of(level: Level, options: LoadTestOptions) -> Schedule:
    """Return the arrival schedule of an open-loop level."""
    if level.mode == "replay":
        if options.replay is None:
            raise UsageError("a replay level needs a file of recorded moments")
        return Schedule("replay", offsets_ns=load_replay(options.replay))
    return Schedule(
        options.arrival,
        level.level,
        seed=options.seed,
        burst_size=options.burst_size,
        ramp_from_per_s=options.ramp_from_per_s,
        ramp_s=options.warmup_s + (options.duration_s or options.max_windows * options.window_s),
    )


def metrics_source(options: LoadTestOptions) -> MetricsSource:
    """Return where the GPUs' numbers come from: Triton's metrics, and NVML when the server is on this machine."""
    host = options.address[0]
    nvml = open_nvml() if is_local(host) else f"{host} is not this machine, whose GPUs NVML could tell of"
    return MetricsSource(options.metrics_url or default_metrics_url(options), nvml)


def default_metrics_url(options: LoadTestOptions) -> str | None:
    """Return where Triton's metrics are by default: port 8002 of the same host. `None` behind a gateway's path."""
    if options.path:
        return None
    host = options.address[0]
    return f"http://{f'[{host}]' if ':' in host else host}:8002/metrics"
