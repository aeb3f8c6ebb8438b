"""What the server says about itself and the model: metadata, configuration, statistics."""

from __future__ import annotations

import dataclasses
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

__all__ = ["InputFacts", "ModelStatistics", "Target", "TargetFacts", "connect"]

_TIMEOUT_S = 10.0
_MEMORY_QUESTIONS = ("register", "unregister", "regions")
_STAGES = ("queue", "compute_input", "compute_infer", "compute_output", "success", "fail")


@dataclasses.dataclass(frozen=True)
class InputFacts:
    """One input (or output) as the server describes it.

    Attributes:
        name: the input's name.
        datatype: Triton's name of its type (`FP32`, `INT64`, `BYTES`, ...).
        shape: dimensions without the batch axis that `max_batch_size` adds; `-1` is dynamic.
        optional: whether a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class TargetFacts:
    """The server and the model under load.

    Attributes:
        max_batch_size: 0 when the model has no batch axis of Triton's.
        response_cache: whether answers may come from the server's response cache.
        output_facts: the outputs with their types and shapes.
    """

    url: str
    protocol: str
    server: str
    server_version: str
    model: str
    version: str
    backend: str
    max_batch_size: int
    inputs: tuple[InputFacts, ...]
    outputs: tuple[str, ...]
    response_cache: bool
    dynamic_batching: bool
    decoupled: bool
    sequence: bool
    output_facts: tuple[InputFacts, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelStatistics:
    """Counters since the model was loaded: nanoseconds, counts, executions by batch size."""

    requests: int
    inferences: int
    executions: int
    failures: int
    cache_hits: int
    stage_ns: Mapping[str, int]
    batches: Mapping[int, int]


Call = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""Asks one of the protocol's questions, with arguments where it has any."""


class Target:
    """Asks one server about one model; `call` is the protocol's own way to ask."""

    def __init__(self, options: LoadTestOptions, call: Call) -> None:
        self._options = options
        self._call = call

    def facts(self) -> TargetFacts:
        """Return what server and model say about themselves.

        Raises:
            ServerUnreachableError: no answer.
            ServerRefusedError: unknown model or version, or not ready.
        """
        server, metadata, config = (self._call(question, {}) for question in ("server", "metadata", "config"))
        config = config.get("config", config)
        batch = int(config.get("max_batch_size", 0))
        optional = {item["name"] for item in config.get("input", []) if item.get("optional")}
        return TargetFacts(
            url=self._options.url,
            protocol=self._options.wire,
            server=str(server.get("name", "")),
            server_version=str(server.get("version", "")),
            model=str(metadata["name"]),
            version=str(self._options.version or _newest(metadata.get("versions", []))),
            backend=str(config.get("backend", "") or metadata.get("platform", "")),
            max_batch_size=batch,
            inputs=tuple(_input(item, batch, optional) for item in metadata.get("inputs", [])),
            outputs=tuple(str(item["name"]) for item in metadata.get("outputs", [])),
            response_cache=bool(config.get("response_cache", {}).get("enable")),
            dynamic_batching="dynamic_batching" in config,
            decoupled=bool(config.get("model_transaction_policy", {}).get("decoupled")),
            sequence="sequence_batching" in config,
            output_facts=tuple(_input(item, batch, set()) for item in metadata.get("outputs", [])),
        )

    def statistics(self) -> ModelStatistics:
        """Return the model's counters, summed over the versions that answer.

        Raises:
            ServerError: as `facts`.
        """
        models = self._call("statistics", {}).get("model_stats", [])
        stage_ns = dict.fromkeys(_STAGES, 0)
        batches: dict[int, int] = {}
        counts = {"requests": 0, "failures": 0, "cache_hits": 0}
        for model in models:
            stats = model.get("inference_stats", {})
            for stage in _STAGES:
                stage_ns[stage] += int(stats.get(stage, {}).get("ns", 0))
            for name, key in (("requests", "success"), ("failures", "fail"), ("cache_hits", "cache_hit")):
                counts[name] += int(stats.get(key, {}).get("count", 0))
            for batch in model.get("batch_stats", []):
                size = int(batch.get("batch_size", 0))
                batches[size] = batches.get(size, 0) + int(batch.get("compute_infer", {}).get("count", 0))
        return ModelStatistics(
            requests=counts["requests"],
            inferences=sum(int(model.get("inference_count", 0)) for model in models),
            executions=sum(int(model.get("execution_count", 0)) for model in models),
            failures=counts["failures"],
            cache_hits=counts["cache_hits"],
            stage_ns=stage_ns,
            batches=batches,
        )

    def register_memory(self, name: str, key: str, size_bytes: int) -> None:
        """Let the server map the POSIX shared memory `key` as region `name`.

        Raises:
            ServerError: it cannot, or is not allowed to.
        """
        self._call("register", {"name": name, "key": key, "byte_size": size_bytes})

    def unregister_memory(self, name: str) -> None:
        """Let the server forget a region. Raises as `register_memory`."""
        self._call("unregister", {"name": name})

    def registered_memory(self) -> tuple[str, ...]:
        """Return the names of the regions that the server maps. Raises as `register_memory`."""
        answer = self._call("regions", {})
        regions = answer.get("regions", [])  # gRPC: a mapping by name; HTTP: a list, as the whole answer
        return tuple(str(one) if isinstance(one, str) else str(one["name"]) for one in regions)


def _newest(versions: list[str]) -> str:
    return max(versions, key=lambda text: int(text) if text.isdigit() else -1, default="")


def _input(item: dict[str, Any], max_batch_size: int, optional: set[str]) -> InputFacts:
    shape = tuple(int(size) for size in item.get("shape", []))
    if max_batch_size > 0:
        shape = shape[1:]
    return InputFacts(str(item["name"]), str(item["datatype"]), shape, item["name"] in optional)


def connect(options: LoadTestOptions) -> Target:
    """Return a `Target` that asks by the options' protocol. Connects with the first question."""
    return Target(options, _grpc_call(options) if options.wire == "grpc" else _http_call(options))


def _grpc_call(options: LoadTestOptions) -> Call:
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


def _http_call(options: LoadTestOptions) -> Call:
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
    return ServerRefusedError(
        f"{options.url} did not describe the model {wanted}: {reason}",
        hint="See what it serves: repo-manager status, or POST /v2/repository/index.",
    )
