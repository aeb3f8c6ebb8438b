"""Triton over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from repo_manager.errors import ServerRefusedError, UsageError
from repo_manager.optional import require
from repo_manager.server.answers import (
    array_of,
    reading,
    refusal,
    request_inputs,
    several,
    text_of,
    version_of,
    without_stack,
)
from repo_manager.server.http_wire import HttpWire
from repo_manager.server.transport import (
    ANSWER_BYTES,
    INFERENCE_BYTES,
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
    TensorMetadata,
    VersionStatistics,
    memory_kind,
)
from repo_manager.triton_messages import model_config_pb2

if TYPE_CHECKING:
    import numpy as np

__all__ = ["HttpTransport"]


_MEMORY = {"system": "/v2/systemsharedmemory", "cuda": "/v2/cudasharedmemory"}
_HEADER_LENGTH = "Inference-Header-Content-Length"


class HttpTransport:
    """HTTP connections to one server. Safe to share between threads.

    Requests and answers of inferences are written and read by Triton's client library. The connection is ours, because
    the library's belongs to the thread of its making and takes no deadline per call.
    """

    def __init__(self, endpoint: ServerUrl, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._wire = HttpWire(endpoint, options)

    def live(self, timeout_s: float) -> bool:
        """Return whether the server is alive."""
        return self._says_yes("/v2/health/live", timeout_s)

    def ready(self, timeout_s: float) -> bool:
        """Return whether the server is ready."""
        return self._says_yes("/v2/health/ready", timeout_s)

    def metadata(self, timeout_s: float) -> ServerMetadata:
        """Return the server's metadata."""
        answer = self._json("metadata", "GET", "/v2", None, timeout_s)
        if not isinstance(answer, dict) or not {"name", "version"} <= answer.keys():
            raise ServerRefusedError(f"{self._endpoint} answers metadata without a name: is it a Triton server?")
        with reading(self._endpoint, "metadata"):
            extensions = tuple(map(text_of, several(answer.get("extensions"))))
            return ServerMetadata(text_of(answer["name"]), text_of(answer["version"]), extensions)

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        """Return the repository index."""
        answer = self._json("repository index", "POST", "/v2/repository/index", {}, timeout_s)
        with reading(self._endpoint, "repository index"):
            return tuple(
                IndexEntry(
                    text_of(entry["name"]),
                    version_of(entry.get("version", "")),
                    text_of(entry.get("state", "")),
                    without_stack(text_of(entry.get("reason", ""))),
                )
                for entry in several(answer)
            )

    def load(self, name: str, config_json: str | None, files: Mapping[str, bytes], timeout_s: float) -> None:
        """Load or reload a model, as `Transport.load`."""
        body = {} if config_json is None else {"parameters": {"config": config_json}}
        for place, content in files.items():
            body.setdefault("parameters", {})[f"file:{place}"] = base64.b64encode(content).decode("ascii")
        self._json(f"load {name}", "POST", f"/v2/repository/models/{_safe(name)}/load", body, timeout_s)

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None:
        """Unload a model, as `Transport.unload`. Triton answers before it is gone."""
        body = {"parameters": {"unload_dependents": dependents}}
        self._json(f"unload {name}", "POST", f"/v2/repository/models/{_safe(name)}/unload", body, timeout_s)

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions, as `Transport.statistics`."""
        path = f"{_model(name, version)}/stats" if name else "/v2/models/stats"
        answer = self._json(f"statistics of {name}", "GET", path, None, timeout_s)
        with reading(self._endpoint, f"statistics of {name}"):
            return tuple(_statistics(each) for each in several(answer.get("model_stats")))

    def model_config(self, name: str, version: str, timeout_s: float) -> Config:
        """Return the config the server runs a model with, as `Transport.model_config`."""
        path = f"{_model(name, version)}/config"
        answer = self._json(f"configuration of {name}", "GET", path, None, timeout_s)
        json_format = require("google.protobuf.json_format")
        with reading(self._endpoint, f"configuration of {name}"):
            return json_format.ParseDict(answer, model_config_pb2.ModelConfig(), ignore_unknown_fields=True)

    def model_metadata(self, name: str, version: str, timeout_s: float) -> ModelMetadata:
        """Return the server's word on a model, as `Transport.model_metadata`."""
        answer = self._json(f"metadata of {name}", "GET", _model(name, version), None, timeout_s)
        with reading(self._endpoint, f"metadata of {name}"):
            inputs, outputs = (
                tuple(
                    TensorMetadata(
                        text_of(tensor["name"]),
                        text_of(tensor["datatype"]),
                        tuple(map(int, several(tensor.get("shape")))),
                    )
                    for tensor in several(answer.get(kind))
                )
                for kind in ("inputs", "outputs")
            )
            versions = tuple(str(version_of(version)) for version in several(answer.get("versions")))
            platform = text_of(answer.get("platform", ""))
            return ModelMetadata(text_of(answer["name"]), versions, platform, inputs, outputs)

    def register_memory(self, name: str, key: str | CudaHandle, size_bytes: int, timeout_s: float) -> None:
        """Let the server map POSIX shared memory, or memory of a GPU, as `Transport.register_memory`."""
        if isinstance(key, CudaHandle):
            handle = {"b64": base64.b64encode(key.raw).decode()}
            body: dict[str, Any] = {"raw_handle": handle, "device_id": key.device, "byte_size": size_bytes}
        else:
            body = {"key": key, "offset": 0, "byte_size": size_bytes}
        path = f"{_MEMORY[memory_kind(key)]}/region/{_safe(name)}/register"
        self._json(f"register shared memory {name}", "POST", path, body, timeout_s)

    def unregister_memory(self, name: str, kind: MemoryKind, timeout_s: float) -> None:
        """Let the server forget a region, as `Transport.unregister_memory`."""
        path = f"{_MEMORY[kind]}/region/{_safe(name)}/unregister"
        self._json(f"unregister shared memory {name}", "POST", path, {}, timeout_s)

    def registered_memory(self, kind: MemoryKind, timeout_s: float) -> tuple[str, ...]:
        """Return the names of the regions the server maps, as `Transport.registered_memory`."""
        answer = self._json("regions of shared memory", "GET", f"{_MEMORY[kind]}/status", None, timeout_s)
        with reading(self._endpoint, "regions of shared memory"):
            return tuple(text_of(region["name"]) for region in several(answer))

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        """Return whether a version is ready, as `Transport.model_ready`."""
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
        """Run one inference, as `Transport.infer`."""
        triton = require("tritonclient.http")  # imports gevent, useless to a gRPC client
        wanted = None if outputs is None else [triton.InferRequestedOutput(output) for output in outputs]
        body, json_size = triton.InferenceServerClient.generate_request_body(
            request_inputs(triton, inputs), outputs=wanted, **options.arguments()
        )
        headers = {} if json_size is None else {_HEADER_LENGTH: str(json_size)}
        path = f"{_model(name, version)}/infer"
        what = f"inference on {name}"
        status, answer_headers, answer = self._wire.request(
            "POST", path, body, timeout_s, headers=headers, limit_bytes=INFERENCE_BYTES
        )
        self._check(what, status, answer)
        with reading(self._endpoint, what):
            length = answer_headers.get(_HEADER_LENGTH)
            size = len(answer) if length is None else int(length)
            if not 0 <= size <= min(len(answer), ANSWER_BYTES):
                raise ValueError(f"{size} of {len(answer)} bytes are said to be JSON")
            result = triton.InferenceServerClient.parse_response_body(
                answer, header_length=None if length is None else size
            )
            outputs_told = several(result.get_response()["outputs"])
            return {name: array_of(name, result) for name in (text_of(output["name"]) for output in outputs_told)}

    def stream(
        self,
        name: str,
        version: str,
        requests: Iterable[StreamRequest],
        timeout_s: float,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Refuse: Triton streams the tensors of a decoupled model over gRPC only, as `Transport.stream`."""
        raise UsageError(
            f"{name} answers a request with several responses, which Triton sends over gRPC only, not over "
            f"{self._endpoint}",
            hint="Give the server's gRPC address: grpc://HOST:8001.",
        )

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    def _says_yes(self, path: str, timeout_s: float) -> bool:
        return self._wire.request("GET", path, None, timeout_s, limit_bytes=ANSWER_BYTES)[0] == 200

    def _json(self, what: str, method: str, path: str, body: Any, timeout_s: float) -> Any:
        """Send JSON and return the answer. An empty answer is an empty object.

        Raises:
            ServerRefusedError: the server answered with an error, or not as a Triton does.
            ServerUnreachableError: no answer.
        """
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"content-type": "application/json"}
        status, _, answer = self._wire.request(
            method, path, content, timeout_s, headers=headers, limit_bytes=ANSWER_BYTES
        )
        self._check(what, status, answer)
        try:
            found = json.loads(answer or b"{}")
            if found is None:
                raise ValueError("null, which would pass for an empty index")
        except (ValueError, RecursionError) as exc:
            raise ServerRefusedError(
                f"{self._endpoint} answers {what} with something other than JSON: is it a Triton server?"
            ) from exc
        return found

    def _check(self, what: str, status: int, answer: bytes) -> None:
        if status == 200:
            return
        try:
            reason = str(json.loads(answer)["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
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
        name=text_of(each["name"]),
        version=version_of(each["version"]) or 0,
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
