"""Whether one server can take a version: its TensorRT, its GPU, its memory."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.engine.fit_check import PLAN_SUFFIXES, check_version_fit, fit_target_of
from repo_manager.errors import ServerError
from repo_manager.onnx_model.runtime import free_host_bytes
from repo_manager.optional import deferred
from repo_manager.repository.scan import ModelEntry
from repo_manager.repository.transfer import version_files
from repo_manager.rollout.checks import Check, CheckOutcome
from repo_manager.server.client import TritonClient
from repo_manager.server.guard import stubs_of
from repo_manager.server.records import local_server
from repo_manager.server.transport import ServerUrl
from repo_manager.triton_config.config import ModelConfig

if TYPE_CHECKING:
    from repo_manager.server import metrics_page
else:
    metrics_page = deferred("repo_manager.server.metrics_page")  # only needed for a GPU's memory

__all__ = ["Room", "check_server", "room_for"]


def check_server(
    entry: ModelEntry, version: int, new_bytes: int, client: TritonClient, *, timeout_s: float
) -> tuple[Check, ...]:
    """Check whether one server can take a version: its TensorRT, its GPU, its memory.

    Args:
        entry: the model and its versions, as `scan` lists them.
        version: the version to be served.
        new_bytes: size of the files to load. 0 skips the memory.
        client: connected client of the server.
        timeout_s: seconds the server may take to tell its version. It is asked for TensorRT engines alone.
    """
    config = entry.config()
    engines = _has_engine(entry, version, config)
    wants_gpu = engines or _wants_gpu(config)
    where = metrics_page.metrics_url_of(client.url) if wants_gpu else None
    metrics = None if where is None else metrics_page.metrics_text(where)
    checks = []
    if engines:
        checks.append(_engine(entry, version, client, metrics, timeout_s))
    if new_bytes:
        checks.append(_memory(room_for(entry.name, client.url, metrics, wants_gpu=wants_gpu), new_bytes))
    return tuple(checks)


def _has_engine(entry: ModelEntry, version: int, config: ModelConfig | None) -> bool:
    manifest = entry.version(version).manifest
    if manifest is not None:
        return any(name.endswith(PLAN_SUFFIXES) for name in manifest.files)
    return config is not None and config.backend in ("tensorrt", "tensorrt_rtx")


def _wants_gpu(config: ModelConfig | None) -> bool:
    if config is None:
        return False
    return any(group.kind == group.KIND_GPU for group in config.message().instance_group)


def _engine(entry: ModelEntry, version: int, client: TritonClient, metrics: str | None, timeout_s: float) -> Check:
    try:
        server_version = client.metadata(timeout_s=timeout_s).version
    except ServerError as exc:
        return Check("engine", CheckOutcome.UNKNOWN, f"the server does not tell its version: {exc.message}")
    target = fit_target_of(server_version, metrics, embedded=local_server(client.url) is not None)
    found = entry.version(version)
    names = None if found.manifest is None else [name for name in found.manifest.files if name.endswith(PLAN_SUFFIXES)]
    record = None if found.manifest is None else found.manifest.extra
    with version_files(found.path, names) as folder:
        problems = check_version_fit(folder, record, target)
    if not problems:
        return Check("engine", CheckOutcome.PASSED, "nothing known of the server speaks against its engine")
    blocking = [problem for problem in problems if problem.blocks]
    return Check(
        "engine",
        CheckOutcome.REFUSED if blocking else CheckOutcome.WARNING,
        "; ".join(problem.message for problem in blocking or problems),
        (blocking or problems)[0].hint,
    )


def _memory(room: Room | None, new_bytes: int) -> Check:
    if room is None:
        return Check("memory", CheckOutcome.UNKNOWN, "the server does not tell how much memory it has free")
    need = max(new_bytes, room.footprint_bytes or 0)
    basis = "its files" if need == new_bytes else "as much as the served version takes now"
    detail = f"it needs about {_mib(need)} ({basis}), {room.kind} has {_mib(room.free_bytes)} free"
    if need > room.free_bytes:
        return Check("memory", CheckOutcome.REFUSED, detail, "Drop another version or model first.", estimate=True)
    outcome = CheckOutcome.WARNING if 2 * need > room.free_bytes else CheckOutcome.PASSED
    return Check("memory", outcome, detail, estimate=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@dataclasses.dataclass(frozen=True)
class Room:
    """Free memory.

    Attributes:
        kind: the memory the check is about: `the GPU` or `the machine`.
        free_bytes: free memory of it, in bytes. Of several GPUs, the fullest one's.
        footprint_bytes: memory of the served version's processes. `None` when it cannot be seen.
    """

    kind: str
    free_bytes: int
    footprint_bytes: int | None = None


def room_for(model: str, url: str, metrics: str | None, *, wants_gpu: bool) -> Room | None:
    """Return the room for another version of a model, or `None` when nobody tells.

    Args:
        model: name of the model. In the host's memory, its processes give `footprint_bytes`.
        url: address of the server. The host's memory is known for a loopback address only.
        metrics: text of its metrics page. `None`: it was not read.
        wants_gpu: whether the model is in GPU memory, else in the host's. Only this machine's is known.
    """
    if wants_gpu:
        free = None if metrics is None else metrics_page.free_gpu_bytes(metrics)
        return None if free is None else Room("the GPU", free)
    if not is_here(url):
        return None
    free = free_host_bytes()
    return None if free is None else Room("the machine", free, _footprint(model, url))


def is_here(url: str) -> bool:
    """Return whether a server's URL is one of this machine's loopback."""
    host = ServerUrl.parse(url).address.rpartition(":")[0].strip("[]")
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
    """Return a process's private memory. 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024
