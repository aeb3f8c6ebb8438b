"""Records of running servers, so that one command finds the server that another one started."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import write_atomic
from repo_manager.repository import Location, parse_location
from repo_manager.server.paths import record_directory
from repo_manager.server.process import is_running, start_ticks
from repo_manager.types import as_json

__all__ = ["RunningServer", "remove_record", "running_server", "running_servers", "write_record"]


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server of ours that runs now.

    Attributes:
        repository: the repository's real path, or its URL.
        pid: the tritonserver's process id.
        start_ticks: its start time in clock ticks since boot.
        http_url: `http://host:port`.
        grpc_url: `grpc://host:port`.
        metrics_url: `http://host:port/metrics`.
        log: its log.
        restarts: how often `serve` has started it again because it had ended by itself.
    """

    repository: Location
    pid: int
    start_ticks: int
    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    restarts: int = 0

    @property
    def control_url(self) -> str:
        """Where commands on this machine reach it: gRPC, or HTTP where gRPC asks for certificates."""
        return self.http_url if self.grpc_url.startswith("grpcs:") else self.grpc_url

    @property
    def started_at(self) -> float:
        """When it started, in seconds since the epoch."""
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + self.start_ticks / os.sysconf("SC_CLK_TCK")


def _prefix(repository: Location) -> str:
    return hashlib.sha256(str(repository.resolve()).encode()).hexdigest()[:16]


def write_record(server: RunningServer) -> Path:
    """Write a server's record into the user's cache; return its path."""
    path = record_directory() / f"{_prefix(server.repository)}-{server.pid}.json"
    fields = as_json(server)
    write_atomic(path, json.dumps(fields, indent=2).encode())
    return path


def remove_record(path: Path) -> None:
    """Remove a record; one that is gone already does not matter."""
    with contextlib.suppress(OSError):
        path.unlink()


def running_server(repository: Location) -> RunningServer | None:
    """Return the server of ours that serves `repository` on this machine, the newest when there are several.

    A record whose process has ended, or whose process id now belongs to another process, is
    removed and does not count. Whether the server answers is for its client to find out.
    """
    found = [server for server in running_servers() if server.repository == repository.resolve()]
    return max(found, key=lambda server: server.start_ticks, default=None)


def running_servers() -> tuple[RunningServer, ...]:
    """Return every server of ours that runs on this machine, of this user, oldest first."""
    found = []
    for path in sorted(record_directory().glob("*.json")):
        server = _read(path)
        if server is None or not is_running(server.pid, server.start_ticks):
            remove_record(path)
        else:
            found.append(server)
    return tuple(sorted(found, key=lambda server: server.start_ticks))


def _read(path: Path) -> RunningServer | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return RunningServer(
            **{**fields, "repository": parse_location(fields["repository"]), "log": Path(fields["log"])},
        )
    except (OSError, ValueError, TypeError, KeyError, RepositoryError):
        return None


def record_of(
    repository: Location, pid: int, urls: tuple[str, str, str], log: Path, *, restarts: int = 0
) -> RunningServer | None:
    """Describe a server that was just started; `None` when it has ended meanwhile.

    Args:
        repository: its repository.
        pid: the tritonserver's process id.
        urls: HTTP, gRPC and metrics.
        log: its log.
        restarts: how often it was started again.
    """
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    return RunningServer(repository.resolve(), pid, ticks, *urls, log, restarts)
