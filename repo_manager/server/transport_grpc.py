"""Triton over gRPC."""

from __future__ import annotations

import contextlib
import functools
import queue
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ServerError, ServerUnreachableError
from repo_manager.optional import deferred
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
from repo_manager.tls import grpc_pem

if TYPE_CHECKING:
    import numpy as np
    import tritonclient.grpc as triton
    import tritonclient.utils as triton_utils
else:
    triton = deferred("tritonclient.grpc")
    triton_utils = deferred("tritonclient.utils")

__all__ = ["GrpcTransport"]

# Triton answers UNAVAILABLE too (a model that is not ready); these are the words of gRPC itself.
_NO_CONNECTION = re.compile(
    r"failed to connect|connection (refused|reset|timed out|attempt timed out)|socket closed|goaway|no route|resolution"
    r"|handshake|broken pipe|endpoint closing|stream removed|ping timeout|transport|unreachable|recvmsg|sendmsg",
    re.IGNORECASE,
)


class GrpcTransport:
    """One gRPC channel to one server; safe to share between threads."""

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._headers = options.all_headers("grpc")
        pem = grpc_pem(options.tls)
        arguments: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # A proxy for the outside world is not on the way to a model server that was named.
            ("grpc.enable_http_proxy", 0),
        ]
        if options.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", options.server_name))
        credentials = triton.grpc.ssl_channel_credentials(**pem) if endpoint.tls else None
        self._connected = functools.partial(
            triton.InferenceServerClient, endpoint.address, creds=credentials, channel_args=arguments
        )
        self._client = self._connected()

    @contextlib.contextmanager
    def _call(self, what: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Give the arguments that every call takes, and translate its errors."""
        try:
            yield {"headers": self._headers, "client_timeout": timeout_s}
        except triton_utils.InferenceServerException as exc:
            raise self._translated(exc, what, timeout_s) from exc

    def _translated(self, exc: triton_utils.InferenceServerException, what: str, timeout_s: float) -> ServerError:
        status, reason = str(exc.status() or ""), str(exc.message() or exc).strip()
        if status.endswith("DEADLINE_EXCEEDED"):
            return ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:.3g} s: {what}")
        if status.endswith("UNAVAILABLE") and _NO_CONNECTION.search(reason):
            return out_of_reach(self._endpoint, what, reason)
        return refusal(self._endpoint, what, reason)

    def live(self, timeout_s: float) -> bool:
        """Say whether the server is alive."""
        with self._call("liveness", timeout_s) as arguments:
            return bool(self._client.is_server_live(**arguments))

    def ready(self, timeout_s: float) -> bool:
        """Say whether the server is ready."""
        with self._call("readiness", timeout_s) as arguments:
            return bool(self._client.is_server_ready(**arguments))

    def metadata(self, timeout_s: float) -> ServerMetadata:
        """Return the server's metadata."""
        with self._call("metadata", timeout_s) as arguments:
            answer = self._client.get_server_metadata(**arguments)
        return ServerMetadata(answer.name, answer.version, tuple(answer.extensions))

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        """Return the repository index."""
        with self._call("repository index", timeout_s) as arguments:
            answer = self._client.get_model_repository_index(**arguments)
        return tuple(
            IndexEntry(
                entry.name, int(entry.version) if entry.version else None, entry.state, without_stack(entry.reason)
            )
            for entry in answer.models
        )

    def load(self, name: str, config_json: str | None, timeout_s: float) -> None:
        """Load or reload a model."""
        with self._call(f"load {name}", timeout_s) as arguments:
            self._client.load_model(name, config=config_json, **arguments)

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None:
        """Unload a model; Triton answers before it is gone."""
        with self._call(f"unload {name}", timeout_s) as arguments:
            self._client.unload_model(name, unload_dependents=dependents, **arguments)

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions."""
        with self._call(f"statistics of {name}", timeout_s) as arguments:
            answer = self._client.get_inference_statistics(name, version, **arguments)
        return tuple(
            VersionStatistics(
                name=each.name,
                version=int(each.version),
                last_inference_ms=int(each.last_inference),
                inference_count=int(each.inference_count),
                execution_count=int(each.execution_count),
                success_count=int(each.inference_stats.success.count),
                fail_count=int(each.inference_stats.fail.count),
                success_ns=int(each.inference_stats.success.ns),
                queue_ns=int(each.inference_stats.queue.ns),
                compute_input_ns=int(each.inference_stats.compute_input.ns),
                compute_infer_ns=int(each.inference_stats.compute_infer.ns),
                compute_output_ns=int(each.inference_stats.compute_output.ns),
                fail_ns=int(each.inference_stats.fail.ns),
                cache_hit_count=int(each.inference_stats.cache_hit.count),
                batches={int(batch.batch_size): int(batch.compute_infer.count) for batch in each.batch_stats},
            )
            for each in answer.model_stats
        )

    def model_config(self, name: str, version: str, timeout_s: float) -> Config:
        """Return the config that the server runs a model with."""
        with self._call(f"configuration of {name}", timeout_s) as arguments:
            return self._client.get_model_config(name, version, **arguments).config

    def model_metadata(self, name: str, version: str, timeout_s: float) -> ModelMetadata:
        """Return what the server says of a model."""
        with self._call(f"metadata of {name}", timeout_s) as arguments:
            answer = self._client.get_model_metadata(name, version, **arguments)
        inputs, outputs = (
            tuple(TensorMetadata(tensor.name, tensor.datatype, tuple(map(int, tensor.shape))) for tensor in tensors)
            for tensors in (answer.inputs, answer.outputs)
        )
        return ModelMetadata(answer.name, tuple(answer.versions), answer.platform, inputs, outputs)

    def register_memory(self, name: str, key: str, size_bytes: int, timeout_s: float) -> None:
        """Let the server map POSIX shared memory."""
        with self._call(f"register shared memory {name}", timeout_s) as arguments:
            self._client.register_system_shared_memory(name, key, size_bytes, **arguments)

    def unregister_memory(self, name: str, timeout_s: float) -> None:
        """Let the server forget a region."""
        with self._call(f"unregister shared memory {name}", timeout_s) as arguments:
            self._client.unregister_system_shared_memory(name, **arguments)

    def registered_memory(self, timeout_s: float) -> tuple[str, ...]:
        """Return the names of the regions that the server maps."""
        with self._call("regions of shared memory", timeout_s) as arguments:
            return tuple(self._client.get_system_shared_memory_status(**arguments).regions)

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        """Say whether a version is ready."""
        with self._call(f"readiness of {name}", timeout_s) as arguments:
            return bool(self._client.is_model_ready(name, version, **arguments))

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
        wanted = None if outputs is None else [triton.InferRequestedOutput(output) for output in outputs]
        tensors = request_inputs(triton, inputs)
        with self._call(f"inference on {name}", timeout_s) as arguments:
            result = self._client.infer(
                name, tensors, model_version=version, outputs=wanted, **options.arguments(), **arguments
            )
        return _outputs_of(result)

    def stream(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        options: RequestOptions,
        timeout_s: float,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Send one request and yield its responses until the final one.

        Each call has a connection of its own: Triton's client library keeps at most one stream a client.
        """
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        deadline = time.monotonic() + timeout_s
        tensors = request_inputs(triton, inputs)
        client = self._connected()
        try:
            with self._call(f"inference on {name}", timeout_s):
                client.start_stream(
                    lambda result, error: answers.put((result, error)), headers=self._headers, stream_timeout=timeout_s
                )
                client.async_stream_infer(
                    name,
                    tensors,
                    model_version=version,
                    enable_empty_final_response=True,
                    **options.arguments(),
                )
            yield from self._until_final(answers, f"inference on {name}", deadline, timeout_s)
        finally:
            client.stop_stream(cancel_requests=True)
            client.close()

    def _until_final(
        self, answers: queue.SimpleQueue[tuple[Any, Any]], what: str, deadline: float, timeout_s: float
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        while True:
            try:
                result, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ServerUnreachableError(
                    f"{self._endpoint} sent no final response within {timeout_s:.3g} s: {what}"
                ) from None
            if error is not None:
                raise self._translated(error, what, timeout_s) from error
            response = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            if response.outputs or not final:
                yield _outputs_of(result)
            if final:
                return

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


def _outputs_of(result: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
