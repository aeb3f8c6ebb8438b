"""The embedded Triton server: a real tritonserver on a repository, for as long as this object lives."""

from __future__ import annotations

import dataclasses
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from repo_manager.errors import RepositoryError, ServerError, ServerRefusedError, ServerUnreachableError
from repo_manager.optional import deferred
from repo_manager.repository.location import parse_location
from repo_manager.server.backend_directory import BackendDirectory, assemble
from repo_manager.server.client import TritonClient
from repo_manager.server.command import (
    ServerOptions,
    check_port_is_free,
    command_of,
    environment_of,
    free_ports,
    listens_on,
    restrictions_of,
    takes_connections,
)
from repo_manager.server.installation import TritonInstallation, find_triton
from repo_manager.server.paths import log_directory
from repo_manager.server.process import ServerProcess, reason_in_log, shared_memory_prefix, sweep_shared_memory
from repo_manager.server.records import forget_key, record_of, remember_key, remove_record, write_record
from repo_manager.server.transport import ClientOptions

if TYPE_CHECKING:
    from concurrent import futures
else:
    futures = deferred("concurrent.futures")  # imported during the server's start

__all__ = ["EmbeddedServer", "ServerOptions"]

_ATTEMPTS = 5
_PROBE_S = 2.0
_POLL_S = 0.002
_KEPT_LOGS = 20
ALL_MODELS = "*"


