"""The answers of both of Triton's protocols, in one form, and the way from a client to a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from repo_manager.errors import UsageError, keep_secret
from repo_manager.server.credentials import check_header
from repo_manager.tls import TlsFiles
from repo_manager.validation import check_fields

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ANSWER_BYTES",
    "INFERENCE_BYTES",
    "ClientOptions",
    "CudaHandle",
    "IndexEntry",
    "MemoryKind",
    "ModelMetadata",
    "RequestOptions",
    "ServerMetadata",
    "ServerUrl",
    "StreamRequest",
    "TensorMetadata",
    "Transport",
    "VersionStatistics",
    "memory_kind",
]


Config = Any
"""`tritonclient.grpc.model_config_pb2.ModelConfig`, published without type information."""

ANSWER_BYTES = 8 << 20
"""The largest answer read of a question about models. An index of 50,000 models has 5 MiB."""
INFERENCE_BYTES = 256 << 20
"""The largest answer read of an inference."""

# gRPC metadata uses this prefix and the key (triton-inference-server/server, inference_protocols.md).
_GRPC_PREFIX = "triton-grpc-protocol-"
_STANDARD_HEADERS = frozenset({"authorization", "cookie", "host", "user-agent"})


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """How a client talks to a server.

    Attributes:
        timeout_s: the deadline of every call but loading and unloading.
        load_timeout_s: the deadline of loading and unloading a model.
        headers: sent with every call, restricted-API headers for instance. Never logged.
        token: a bearer token. Never logged.
        root_certificates: PEM file with the authorities to trust. `None` takes the system's.
        client_certificate: PEM file, for mutual TLS.
        client_key: PEM file, for mutual TLS.
        server_name: the name the server's certificate must have when it is not the URL's host.
    """

    timeout_s: float = 30.0
    load_timeout_s: float = 600.0
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False, metadata={"json": False})
    token: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    root_certificates: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse texts the protocols cannot carry, before a client library quotes them."""
        check_fields(self)
        for name, value in self.headers.items():
            check_header(name, value, f"Header {name!r}")
        if self.token is not None:
            check_header("authorization", self.token, "The bearer token")
        for value in (*self.headers.values(), *filter(None, [self.token])):
            keep_secret(value)

    @property
    def tls(self) -> TlsFiles:
        """Trust and identity of an encrypted connection."""
        return TlsFiles(self.root_certificates, self.client_certificate, self.client_key, self.server_name)

    def all_headers(self, protocol: str | None = None) -> dict[str, str]:
        """Return the headers with the token among them. Names in lower case, as gRPC wants them.

        Args:
            protocol: `grpc` or `http`: also add Triton's restricted-API headers under the protocol's names. `<key>`
                over HTTP is `triton-grpc-protocol-<key>` over gRPC. `None`: add none.
        """
        headers = {name.lower(): value for name, value in self.headers.items()}
        if protocol == "grpc":
            own = {name: value for name, value in headers.items() if name not in _STANDARD_HEADERS}
            headers = {
                **{_GRPC_PREFIX + name.removeprefix(_GRPC_PREFIX): value for name, value in own.items()},
                **headers,
            }
        elif protocol == "http":
            headers = {**{name.removeprefix(_GRPC_PREFIX): value for name, value in headers.items()}, **headers}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        return headers


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """The fields of an inference request besides its tensors.

    Attributes:
        sequence_id: correlation ID of the sequence the request belongs to. 0 and "" mean it belongs to none.
        sequence_start: whether it is the first of its sequence.
        sequence_end: whether it is the last.
        parameters: custom parameters the model's backend reads.
    """

    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    parameters: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return them as Triton's client library takes them."""
        found: dict[str, Any] = {"parameters": dict(self.parameters)} if self.parameters else {}
        if self.sequence_id:
            found |= {
                "sequence_id": self.sequence_id,
                "sequence_start": self.sequence_start,
                "sequence_end": self.sequence_end,
            }
        return found


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """A request on a stream: its inputs, batch axis included, by name, and its other fields."""

    inputs: Mapping[str, np.ndarray[Any, Any]]
    options: RequestOptions = RequestOptions()


