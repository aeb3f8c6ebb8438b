"""Triton over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.optional import require
from repo_manager.server.transport import (
    ClientOptions,
    Config,
    Endpoint,
    IndexEntry,
    ModelMetadata,
    RequestOptions,
    ServerMetadata,
    TensorMetadata,
    VersionStatistics,
    out_of_reach,
    refusal,
    request_inputs,
    without_stack,
)
from repo_manager.tls import tls_context
from repo_manager.triton_messages import model_config_pb2

if TYPE_CHECKING:
    import numpy as np

__all__ = ["HttpTransport", "HttpWire"]


# HTTP requests to one server over kept connections, one a thread, by the standard library alone.

_CONNECT_S = 10.0


class HttpWire:
    """Sends requests; safe to share between threads.

    Args:
        endpoint: of the server; its path, if it has one, comes before that of each request.
        options: TLS and headers.

    Raises:
        UsageError: a certificate cannot be read.
    """

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        parts = urlsplit(f"//{endpoint.address}")
        self._endpoint = endpoint
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._headers = options.all_headers("http")
        self._context = tls_context(options.tls) if endpoint.tls else None
        self._server_name = options.server_name
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body of the answer.

        Raises:
            ServerUnreachableError: no answer within `timeout_s`, or no connection.
        """
        deadline = time.monotonic() + timeout_s
        try:
            connection, kept = self._connection(timeout_s)
            try:
                return self._exchange(connection, (method, path, body, headers), deadline)
            except (ConnectionError, http.client.BadStatusLine):
                # The server may have closed a connection that lay idle: that is no answer to this request.
                connection.close()
                if not kept:
                    raise
                connection, _ = self._connection(timeout_s)
                return self._exchange(connection, (method, path, body, headers), deadline)
        except TimeoutError as exc:
            self._drop()
            raise ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:.3g} s: {path}") from exc
        except (OSError, http.client.HTTPException) as exc:
            self._drop()
            reason = str(exc) or type(exc).__name__
            raise out_of_reach(self._endpoint, path, reason) from exc
        except BaseException:
            self._drop()  # interrupted: what comes over this connection next is not an answer to the next request
            raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        message: tuple[str, str, bytes | None, Mapping[str, str] | None],
        deadline: float,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        method, path, body, headers = message
        connection.request(method, self._path + path, body=body, headers={**self._headers, **(headers or {})})
        _limit(connection, deadline - time.monotonic())
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def _connection(self, timeout_s: float) -> tuple[http.client.HTTPConnection, bool]:
        """Return this thread's connection, open, and whether it was open before."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._new()
            self._own.connection = connection
            with self._lock:
                self._all.append(connection)
        kept = _socket_of(connection) is not None
        if not kept:
            connection.timeout = min(timeout_s, _CONNECT_S)
            connection.connect()
        _limit(connection, timeout_s)
        return connection, kept

    def _new(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port)
        return _NamedConnection(self._host, self._port, self._context, self._server_name)

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            for connection in self._all:
                with contextlib.suppress(OSError):
                    connection.close()
            self._all.clear()


def _socket_of(connection: http.client.HTTPConnection) -> socket.socket | None:
    """Return the connection's socket; the type stubs do not know that there may be none."""
    found: socket.socket | None = connection.sock
    return found


def _limit(connection: http.client.HTTPConnection, seconds: float) -> None:
    found = _socket_of(connection)
    if found is not None:
        found.settimeout(max(0.001, seconds))


