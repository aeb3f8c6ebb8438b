"""A model-control and inference client for one Triton server, the same over gRPC and HTTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.optional import deferred
from repo_manager.server.answers import refusal
from repo_manager.server.process import POLL_FAILED, log_end, poll_failure
from repo_manager.server.records import local_server, with_key
from repo_manager.server.transport import (
    ClientOptions,
    Config,
    CudaHandle,
    IndexEntry,
    MemoryKind,
    ModelMetadata,
    RequestOptions,
    ServerMetadata,
    ServerUrl,
    StreamRequest,
    Transport,
    VersionStatistics,
)

if TYPE_CHECKING:
    import numpy as np

    from repo_manager.server import transport_grpc, transport_http
else:  # a client needs only one of them
    transport_grpc = deferred("repo_manager.server.transport_grpc")
    transport_http = deferred("repo_manager.server.transport_http")

__all__ = ["TritonClient"]

_POLL_S = 0.02
_MOST_LOOKS = 5
_PLAIN = RequestOptions()


class TritonClient:
    """Talks to one Triton server. Every call has a deadline.

    Every call raises ServerUnreachableError when no answer came within its deadline, and
    ServerRefusedError with Triton's own reason when the server answered with an error.

    Args:
        endpoint: address, path, headers and messages of the requests.
        transport: the implementation of the protocol.
        options: TLS, headers and deadlines of clients.
    """

    def __init__(self, endpoint: ServerUrl, transport: Transport, options: ClientOptions) -> None:
        self.endpoint = endpoint
        self._limit: Callable[[float], float] = _own_deadline
        self._transport = transport
        self._options = options

    @classmethod
    def connect(cls, url: str, options: ClientOptions | None = None) -> TritonClient:
        """Make a client. Nothing is sent yet.

        Args:
            url: `grpc://host:port`, `grpcs://...`, `http://...` or `https://...`.
            options: `None` takes the defaults. The key of an embedded server of this user on this machine is added.

        Raises:
            UsageError: the URL is not understood or a certificate cannot be read.
        """
        options = with_key(url, ClientOptions() if options is None else options)
        endpoint = ServerUrl.parse(url)
        kind = transport_grpc.GrpcTransport if endpoint.protocol == "grpc" else transport_http.HttpTransport
        return cls(endpoint, kind(endpoint, options), options)

    def another(self) -> TritonClient:
        """Make one more client of the same server, connected the same way. Nothing is sent yet."""
        return TritonClient.connect(self.url, self._options)

    @property
    def url(self) -> str:
        """The server's URL."""
        return str(self.endpoint)

    @contextlib.contextmanager
    def within(self, limit: Callable[[float], float]) -> Iterator[TritonClient]:
        """Hold all calls together to one deadline.

        Args:
            limit: given how many seconds a call may take on its own, returns how many it gets. Raises ServerError when
                none is left.
        """
        previous, self._limit = self._limit, limit
        try:
            yield self
        finally:
            self._limit = previous

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def live(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the server answers it is alive.

        Args:
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.live(self._deadline(timeout_s))

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the server answers it is ready.

        Args:
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.ready(self._deadline(timeout_s))

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server is ready (it is not, for Triton, while any model's last load has failed).

        Raises:
            ServerUnreachableError: it was not within `timeout_s`. With the last reason.
        """
        self._wait(self._transport.ready, "ready", timeout_s)

    def wait_live(self, timeout_s: float) -> None:
        """Wait until the server is alive, whatever the state of its models.

        Raises:
            ServerUnreachableError: it was not within `timeout_s`. With the last reason.
        """
        self._wait(self._transport.live, "live", timeout_s)

    def _wait(self, ask: Callable[[float], bool], state: str, timeout_s: float) -> None:
        timeout_s = self._limit(timeout_s)
        deadline = time.monotonic() + timeout_s
        reason = f"it answers, but is not {state}"
        while True:
            try:
                if ask(max(0.1, min(2.0, deadline - time.monotonic()))):
                    return
            except (ServerUnreachableError, ServerRefusedError) as exc:
                reason = exc.message
            if time.monotonic() >= deadline:
                raise ServerUnreachableError(f"{self.url} was not {state} within {timeout_s:g} s: {reason}")
            time.sleep(_POLL_S)

    def metadata(self, *, timeout_s: float | None = None) -> ServerMetadata:
        """Return the server's name, version and extensions.

        Args:
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.metadata(self._deadline(timeout_s))

    def repository_index(self, *, timeout_s: float | None = None) -> tuple[IndexEntry, ...]:
        """Return the server's entry for every model in its repository.

        Triton lists the root and then looks at each entry (`RepositoryIndex` of triton-inference-server/core), and
        fails when one is gone by then: a temporary file, or a model just removed. It is asked again then.

        Args:
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        timeout_s = self._deadline(timeout_s)
        end = time.monotonic() + timeout_s
        for _ in range(_MOST_LOOKS - 1):
            try:
                return self._transport.index(timeout_s)
            except ServerRefusedError as exc:
                timeout_s = end - time.monotonic()
                if "failed to stat file" not in exc.message or timeout_s <= 0:
                    raise
        return self._transport.index(timeout_s)

    def versions(self, name: str, *, timeout_s: float | None = None) -> dict[int, IndexEntry]:
        """Return the index's versions of one model (except for those never loaded).

        Args:
            name: name of the model as the index has it. Any other gives an empty result.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        entries = (entry for entry in self.repository_index(timeout_s=timeout_s) if entry.name == name)
        return {entry.version: entry for entry in entries if entry.version is not None}

    def load(
        self,
        name: str,
        config: str | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Load or reload a model. Returns when its versions are ready (or when there was nothing to do).

        Args:
            name: name of the model's folder in the repository. With `files` it need not be there.
            config: configuration in JSON, in place of the repository's until the model is unloaded. `None`: use the
                repository's.
            files: path in the model's folder -> content, with `config`: a model of no repository. `None`: no files.
            timeout_s: `None` takes the options' `load_timeout_s`.

        Raises:
            ServerRefusedError: it does not load. Where Triton only says it "failed to poll", and the server is an
                embedded one of this machine, the reason in its log is quoted.
        """
        try:
            self._transport.load(name, config, files or {}, self._load_deadline(timeout_s))
        except ServerRefusedError as exc:
            server = local_server(self.url) if POLL_FAILED in exc.reason else None
            found = None if server is None else poll_failure(log_end(server.log), name)
            if found is None:
                raise
            raise refusal(self.endpoint, f"load {name}", f"{exc.reason}: {found}") from exc

    def unload(self, name: str, *, dependents: bool = False, timeout_s: float | None = None) -> None:
        """Unload a model. Triton answers before in-flight requests have ended (core, `ModelLifeCycle::AsyncUnload`).

        Args:
            name: name of the model. All its loaded versions are unloaded.
            dependents: also unload the models of an ensemble.
            timeout_s: deadline of the call in seconds. `None`: the load deadline of the client's options.
        """
        self._transport.unload(name, dependents, self._load_deadline(timeout_s))

    def statistics(
        self, name: str = "", version: int | None = None, *, timeout_s: float | None = None
    ) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions of a model (all models when `name` is empty).

        Args:
            name: name of one loaded model. Empty takes all of them.
            version: version of the model. `None`: all that are loaded.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.statistics(name, _text(version), self._deadline(timeout_s))

    def model_config(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> Config:
        """Return the config the server runs a model with, as a `ModelConfig` protobuf message.

        Args:
            name: name of a loaded model. Triton refuses any other.
            version: version of the model. `None`: the newest, or the server's choice.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.model_config(name, _text(version), self._deadline(timeout_s))

    def model_metadata(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> ModelMetadata:
        """Return the inputs, outputs and served versions of a model.

        Args:
            name: name of a loaded model. Triton refuses any other.
            version: version of the model. `None`: the newest, or the server's choice.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.model_metadata(name, _text(version), self._deadline(timeout_s))

    def register_memory(
        self, name: str, key: str | CudaHandle, size_bytes: int, *, timeout_s: float | None = None
    ) -> None:
        """Let the server map memory as region `name`. The server must be on this machine.

        Args:
            name: new name for the region, later given to `unregister_memory`.
            key: of POSIX shared memory, or a handle of memory on a GPU the server uses, too.
            size_bytes: size of the memory in bytes.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        self._transport.register_memory(name, key, size_bytes, self._deadline(timeout_s))

    def unregister_memory(self, name: str, kind: MemoryKind = "system", *, timeout_s: float | None = None) -> None:
        """Let the server forget a region of shared memory.

        Args:
            name: name the region was registered with.
            kind: the kind of shared memory.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        self._transport.unregister_memory(name, kind, self._deadline(timeout_s))

    def registered_memory(self, kind: MemoryKind = "system", *, timeout_s: float | None = None) -> tuple[str, ...]:
        """Return the names of the regions of shared memory the server maps.

        Args:
            kind: the kind of shared memory.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.registered_memory(kind, self._deadline(timeout_s))

    def model_ready(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> bool:
        """Return whether a version (`None`: the newest served one) is ready. A killed stub still counts as ready.

        Args:
            name: name of the model asked about, loaded or not.
            version: version of the model. `None`: the newest, or the server's choice.
            timeout_s: deadline of the call in seconds. `None`: the one of the client's options.
        """
        return self._transport.model_ready(name, _text(version), self._deadline(timeout_s))

    def infer(
        self,
        name: str,
        version: int | None,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        outputs: Sequence[str] | None = None,
        options: RequestOptions = _PLAIN,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one inference.

        Args:
            name: name of a loaded model or ensemble.
            version: `None` leaves the choice to the server.
            inputs: name -> array, batch axis included.
            outputs: the outputs wanted. `None` for all.
            options: the sequence the request belongs to, and custom parameters.
            timeout_s: `None` takes the options' `timeout_s`.

        Returns:
            Output name -> array. Strings as `object` arrays of bytes, bfloat16 as float32.
        """
        return self._transport.infer(name, _text(version), inputs, outputs, options, self._deadline(timeout_s))

    def stream(
        self,
        name: str,
        version: int | None,
        requests: Iterable[StreamRequest],
        *,
        timeout_s: float | None = None,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Send requests on one stream, one after another, as decoupled models need it. gRPC only.

        The next request is taken from `requests`, and sent, after the final response of the one before.

        Args:
            name: name of a loaded model. It gets all `requests`.
            version: `None` leaves the choice to the server.
            requests: of each the inputs, name -> array with the batch axis, and its options: the sequence it belongs
                to, and custom parameters.
            timeout_s: of each request until its final response. `None` takes the options' `timeout_s`.

        Yields:
            One response each: output name -> array, as `infer` returns it.

        Raises:
            UsageError: the connection is HTTP.
        """
        return self._transport.stream(name, _text(version), requests, self._deadline(timeout_s))

    def _deadline(self, timeout_s: float | None) -> float:
        return self._limit(self._options.timeout_s if timeout_s is None else timeout_s)

    def _load_deadline(self, timeout_s: float | None) -> float:
        return self._limit(self._options.load_timeout_s if timeout_s is None else timeout_s)


def _own_deadline(timeout_s: float) -> float:
    """Leave a call the time it has on its own."""
    return timeout_s


def _text(version: int | None) -> str:
    return "" if version is None else str(version)