class EmbeddedServer:
    """A real tritonserver in explicit model-control mode.

    Use it as a context manager (started, ready, stopped), or call `start`, `wait_ready` and `stop`.
    However this process ends, the server, its stubs, its shared memory and its ports go with it.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.failures: dict[str, str] = dict(options.refused)
        self.restarts = 0
        self._id = f"repo-manager-{secrets.token_hex(6)}"
        self._ports = (0, 0, 0)
        self._process: ServerProcess | None = None
        self._record: Path | None = None
        self._log = options.log_path
        restricted = any("restricted" in argument for argument in options.extra_args)
        self._security = options.security if restricted else options.security.with_key()

    def __enter__(self) -> EmbeddedServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop(deadline_s=2.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        """`http://host:port`."""
        return f"http://{_reachable(self.options.http_host)}:{self._ports[0]}"

    @property
    def grpc_url(self) -> str:
        """`grpc://host:port`, with TLS `grpcs://host:port`."""
        scheme = "grpcs" if self.options.security.tls else "grpc"
        return f"{scheme}://{_reachable(self.options.host)}:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """`http://host:port/metrics`."""
        return f"http://{_reachable(self.options.http_host)}:{self._ports[2]}/metrics"

    @property
    def pid(self) -> int:
        """The tritonserver's process id."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """The log's file."""
        return self._running().log

    @property
    def client_options(self) -> ClientOptions:
        """The header a client needs to load and unload. `TritonClient.connect` finds it on its own on this machine."""
        return ClientOptions(headers=self._security.headers)

    @property
    def shows_key(self) -> bool:
        """Whether other users of this machine can read the key, because the system forbids hiding it."""
        restricted = self._security.restricted
        return restricted is not None and self._running().shows(restricted[1])

    def is_alive(self) -> bool:
        """Return whether the tritonserver process runs."""
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the server's end. Return its exit code, or `None` after `timeout_s`."""
        return self._running().wait(timeout_s)

    def successor(self, options: ServerOptions | None = None) -> EmbeddedServer:
        """Return a server like this one, on the same ports and log, not started: for a restart after a crash.

        Args:
            options: repository, models, ports and other settings. `None` takes this one's.
        """
        http, grpc, metrics = self._ports
        options = dataclasses.replace(
            options or self.options, http_port=http, grpc_port=grpc, metrics_port=metrics, log_path=self._log
        )
        server = EmbeddedServer(options)
        server.restarts = self.restarts + 1
        return server

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of this run's log."""
        return "\n".join(self._running().read_log().splitlines()[-lines:])

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it listens. No model is loaded yet.

        A free port another process takes between choosing and binding costs another attempt.

        Raises:
            MissingDependencyError: there is no tritonserver on this machine.
            RepositoryError: the repository's path is no folder.
            ServerError: a given port is taken, or the server ended. With Triton's own reason.
        """
        if self._process is not None:
            raise ServerError("This embedded server was started before", hint="Make a new EmbeddedServer.")
        options = self.options
        if "://" not in options.repository and not Path(options.repository).is_dir():
            raise RepositoryError(
                f"The model repository {options.repository} is not a folder",
                hint="Create it, or publish a model into it with: repo-manager add",
            )
        triton = find_triton()
        backends = assemble(triton)
        sweep_shared_memory()
        given = (options.http_port, options.grpc_port, options.metrics_port)
        hosts = (options.http_host, options.host, options.http_host)
        for port, purpose, host in zip(given, ("HTTP", "gRPC", "metrics"), hosts, strict=True):
            if port:
                check_port_is_free(host, port, purpose)
        if self._log is None:
            self._log = _new_log()
        for attempt in range(_ATTEMPTS):
            free = free_ports(options.host, 3)
            self._ports = tuple(chosen or spare for chosen, spare in zip(given, free, strict=True))  # type: ignore[assignment]
            if self._listens(triton, backends, timeout_s):
                remember_key((self.http_url, self.grpc_url), self._security.headers)
                return
            reason = self._end_reason()
            self._process = None
            lost_a_race = "already in use" in reason and not any(f":{port}'" in reason for port in given if port)
            if not lost_a_race or attempt == _ATTEMPTS - 1:
                raise ServerError(f"tritonserver did not start: {reason}", hint=f"Its log: {self._log}")

    def _listens(self, triton: TritonInstallation, backends: BackendDirectory, timeout_s: float) -> bool:
        """Run one attempt. Return whether the server came up on the chosen ports."""
        assert self._log is not None
        prefix = shared_memory_prefix()
        command = command_of(self.options, self._ports, self._id, triton, backends.path, prefix)
        environment = environment_of(
            self.options.environment,
            triton,
            backends,
            remote=self.options.sealed is None and "://" in self.options.repository,
        )
        hidden = restrictions_of(self._security)
        self._process = ServerProcess.start(command, environment, self._log, prefix, hidden)
        deadline = time.monotonic() + timeout_s
        http, grpc, metrics = self._ports
        expected = (grpc, http) if "--allow-metrics=false" in self.options.extra_args else (grpc, http, metrics)
        host, last = _address(self.options.http_host), expected[-1]
        while self._process.poll() is None:
            # Another server may answer on a port that ours did not get. So it must answer with our server's name, and
            # our process must listen on all ports. Quick checks come first: Python's imports for one run during the
            # server's start. Triton binds gRPC, HTTP and metrics in this order (server, `StartEndpoints` of main.cc).
            if self._is_ours() and takes_connections(host, last) and listens_on(self._process.pid, expected):
                return True
            if time.monotonic() > deadline:
                tail = self.log_tail(10)
                self._process.stop(1.0)
                raise ServerUnreachableError(
                    f"tritonserver did not listen on {self.http_url} within {timeout_s:g} s; its log ends:\n{tail}"
                )
            time.sleep(_POLL_S)
        return False

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Load the models in `load` and wait until the server says it is ready.

        Raises:
            ServerRefusedError: a named model failed to load. With Triton's own reason. Not with `load_what_loads`.
            ServerUnreachableError: not ready within `timeout_s`.
            ServerError: the server ended. With Triton's own reason.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._load_models(deadline)
        except ServerUnreachableError as exc:
            self._raise_if_ended()
            raise ServerUnreachableError(f"tritonserver gave no answer: {exc.message}\n{self.log_tail(10)}") from exc
        while not self._says_ready():
            self._raise_if_ended()
            if time.monotonic() > deadline:
                raise ServerUnreachableError(f"tritonserver at {self.http_url} was not ready within {timeout_s:g} s")
            time.sleep(_POLL_S)
        if self.options.record:
            urls = (self.http_url, self.grpc_url, self.metrics_url)
            record = record_of(
                parse_location(self.options.repository),
                self.pid,
                urls,
                self.log_path,
                restarts=self.restarts,
                failures=self.failures,
                headers=self._security.headers,
                sealed=self.options.sealed,
            )
            self._record = None if record is None else write_record(record)

    def _load_models(self, deadline: float) -> None:
        names = self.options.load
        if not names:
            return
        everything = ALL_MODELS in names

        def load(name: str) -> tuple[str, str | None]:
            try:
                client.load(name, timeout_s=max(1.0, deadline - time.monotonic()))
            except ServerRefusedError as exc:
                return name, exc.reason
            return name, None

        with self._client() as client, futures.ThreadPoolExecutor(max_workers=4) as pool:
            if everything:
                index = client.repository_index(timeout_s=max(_PROBE_S, deadline - time.monotonic()))
                names = tuple(dict.fromkeys(entry.name for entry in index))
            self.failures |= {name: reason for name, reason in pool.map(load, names) if reason is not None}
        if self.failures and not everything and not self.options.load_what_loads:
            reasons = "\n".join(f"{name}: {reason}" for name, reason in self.failures.items())
            raise ServerRefusedError(f"tritonserver refused to load {reasons}", hint=f"Its log: {self._log}")

    def stop(self, *, deadline_s: float = 40.0) -> None:
        """Stop the server: in-flight requests end first, and after `deadline_s` it is killed.

        Nothing of it is left: no process, no port, no shared memory. Stopping twice is harmless.
        """
        if self._record is not None:
            remove_record(self._record)
            self._record = None
        forget_key((self.http_url, self.grpc_url))
        if self._process is not None:
            self._process.stop(deadline_s)

    def _client(self, *, secret: bool = True) -> TritonClient:
        """Return the function for a question to the server. Without the restriction's header until it is known to be
        ours."""
        return TritonClient.connect(self.http_url, self.client_options if secret else ClientOptions())

    def _is_ours(self) -> bool:
        """Return whether a server answers under the name this one was given."""
        try:
            with self._client(secret=False) as client:
                return client.metadata(timeout_s=_PROBE_S).name == self._id
        except ServerError:
            return False

    def _says_ready(self) -> bool:
        try:
            with self._client() as client:
                return client.ready(timeout_s=_PROBE_S)
        except ServerError:
            return False

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise ServerError("The embedded server is not started", hint="Call start() first.")
        return self._process

    def _end_reason(self) -> str:
        process = self._running()
        text = process.read_log()
        return reason_in_log(text) or f"exit code {process.poll()}, the log ends:\n{self.log_tail(10)}"

    def _raise_if_ended(self) -> None:
        if not self.is_alive():
            code = self._running().poll()
            raise ServerError(
                f"tritonserver ended with code {code}: {self._end_reason()}", hint=f"Its log: {self._log}"
            )


def _address(host: str) -> str:
    """Return this machine's address for a server bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _reachable(host: str) -> str:
    """Return the address in the form of URLs."""
    host = _address(host)
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _new_log() -> Path:
    """Name a new log and drop the oldest ones."""
    folder = log_directory()
    logs = sorted(folder.glob("tritonserver-*.log"))
    for old in logs[: max(0, len(logs) - _KEPT_LOGS + 1)]:
        old.unlink(missing_ok=True)
    return folder / f"tritonserver-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.log"
