"""How much memory a server has left for another version."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import re
from pathlib import Path

from repo_manager.server import Endpoint
from repo_manager.server.guard import stubs_of
from repo_manager.server.metrics_page import free_gpu_bytes, local_server

__all__ = ["Room", "free_host_bytes", "room_for"]

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True)
class Room:
    """Free memory.

    Attributes:
        kind: `the GPU` or `the machine`.
        free_bytes: how much is free.
        footprint_bytes: what the served version's processes take in it; `None` when that cannot be seen.
    """

    kind: str
    free_bytes: int
    footprint_bytes: int | None = None


def room_for(model: str, url: str, metrics: str | None, *, wants_gpu: bool) -> Room | None:
    """Return the room for another version of a model; `None` when nobody tells.

    Args:
        model: its name.
        url: the server.
        metrics: its metrics page.
        wants_gpu: whether the model lies in GPU memory; else in the host's, which is known of this machine only.
    """
    if wants_gpu:
        free = None if metrics is None else free_gpu_bytes(metrics)
        return None if free is None else Room("the GPU", free)
    if not _is_here(url):
        return None
    free = free_host_bytes()
    return None if free is None else Room("the machine", free, _footprint(model, url))


def free_host_bytes() -> int | None:
    """Return what this machine, or the container that this process runs in, has free; `None` when it does not tell."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    free = None if match is None else int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" is no number, and no limit
        left = limit - int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        free = left if free is None else min(free, left)
    return free


def _is_here(url: str) -> bool:
    host = Endpoint.parse(url).address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _footprint(model: str, url: str) -> int | None:
    """Return the memory of the largest served version's processes, in bytes."""
    server = local_server(url)
    if server is None:
        return None
    by_version: dict[int, int] = {}
    for stub in stubs_of(server.pid):
        if stub.model == model:
            by_version[stub.version] = by_version.get(stub.version, 0) + _resident_bytes(stub.pid)
    return max(by_version.values(), default=None)


def _resident_bytes(pid: int) -> int:
    """Return what a process has in memory for itself alone; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024
