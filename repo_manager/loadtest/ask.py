"""Asks a server the questions of either protocol: metadata, configuration, statistics, shared memory."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.tls import TlsFiles, tls_context
from repo_manager.optional import require

__all__ = ["Call", "grpc_call", "http_call"]

_TIMEOUT_S = 10.0
_MEMORY_QUESTIONS = ("register", "unregister", "regions")

Call = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""Asks one of the protocol's questions, with arguments where it has any."""


def grpc_call(options: LoadTestOptions) -> Call:
    """Return how to ask over gRPC. Connects with the first question.

    Raises:
        UsageError: a certificate cannot be read.
    """
    grpc = require("grpc")
    messages = require("tritonclient.grpc.service_pb2")
    services = require("tritonclient.grpc.service_pb2_grpc")
    to_dict = require("google.protobuf.json_format").MessageToDict
    host, port = options.address
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    stub = services.GRPCInferenceServiceStub(_channel(grpc, address, options))
    named = {"name": options.model, "version": "" if options.version is None else str(options.version)}
    questions = {
        "server": (stub.ServerMetadata, messages.ServerMetadataRequest, {}),
        "metadata": (stub.ModelMetadata, messages.ModelMetadataRequest, named),
        "config": (stub.ModelConfig, messages.ModelConfigRequest, named),
        "statistics": (stub.ModelStatistics, messages.ModelStatisticsRequest, named),
        "register": (stub.SystemSharedMemoryRegister, messages.SystemSharedMemoryRegisterRequest, {}),
        "unregister": (stub.SystemSharedMemoryUnregister, messages.SystemSharedMemoryUnregisterRequest, {}),
        "regions": (stub.SystemSharedMemoryStatus, messages.SystemSharedMemoryStatusRequest, {}),
    }
    headers = tuple(options.headers.items())

    def call(question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        method, request, usual = questions[question]
        try:
            answer: dict[str, Any] = to_dict(
                method(request(**usual, **arguments), timeout=_TIMEOUT_S, metadata=headers),
                preserving_proto_field_name=True,
            )
        except grpc.RpcError as exc:
            code, details = exc.code().name, exc.details()
            if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED") and "model" not in str(details).lower():
                raise _unreachable(options, details) from exc
            raise _refused(options, question, f"{code}: {details}") from exc
        return answer

    return call


def _channel(grpc: ModuleType, address: str, options: LoadTestOptions) -> Any:
    """Return a gRPC channel, encrypted when the URL says so.

    Raises:
        UsageError: a certificate cannot be read.
    """
    arguments: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    files = options.tls
    if files is None:
        return grpc.insecure_channel(address, options=arguments)
    try:
        root, key, chain = (
            None if path is None else path.read_bytes()
            for path in (files.root_certificates, files.client_key, files.client_certificate)
        )
    except OSError as exc:
        raise UsageError(f"A certificate for {options.url} cannot be read: {exc}") from exc
    if files.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", files.server_name))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain), options=arguments)


def _http_connection(options: LoadTestOptions) -> http.client.HTTPConnection:
    files = options.tls
    if files is None:
        return http.client.HTTPConnection(*options.address, timeout=_TIMEOUT_S)
    return NamedHttpsConnection(options.address, files, _TIMEOUT_S)


class NamedHttpsConnection(http.client.HTTPSConnection):
    """HTTPS to an address whose certificate may have another name."""

    def __init__(self, address: tuple[str, int], files: TlsFiles, timeout_s: float) -> None:
        self._files = files
        super().__init__(*address, timeout=timeout_s, context=tls_context(files))

    def connect(self) -> None:
        """Connect and shake hands."""
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = tls_context(self._files).wrap_socket(plain, server_hostname=self._files.server_name or self.host)


def http_call(options: LoadTestOptions) -> Call:
    """Return how to ask over HTTP. Connects with each question."""
    model = f"/v2/models/{urllib.parse.quote(options.model, safe='')}"
    if options.version is not None:
        model += f"/versions/{options.version}"
    memory = "/v2/systemsharedmemory"
    paths = {
        "server": "/v2",
        "metadata": model,
        "config": f"{model}/config",
        "statistics": f"{model}/stats",
        "register": memory + "/region/{name}/register",
        "unregister": memory + "/region/{name}/unregister",
        "regions": f"{memory}/status",
    }

    def call(question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        connection, headers = _http_connection(options), dict(options.headers)
        sent = {"offset": 0, **arguments}
        name = sent.pop("name", None)
        method, path = ("GET", paths[question]) if name is None else ("POST", paths[question].replace("{name}", name))
        try:
            connection.request(method, path, None if name is None else json.dumps(sent), headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
            data = json.loads(text or "{}")
        except (OSError, http.client.HTTPException) as exc:
            raise _unreachable(options, exc) from exc
        except ValueError as exc:
            raise _refused(options, question, f"HTTP {answer.status} without JSON: {text[:200]!r}") from exc
        finally:
            connection.close()
        if answer.status != 200:
            raise _refused(options, question, f"HTTP {answer.status}: {data.get('error', text[:200])}")
        result: dict[str, Any] = data if isinstance(data, dict) else {"regions": data}
        return result

    return call


def _unreachable(options: LoadTestOptions, reason: object) -> ServerUnreachableError:
    return ServerUnreachableError(
        f"no answer from {options.url}: {reason}",
        hint="Check the address, the server, and the protocol's port (Triton: 8000 HTTP, 8001 gRPC).",
    )


def _refused(options: LoadTestOptions, question: str, reason: str) -> ServerRefusedError:
    if question in _MEMORY_QUESTIONS:
        return ServerRefusedError(f"{options.url} did not {question} shared memory: {reason}")
    wanted = options.model if options.version is None else f"{options.model} version {options.version}"
    # What `compare --control` asks for is there only when somebody made and deployed it.
    is_control = options.model.endswith(("__dense", "__noflag"))
    control = f"`add --control` makes it, `deploy {options.model}` serves it. " if is_control else ""
    return ServerRefusedError(
        f"{options.url} did not describe the model {wanted}: {reason}",
        hint=f"{control}See what it serves: repo-manager status, or POST /v2/repository/index.",
    )
