"""Records of running servers, so one command finds the server another one started."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from repo_manager.errors import LockHeldError, RepositoryError, ServerError
from repo_manager.files import file_lock, work_folder, write_atomic
from repo_manager.repository.layout import COPIES
from repo_manager.repository.location import Location, parse_location
from repo_manager.server.paths import kept_files, record_directory, sealed_directory
from repo_manager.server.process import is_running, start_ticks
from repo_manager.server.transport import ClientOptions
from repo_manager.types import as_json

__all__ = [
    "RunningServer",
    "forget_key",
    "is_served",
    "local_server",
    "only_server",
    "remember_key",
    "remove_record",
    "running_server",
    "running_servers",
    "sealed_folder",
    "served_already",
    "starting",
    "was_served_from",
    "with_key",
    "write_record",
]


_HERE = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A running server of ours.

    Attributes:
        repository: the repository's real path, or its URL.
        pid: the tritonserver's process id. Only with `start_ticks` it names the process for good.
        start_ticks: its start time in clock ticks since boot.
        http_url: `http://host:port`, never with TLS.
        grpc_url: `grpc://host:port`, or `grpcs://host:port` with TLS.
        metrics_url: page with Triton's metrics, `http://host:port/metrics`.
        log: file with its log: `ServerOptions.log_path`, or one in the user's cache.
        restarts: how often `serve` has started it again because it had ended on its own.
        owner: process id of its `serve`, or of its Python program. 0: written before this was recorded.
        failures: models not loaded at the start, with Triton's reason.
        headers: the key for loading and unloading. A record no other process can read holds it.
        sealed: folder with private copies of signed models. The server reads them. `None`: it reads the repository.
    """

    repository: Location
    pid: int
    start_ticks: int
    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    restarts: int = 0
    owner: int = 0
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False, metadata={"json": False})
    sealed: Path | None = dataclasses.field(default=None, repr=False, metadata={"json": False})

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


@contextlib.contextmanager
def sealed_folder(repository: Location) -> Iterator[Path]:
    """Give a private folder for copies of a repository's models, until the block ends."""
    with work_folder(f"{_prefix(repository)}-", sealed_directory()) as folder:
        yield folder


def was_served_from(repository: Location) -> re.Pattern[str]:
    """Return what the path of a served folder looks like: the repository, or private copies of its models."""
    own, copies = re.escape(str(repository.resolve())), re.escape(f"{sealed_directory()}/{_prefix(repository)}-")
    return re.compile(rf"{own}|{copies}\w+\.work/{COPIES}")


@contextlib.contextmanager
def only_server(repository: Location) -> Iterator[None]:
    """Be the one `serve` of a repository on this machine, of this user, until the block ends.

    Raises:
        ServerError: another one runs, or is about to. With where it listens.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(record_directory() / f"{_prefix(repository)}.serve.lock", timeout_s=0.0))
        except LockHeldError as exc:
            raise served_already(repository, running_server(repository)) from exc
        running = running_server(repository)
        if running is not None:
            raise served_already(repository, running)
        yield


def is_served(repository: Location) -> bool:
    """Return whether a `serve` of this user holds a repository. A server of a Python program holds none."""
    try:
        for lock in kept_files("servers", f"{_prefix(repository)}.serve.lock"):
            with file_lock(lock, timeout_s=0.0):
                pass
    except LockHeldError:
        return True
    return False


@contextlib.contextmanager
def starting(repository: Location, timeout_s: float) -> Iterator[None]:
    """Let one command after the other find out whether a repository has a server, and start one.

    Raises:
        RepositoryError: another command still starts a server after `timeout_s`.
    """
    with file_lock(record_directory() / f"{_prefix(repository)}.start.lock", timeout_s=timeout_s):
        yield


def served_already(repository: Location, running: RunningServer | None) -> ServerError:
    """Return the error for a second server on a repository.

    Args:
        repository: as the user named it.
        running: its server. `None`: one just starting.
    """
    where = "its server is just starting" if running is None else f"by pid {running.pid}, {running.control_url}"
    return ServerError(
        f"{repository} is already served: {where}",
        hint=f"Commands find the server by themselves. Stop it first: repo-manager serve --stop -r {repository}",
    )


def write_record(server: RunningServer) -> Path:
    """Write a server's record into the user's cache. Return its path."""
    path = record_directory() / f"{_prefix(server.repository)}-{server.pid}.json"
    fields = {**as_json(server), "headers": dict(server.headers), "sealed": str(server.sealed or "")}
    write_atomic(path, json.dumps(fields, indent=2).encode(), mode=0o600)
    return path


_KEYS: dict[str, Mapping[str, str]] = {}
"""Keys of the servers of this process, by URL: they are needed before there is a record, and where there is none."""


def remember_key(urls: Iterable[str], headers: Mapping[str, str]) -> None:
    """Let clients in this process find a server's key."""
    _KEYS.update(dict.fromkeys(urls, headers))