class _NamedConnection(http.client.HTTPSConnection):
    """A TLS connection whose certificate is checked against a name that may be another than the URL's host."""

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext, server_name: str | None) -> None:
        super().__init__(host, port, context=context)
        self._tls, self._server_name = context, server_name

    def connect(self) -> None:
        """Connect, and check the server's certificate."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name or self.host)


_MEMORY = "/v2/systemsharedmemory"
_HEADER_LENGTH = "Inference-Header-Content-Length"


class HttpTransport:
    """HTTP connections to one server; safe to share between threads.

    Requests and answers of inferences are written and read by Triton's client library; the connection is ours,
    because the library's belongs to the thread that made it and cannot be given a deadline per call.
    """

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._wire = HttpWire(endpoint, options)

    def live(self, timeout_s: float) -> bool:
        """Say whether the server is alive."""
        return self._says_yes("/v2/health/live", timeout_s)

    def ready(self, timeout_s: float) -> bool:
        """Say whether the server is ready."""
        return self._says_yes("/v2/health/ready", timeout_s)

    def metadata(self, timeout_s: float) -> ServerMetadata:
        """Return the server's metadata."""
        answer = self._json("metadata", "GET", "/v2", None, timeout_s)
        if not isinstance(answer, dict) or not {"name", "version"} <= answer.keys():
            raise ServerRefusedError(f"{self._endpoint} answers metadata without a name: is it a Triton server?")
        return ServerMetadata(answer["name"], answer["version"], tuple(answer.get("extensions", ())))

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        """Return the repository index."""
        answer = self._json("repository index", "POST", "/v2/repository/index", {}, timeout_s)
        return tuple(
            IndexEntry(
                entry["name"],
                int(entry["version"]) if entry.get("version") else None,
                entry.get("state", ""),
                without_stack(entry.get("reason", "")),
            )
            for entry in answer
        )

    def load(self, name: str, config_json: str | None, timeout_s: float) -> None:
        """Load or reload a model."""
        body = {} if config_json is None else {"parameters": {"config": config_json}}
        self._json(f"load {name}", "POST", f"/v2/repository/models/{_safe(name)}/load", body, timeout_s)

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None:
        """Unload a model; Triton answers before it is gone."""
        body = {"parameters": {"unload_dependents": dependents}}
        self._json(f"unload {name}", "POST", f"/v2/repository/models/{_safe(name)}/unload", body, timeout_s)

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions."""
        path = f"{_model(name, version)}/stats" if name else "/v2/models/stats"
        answer = self._json(f"statistics of {name}", "GET", path, None, timeout_s)
        return tuple(_statistics(each) for each in answer.get("model_stats", ()))

    def model_config(self, name: str, version: str, timeout_s: float) -> Config:
        """Return the config that the server runs a model with."""
        path = f"{_model(name, version)}/config"
        answer = self._json(f"configuration of {name}", "GET", path, None, timeout_s)
        json_format = require("google.protobuf.json_format")
        return json_format.ParseDict(answer, model_config_pb2.ModelConfig(), ignore_unknown_fields=True)

    def model_metadata(self, name: str, version: str, timeout_s: float) -> ModelMetadata:
        """Return what the server says of a model."""
        answer = self._json(f"metadata of {name}", "GET", _model(name, version), None, timeout_s)
        inputs, outputs = (
            tuple(
                TensorMetadata(tensor["name"], tensor["datatype"], tuple(map(int, tensor.get("shape", ()))))
                for tensor in answer.get(kind, ())
            )
            for kind in ("inputs", "outputs")
        )
        versions = tuple(str(version) for version in answer.get("versions", ()))
        return ModelMetadata(answer["name"], versions, str(answer.get("platform", "")), inputs, outputs)

    def register_memory(self, name: str, key: str, size_bytes: int, timeout_s: float) -> None:
        """Let the server map POSIX shared memory."""
        body = {"key": key, "offset": 0, "byte_size": size_bytes}
        path = f"{_MEMORY}/region/{_safe(name)}/register"
        self._json(f"register shared memory {name}", "POST", path, body, timeout_s)

    def unregister_memory(self, name: str, timeout_s: float) -> None:
        """Let the server forget a region."""
        path = f"{_MEMORY}/region/{_safe(name)}/unregister"
        self._json(f"unregister shared memory {name}", "POST", path, {}, timeout_s)

    def registered_memory(self, timeout_s: float) -> tuple[str, ...]:
        """Return the names of the regions that the server maps."""
        answer = self._json("regions of shared memory", "GET", f"{_MEMORY}/status", None, timeout_s)
        return tuple(str(region["name"]) for region in answer)

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        """Say whether a version is ready."""
        return self._says_yes(f"{_model(name, version)}/ready", timeout_s)

    def infer(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        outputs: Sequence[str] | None,
        options: RequestOptions,
        timeout_s: float,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one inference."""
        triton = require("tritonclient.http")  # it brings gevent, which a gRPC client has no use for
        wanted = None if outputs is None else [triton.InferRequestedOutput(output) for output in outputs]
        body, json_size = triton.InferenceServerClient.generate_request_body(
            request_inputs(triton, inputs), outputs=wanted, **options.arguments()
        )
        headers = {} if json_size is None else {_HEADER_LENGTH: str(json_size)}
        path = f"{_model(name, version)}/infer"
        status, answer_headers, answer = self._wire.request("POST", path, body, timeout_s, headers)
        self._check(f"inference on {name}", status, answer)
        length = answer_headers.get(_HEADER_LENGTH)
        result = triton.InferenceServerClient.parse_response_body(
            answer, header_length=None if length is None else int(length)
        )
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def stream(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        options: RequestOptions,
        timeout_s: float,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Refuse: Triton streams the tensors of a decoupled model over gRPC only."""
        raise UsageError(
            f"{name} answers a request with several responses, which Triton sends over gRPC only, not over "
            f"{self._endpoint}",
            hint="Give the server's gRPC address: grpc://HOST:8001.",
        )

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    def _says_yes(self, path: str, timeout_s: float) -> bool:
        return self._wire.request("GET", path, None, timeout_s)[0] == 200

    def _json(self, what: str, method: str, path: str, body: Any, timeout_s: float) -> Any:
        """Send JSON and return what comes back; an empty answer is an empty object.

        Raises:
            ServerRefusedError: the server answered with an error, or not as a Triton does.
            ServerUnreachableError: no answer.
        """
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"content-type": "application/json"}
        status, _, answer = self._wire.request(method, path, content, timeout_s, headers)
        self._check(what, status, answer)
        try:
            return json.loads(answer or b"{}")
        except ValueError as exc:
            raise ServerRefusedError(
                f"{self._endpoint} answers {what} with something other than JSON: is it a Triton server?"
            ) from exc

    def _check(self, what: str, status: int, answer: bytes) -> None:
        if status == 200:
            return
        try:
            reason = str(json.loads(answer)["error"])
        except (ValueError, KeyError, TypeError):
            text = " ".join(answer[:200].decode(errors="replace").split())
            reason = f"HTTP status {status}" + (f" ({text})" if text else "")
        raise refusal(self._endpoint, what, reason)


def _safe(name: str) -> str:
    return quote(name, safe="")


def _model(name: str, version: str) -> str:
    return f"/v2/models/{_safe(name)}" + (f"/versions/{version}" if version else "")


def _statistics(each: Mapping[str, Any]) -> VersionStatistics:
    stats = each.get("inference_stats", {})

    def number(kind: str, field: str) -> int:
        return int(stats.get(kind, {}).get(field, 0))

    return VersionStatistics(
        name=each["name"],
        version=int(each["version"]),
        last_inference_ms=int(each.get("last_inference", 0)),
        inference_count=int(each.get("inference_count", 0)),
        execution_count=int(each.get("execution_count", 0)),
        success_count=number("success", "count"),
        fail_count=number("fail", "count"),
        success_ns=number("success", "ns"),
        queue_ns=number("queue", "ns"),
        compute_input_ns=number("compute_input", "ns"),
        compute_infer_ns=number("compute_infer", "ns"),
        compute_output_ns=number("compute_output", "ns"),
        fail_ns=number("fail", "ns"),
        cache_hit_count=number("cache_hit", "count"),
        batches={
            int(batch["batch_size"]): int(batch.get("compute_infer", {}).get("count", 0))
            for batch in each.get("batch_stats", ())
        },
    )