@dataclasses.dataclass(frozen=True)
class ServerUrl:
    """A server's address, as its URL says it.

    Attributes:
        protocol: `grpc` or `http`, with TLS too: see `tls`.
        address: `host:port`, for HTTP with a path prefix if the URL has one.
        tls: whether the connection is encrypted.
    """

    protocol: str
    address: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> ServerUrl:
        """Read `grpc://host:port`, `grpcs://...`, `http://...` or `https://...`.

        Raises:
            UsageError: it is none of these.
        """
        hint = "Write it as grpc://HOST:PORT, grpcs://HOST:PORT, http://HOST:PORT or https://HOST:PORT."
        if "@" in url:
            raise UsageError(
                f"The server's URL {url.partition('//')[0]}//...@{url.rpartition('@')[2]} has a user in it",
                hint=f"{hint} Credentials come from a file: --token-file or --header-file.",
            )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise UsageError(f"The server's URL {url!r} cannot be read: {exc}", hint=hint) from exc
        if parts.scheme not in {"grpc", "grpcs", "http", "https"} or not host:
            raise UsageError(f"The server's URL {url!r} has an unknown form", hint=hint)
        protocol, tls = parts.scheme.removesuffix("s"), parts.scheme.endswith("s")
        default = {"grpc": 8001, "http": 443 if tls else 8000}[protocol]
        if protocol == "grpc" and parts.path.strip("/"):
            raise UsageError(f"The gRPC URL {url!r} has a path, which gRPC has not", hint=hint)
        if parts.query or parts.fragment:
            raise UsageError(
                f"The server's URL {url!r} has a query or a fragment, which no request would keep", hint=hint
            )
        bracketed = f"[{host}]" if ":" in host else host
        return cls(protocol, f"{bracketed}:{port or default}{parts.path.rstrip('/')}", tls)

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.tls else ''}://{self.address}"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The host, of an IPv6 address without brackets, and the port."""
        parts = urlsplit(f"//{self.address}")
        return parts.hostname or "", parts.port or 0

    @property
    def path(self) -> str:
        """The path of the URL. It comes before the path of each request. Empty without one."""
        return urlsplit(f"//{self.address}").path


@dataclasses.dataclass(frozen=True)
class ServerMetadata:
    """Name, version (`2.51.0`) and extensions of a server."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorMetadata:
    """An input or output as the server describes it. The shape has the batch axis, `-1` is dynamic."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """A model as the server describes it.

    Attributes:
        versions: the served versions, each as a text such as `3`.
        platform: backend or platform, as Triton names it.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclasses.dataclass(frozen=True)
class IndexEntry:
    """One line of the repository index.

    Attributes:
        name: name of the model. Several entries have the same one where several versions were loaded.
        version: `None` for a model without a version ever loaded.
        state: `READY`, `UNAVAILABLE`, `LOADING`, `UNLOADING`, or empty when never loaded.
        reason: Triton's reason for the state, empty when it gives none.
    """

    name: str
    version: int | None
    state: str
    reason: str


@dataclasses.dataclass(frozen=True)
class VersionStatistics:
    """Counters of one loaded version since it was loaded (durations are sums, in nanoseconds).

    Attributes:
        cache_hit_count: requests answered from the response cache.
        batches: batch size -> executions of this size.
    """

    name: str
    version: int
    last_inference_ms: int
    inference_count: int
    execution_count: int
    success_count: int
    fail_count: int
    success_ns: int
    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
    fail_ns: int = 0
    cache_hit_count: int = 0
    batches: Mapping[int, int] = dataclasses.field(default_factory=dict)


MemoryKind = Literal["system", "cuda"]
"""Where shared memory is: POSIX shared memory of the machine, or memory of a GPU."""


@dataclasses.dataclass(frozen=True)
class CudaHandle:
    """Memory of a GPU, as another process on the machine opens it.

    Attributes:
        raw: CUDA's handle for other processes, 64 bytes.
        device: number of the GPU with the memory, as the server counts its GPUs.
    """

    raw: bytes
    device: int


def memory_kind(key: str | CudaHandle) -> MemoryKind:
    """Return the place of a key's memory."""
    return "cuda" if isinstance(key, CudaHandle) else "system"


class Transport(Protocol):
    """The calls as one protocol makes them. Errors are `ServerUnreachableError` and `ServerRefusedError`.

    In every call, `name` is the model or the region of shared memory, `version` is empty for the server's choice, and
    `timeout_s` is the deadline in seconds. `config_json` replaces the repository's configuration until the model is
    unloaded. Without it (`None`), the server reads config.pbtxt. `outputs` names the wanted outputs, `None` all.
    """

    def live(self, timeout_s: float) -> bool: ...  # noqa: D102

    def ready(self, timeout_s: float) -> bool: ...  # noqa: D102

    def metadata(self, timeout_s: float) -> ServerMetadata: ...  # noqa: D102

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]: ...  # noqa: D102

    def load(  # noqa: D102
        self, name: str, config_json: str | None, files: Mapping[str, bytes], timeout_s: float
    ) -> None: ...

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None: ...  # noqa: D102

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]: ...  # noqa: D102

    def model_config(self, name: str, version: str, timeout_s: float) -> Config: ...  # noqa: D102

    def model_metadata(self, name: str, version: str, timeout_s: float) -> ModelMetadata: ...  # noqa: D102

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool: ...  # noqa: D102

    def register_memory(self, name: str, key: str | CudaHandle, size_bytes: int, timeout_s: float) -> None: ...  # noqa: D102

    def unregister_memory(self, name: str, kind: MemoryKind, timeout_s: float) -> None: ...  # noqa: D102

    def registered_memory(self, kind: MemoryKind, timeout_s: float) -> tuple[str, ...]: ...  # noqa: D102

    def infer(  # noqa: D102
        self,
        name: str,
        version: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        outputs: Sequence[str] | None,
        options: RequestOptions,
        timeout_s: float,
    ) -> dict[str, np.ndarray[Any, Any]]: ...

    def stream(  # noqa: D102
        self,
        name: str,
        version: str,
        requests: Iterable[StreamRequest],
        timeout_s: float,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]: ...

    def close(self) -> None: ...  # noqa: D102
