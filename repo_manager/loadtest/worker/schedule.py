"""Arrival schedules: pure, seeded generators of an open loop's sending times.

A schedule yields chunks of offsets from the start of the load, int64 nanoseconds `[N]`, never descending.
The same arguments always give the same moments, so several workers can each take every n-th arrival of one
schedule, and two runs can be compared arrival by arrival.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from repo_manager.errors import InputError, UsageError
from repo_manager.files import reason_of
from repo_manager.loadtest.wire.connection import Endpoint

__all__ = ["ARRIVALS", "Job", "Schedule", "load_replay"]


ARRIVALS = ("constant", "poisson", "burst", "ramp", "replay")
_CHUNK = 4096
_NS = 1_000_000_000
_LONGEST_REPLAY_S = 31_536_000

Offsets = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When requests are sent, whatever the server does.

    Attributes:
        arrival: `constant` (evenly spaced), `poisson` (independent arrivals, exponential gaps), `burst`
            (`burst_size` at once, bursts evenly spaced), `ramp` (the rate rises linearly from `ramp_from_per_s` to
            `rate_per_s` over `ramp_s`, then stays), `replay` (recorded moments).
        rate_per_s: mean rate in requests a second. The final one of a ramp. Ignored by `replay`.
        seed: of the random gaps of `poisson`. Equal seeds give equal moments.
        burst_size: `burst`: requests due at the same moment, 1 or more.
        ramp_from_per_s: rate at the start of a ramp.
        ramp_s: length of a ramp in seconds.
        offsets_ns: the recorded moments of `replay`, ascending, from 0.
    """

    arrival: str
    rate_per_s: float = 0.0
    seed: int = 0
    burst_size: int = 1
    ramp_from_per_s: float = 0.0
    ramp_s: float = 0.0
    offsets_ns: tuple[int, ...] = dataclasses.field(default=(), metadata={"json": False})

    def __post_init__(self) -> None:
        if self.arrival not in ARRIVALS:
            raise UsageError(f"arrival {self.arrival!r} is not one of {', '.join(ARRIVALS)}")
        if self.arrival == "replay" and not self.offsets_ns:
            raise UsageError("a replay schedule has no recorded moments", hint="Give a JSON or CSV file of timestamps.")
        if self.arrival != "replay" and not 0 < self.rate_per_s < float("inf"):
            raise UsageError(f"the rate is {self.rate_per_s:g} requests/s, expected more than 0")
        if self.arrival == "burst" and self.burst_size < 1:
            raise UsageError(f"the burst size is {self.burst_size}, expected at least 1")
        if self.arrival == "ramp" and (self.ramp_s <= 0 or self.ramp_from_per_s < 0):
            raise UsageError(
                f"a ramp from {self.ramp_from_per_s:g}/s over {self.ramp_s:g} s; "
                "expected a length above 0 s and a start of 0/s or more"
            )

    def chunks(self) -> Iterator[Offsets]:
        """Yield the moments in chunks. Endless except for `replay`."""
        if self.arrival == "replay":
            offsets = np.asarray(self.offsets_ns, np.int64)
            for start in range(0, offsets.size, _CHUNK):
                yield offsets[start : start + _CHUNK]
            return
        rng = np.random.default_rng(self.seed)
        last_ns, first = 0.0, 0
        while True:
            numbers = np.arange(first, first + _CHUNK, dtype=np.float64)
            first += _CHUNK
            if self.arrival == "poisson":
                moments = last_ns + np.cumsum(rng.exponential(_NS / self.rate_per_s, _CHUNK))
                last_ns = float(moments[-1])
                yield moments.astype(np.int64)
            else:
                yield np.rint(self._even_s(numbers) * _NS).astype(np.int64)

    def _even_s(self, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the moment, in seconds, of each arrival number `[N]` of an evenly spaced schedule."""
        if self.arrival == "burst":
            bursts: npt.NDArray[np.float64] = np.floor(numbers / self.burst_size)
            return bursts * self.burst_size / self.rate_per_s
        if self.arrival == "constant":
            return numbers / self.rate_per_s
        # A ramp: arrivals up to t are a*t + (b-a)*t²/(2T). Solve for t. After the ramp, the rate is b.
        start, end, length = self.ramp_from_per_s, self.rate_per_s, self.ramp_s
        in_ramp = (start + end) / 2 * length
        half_slope = (end - start) / (2 * length)
        inside = np.minimum(numbers, in_ramp)
        if half_slope == 0:
            rising = inside / start
        else:
            root = np.sqrt(np.maximum(start * start + 4 * half_slope * inside, 0))
            rising = 2 * inside / np.maximum(start + root, 1e-12)
        moments: npt.NDArray[np.float64] = np.where(numbers <= in_ramp, rising, length + (numbers - in_ramp) / end)
        return moments

    def share(self, worker: int, workers: int) -> Iterator[Offsets]:
        """Yield every `workers`-th arrival, starting with number `worker`: one worker's part of the schedule."""
        seen = 0
        for chunk in self.chunks():
            yield chunk[(worker - seen) % workers :: workers]
            seen += chunk.size


def load_replay(path: Path) -> tuple[int, ...]:
    """Read recorded moments, in seconds, from a JSON array or a CSV file's first (or `timestamp_s`) column.

    JSON may also be an object with `timestamps_s` or `timestamps_ns`. The first moment becomes 0.

    Returns:
        Offsets in nanoseconds, ascending.

    Raises:
        InputError: unreadable, empty, or not numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
        seconds = _json_moments(text) if path.suffix.lower() == ".json" else _csv_moments(text)
    except (OSError, ValueError, TypeError, IndexError, OverflowError, RecursionError, csv.Error) as exc:
        raise InputError(
            f"{path}: no timestamps could be read: {reason_of(exc)}",
            hint="Expected a JSON array of seconds, {'timestamps_s': [...]}, or a CSV file with a moment in a row.",
        ) from exc
    moments = np.sort(np.asarray(seconds, np.float64))
    if not moments.size or not np.isfinite(moments).all():
        raise InputError(f"{path}: {moments.size} timestamps, expected at least one finite number")
    length_s = float(moments[-1]) - float(moments[0])
    if length_s > _LONGEST_REPLAY_S:
        raise InputError(
            f"{path}: the first and the last timestamp are {length_s:.3g} s apart, "
            f"expected {_LONGEST_REPLAY_S} s (a year) at most",
            hint="Timestamps are seconds. A JSON file may hold nanoseconds: {'timestamps_ns': [...]}.",
        )
    offsets: list[int] = np.rint((moments - moments[0]) * _NS).astype(np.int64).tolist()
    return tuple(offsets)


def _json_moments(text: str) -> list[float]:
    data = json.loads(text)
    if isinstance(data, dict) and "timestamps_ns" in data:
        return [float(value) / _NS for value in data["timestamps_ns"]]
    if isinstance(data, dict):
        data = data.get("timestamps_s", data.get("timestamps"))
    if not isinstance(data, list):
        raise ValueError("found no array of timestamps")
    return [float(value) for value in data]


def _csv_moments(text: str) -> list[float]:
    rows = [row for row in csv.reader(text.splitlines()) if row and row[0].strip()]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    column, scale = 0, 1.0
    for name, unit in (("timestamp_s", 1.0), ("timestamp", 1.0), ("timestamp_ns", 1.0 / _NS)):
        if name in header:
            column, scale = header.index(name), unit
    try:
        float(rows[0][column])
    except ValueError:
        rows = rows[1:]
    return [float(row[column]) * scale for row in rows]


# One worker's part of a load level, sent by the parent.


@dataclasses.dataclass(frozen=True)
class Job:
    """One worker's part of one load level.

    Attributes:
        protocol: `grpc` or `http`: the kind of connections to open.
        endpoint: the server and the prebuilt requests.
        slots: closed loop: requests kept in flight. Open loop: connections opened in advance over HTTP.
        connections: gRPC connections (HTTP opens one a slot).
        schedule: open loop: the whole schedule. `None` for a closed loop.
        worker: this worker's number, from 0.
        workers: how many workers share the schedule.
        slice_ns: length of a recorded slice of time.
        max_in_flight: open loop: most requests open at once. Further due ones wait, and their waiting counts as
            latency.
        sequences: live sequences of this worker. 0 where requests belong to none.
        seed: of the worker's first sequence ID. Taken from the clock, new for each level.
    """

    protocol: str
    endpoint: Endpoint
    slots: int
    connections: int
    schedule: Schedule | None
    worker: int
    workers: int
    slice_ns: int
    max_in_flight: int
    sequences: int = 0
    seed: int = 0
