"""One worker's part of a load level, as the parent sends it."""

from __future__ import annotations

import dataclasses

from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.worker.schedule import Schedule

__all__ = ["Job"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One worker's part of one load level.

    Attributes:
        protocol: `grpc` or `http`.
        endpoint: the server and the prebuilt requests.
        slots: closed loop: requests kept in flight. Open loop: connections opened beforehand over HTTP.
        connections: gRPC connections (HTTP opens one a slot).
        schedule: open loop: the whole schedule; `None` for a closed loop.
        worker: this worker's number, from 0.
        workers: how many workers share the schedule.
        slice_ns: length of a recorded slice of time.
        max_in_flight: open loop: requests that may be open at once; what is due beyond that waits, and its
            waiting counts as latency.
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
