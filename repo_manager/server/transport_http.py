"""Triton over HTTP."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gevent.ssl  # type: ignore[import-untyped]  # gevent ships no types
import numpy as np
import tritonclient.http as triton
from geventhttpclient.response import HTTPParseError
from google.protobuf import json_format  # type: ignore[import-untyped]  # protobuf ships no types
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.server.tensors import request_inputs
from repo_manager.server.transport import ClientOptions, Config, Endpoint, IndexEntry, ServerMetadata, VersionStatistics

__all__ = ["HttpTransport"]


class HttpTransport:
    """HTTP connections to one server; each thread has its own (the client library runs on gevent)."""

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._headers = options.all_headers("http")
        self._context = _tls_context(endpoint, options) if endpoint.tls else None
        self._server_name = options.server_name
        self._connect_timeout_s = min(options.timeout_s, 10.0)
        self._clients: dict[tuple[int, float], Any] = {}

    def _client(self, timeout_s: float) -> Any:
        """Return the client with this deadline: the library fixes it when it connects."""
        # Deadlines come as what is left of a whole: a client per exact value would never be used twice.
        key = threading.get_ident(), float(math.ceil(timeout_s)) if timeout_s > 1.0 else timeout_s
        if key not in self._clients:
            self._clients[key] = triton.InferenceServerClient(
                self._endpoint.address,
                connection_timeout=min(timeout_s, self._connect_timeout_s),
                network_timeout=key[1],
                ssl=self._endpoint.tls,
                ssl_options=None if self._server_name is None else {"server_hostname": self._server_name},
                ssl_context_factory=None if self._context is None else self._trusted,
            )
        return self._clients[key]

    def _trusted(self, cafile: str | None = None) -> Any:
        """Return our TLS context; the library's own list of authorities (`cafile`) is not added to it."""
        return self._context

    @contextlib.contextmanager
    def _call(self, what: str, timeout_s: float) -> Iterator[Any]:
        """Give the client, and translate the errors of a call."""
        try:
            yield self._client(timeout_s)
        except InferenceServerException as exc:
            status, reason = str(exc.status() or ""), str(exc.message() or exc).strip()
            if status == "499" or "timed out" in reason:
                raise ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:g} s: {what}") from exc
            raise ServerRefusedError(f"{self._endpoint} refused: {what}: {reason}") from exc
        except TimeoutError as exc:
            raise ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:g} s: {what}") from exc
        except (OSError, EOFError, HTTPParseError) as exc:
            raise ServerUnreachableError(f"{self._endpoint} cannot be reached: {what}: {exc}") from exc

    def live(self, timeout_s: float) -> bool:
        """Say whether the server is alive."""
        with self._call("liveness", timeout_s) as client:
            return bool(client.is_server_live(headers=self._headers))

    def ready(self, timeout_s: float) -> bool:
        """Say whether the server is ready."""
        with self._call("readiness", timeout_s) as client:
            return bool(client.is_server_ready(headers=self._headers))

    def metadata(self, timeout_s: float) -> ServerMetadata:
        """Return the server's metadata."""
        with self._call("metadata", timeout_s) as client:
            answer = client.get_server_metadata(headers=self._headers)
        return ServerMetadata(answer["name"], answer["version"], tuple(answer.get("extensions", ())))

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        """Return the repository index."""
        with self._call("repository index", timeout_s) as client:
            answer = client.get_model_repository_index(headers=self._headers)
        return tuple(
            IndexEntry(
                entry["name"],
                int(entry["version"]) if entry.get("version") else None,
                entry.get("state", ""),
                entry.get("reason", ""),
            )
            for entry in answer
        )

    def load(self, name: str, config_json: str | None, timeout_s: float) -> None:
        """Load or reload a model."""
        with self._call(f"load {name}", timeout_s) as client:
            client.load_model(name, headers=self._headers, config=config_json)

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None:
        """Unload a model; Triton answers before it is gone."""
        with self._call(f"unload {name}", timeout_s) as client:
            client.unload_model(name, headers=self._headers, unload_dependents=dependents)

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions."""
        with self._call(f"statistics of {name}", timeout_s) as client:
            answer = client.get_inference_statistics(name, version, headers=self._headers)
        return tuple(_statistics(each) for each in answer.get("model_stats", ()))

    def model_config(self, name: str, version: str, timeout_s: float) -> Config:
        """Return the config that the server runs a model with."""
        with self._call(f"configuration of {name}", timeout_s) as client:
            answer = client.get_model_config(name, version, headers=self._headers)
        return json_format.ParseDict(answer, model_config_pb2.ModelConfig(), ignore_unknown_fields=True)

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        """Say whether a version is ready."""
        with self._call(f"readiness of {name}", timeout_s) as client:
            return bool(client.is_model_ready(name, version, headers=self._headers))

    def infer(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        outputs: Sequence[str] | None,
        timeout_s: float,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one inference."""
        wanted = None if outputs is None else [triton.InferRequestedOutput(output) for output in outputs]
        tensors = request_inputs(triton, inputs)
        with self._call(f"inference on {name}", timeout_s) as client:
            result = client.infer(name, tensors, model_version=version, outputs=wanted, headers=self._headers)
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()


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
    )


def _tls_context(endpoint: Endpoint, options: ClientOptions) -> Any:
    """Make the context that checks the server's certificate, and shows ours.

    Raises:
        UsageError: a certificate cannot be read.
    """
    try:
        context = gevent.ssl.create_default_context(cafile=options.root_certificates)
        if options.client_certificate is not None:
            context.load_cert_chain(options.client_certificate, options.client_key)
    except OSError as exc:
        raise UsageError(f"A certificate for {endpoint} cannot be read: {exc}") from exc
    return context