def forget_key(urls: Iterable[str]) -> None:
    """Send a key no more: another server may listen there next."""
    for url in urls:
        _KEYS.pop(url, None)


def local_server(url: str) -> RunningServer | None:
    """Return the embedded server of this machine a URL leads to, or `None` when it is another one."""
    url = url.replace("://localhost:", "://127.0.0.1:", 1)
    return next((server for server in running_servers() if url in (server.grpc_url, server.http_url)), None)


def with_key(url: str, options: ClientOptions) -> ClientOptions:
    """Return how to connect to a server: with its key where it is one of ours, of this user, on this machine.

    A given header of the same name stays. A record counts only while its process runs, so the key reaches no other
    server on the port.
    """
    headers = _KEYS.get(url)
    if headers is None and any(f"://{host}:" in url for host in _HERE):
        server = local_server(url)
        headers = None if server is None else server.headers
    return dataclasses.replace(options, headers={**headers, **options.headers}) if headers else options


def remove_record(path: Path) -> None:
    """Remove a record. A record gone already does not matter."""
    with contextlib.suppress(OSError):
        path.unlink()


def running_server(repository: Location) -> RunningServer | None:
    """Return our server of `repository` on this machine, the newest when there are several.

    A record whose process has ended, or whose process id now belongs to another process, is
    removed and does not count. Whether the server answers is for its client to find out.
    """
    found = [server for server in running_servers() if server.repository == repository.resolve()]
    return max(found, key=lambda server: server.start_ticks, default=None)


def running_servers() -> tuple[RunningServer, ...]:
    """Return all our servers running on this machine for this user, oldest first."""
    found = []
    for path in sorted(kept_files("servers", "*.json")):
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
            **{
                **fields,
                "repository": parse_location(fields["repository"]),
                "log": Path(fields["log"]),
                "sealed": Path(fields["sealed"]) if fields.get("sealed") else None,
            },
        )
    except (OSError, ValueError, TypeError, KeyError, RepositoryError):
        return None


def record_of(
    repository: Location,
    pid: int,
    urls: tuple[str, str, str],
    log: Path,
    *,
    restarts: int = 0,
    failures: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    sealed: Path | None = None,
) -> RunningServer | None:
    """Describe a freshly started server. `None` when it has ended by then.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        pid: the tritonserver's process id. Its start time is looked up here.
        urls: its URLs of HTTP, gRPC and metrics, in this order.
        log: path of the server's log.
        restarts: how often it was started again.
        failures: models not loaded, with the reason. `None`: all were.
        headers: its key. `None`: it needs none.
        sealed: folder with the copies that it reads. `None`: it reads the repository.
    """
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    return RunningServer(
        repository.resolve(),
        pid,
        ticks,
        *urls,
        log,
        restarts,
        os.getpid(),
        dict(failures or {}),
        dict(headers or {}),
        sealed,
    )
