"""Triton's metrics page: where it is, and the few numbers a roll-out needs from it."""

from __future__ import annotations

import re

from repo_manager.errors import RepoManagerError
from repo_manager.server.http_wire import fetch_text
from repo_manager.server.records import local_server
from repo_manager.server.transport import ServerUrl

__all__ = ["free_gpu_bytes", "metrics_text", "metrics_url_of"]

_DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
_METRICS_PORT = 8002
_GPU_MEMORY = re.compile(
    r'^nv_gpu_memory_(?P<kind>total|used)_bytes\{[^}]*gpu_uuid="(?P<uuid>[^"]+)"[^}]*\} (?P<value>\S+)', re.MULTILINE
)


def metrics_url_of(url: str) -> str | None:
    """Return where a server's metrics are: of ours as recorded, else by Triton's default ports. `None`: not known."""
    server = local_server(url)
    if server is not None:
        return server.metrics_url
    endpoint = ServerUrl.parse(url)
    if endpoint.tls or endpoint.path or endpoint.host_and_port[1] != _DEFAULT_PORTS[endpoint.protocol]:
        return None
    return f"http://{endpoint.address.rpartition(':')[0]}:{_METRICS_PORT}/metrics"


def metrics_text(url: str, *, timeout_s: float = 1.0) -> str | None:
    """Return a metrics page's text, or `None` when it cannot be had: nothing depends on it."""
    try:
        return fetch_text(url, timeout_s=timeout_s)
    except RepoManagerError:
        return None


def free_gpu_bytes(text: str) -> int | None:
    """Return the free memory of the fullest GPU, in bytes, or `None` when the page tells of no GPU."""
    values = {(match["uuid"], match["kind"]): float(match["value"]) for match in _GPU_MEMORY.finditer(text)}
    free = [
        total - values[uuid, "used"]
        for (uuid, kind), total in values.items()
        if kind == "total" and (uuid, "used") in values
    ]
    return int(min(free)) if free else None
