"""Triton over gRPC."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import queue
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ServerError, ServerUnreachableError
from repo_manager.optional import deferred
from repo_manager.server.answers import (
    array_of,
    out_of_reach,
    reading,
    refusal,
    request_inputs,
    several,
    version_of,
    without_stack,
)
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
)
from repo_manager.sockets import Deputies
from repo_manager.tls import grpc_pem

if TYPE_CHECKING:
    import numpy as np
    import tritonclient.grpc as triton
    import tritonclient.utils as triton_utils
else:
    triton = deferred("tritonclient.grpc")
    triton_utils = deferred("tritonclient.utils")

__all__ = ["GrpcTransport"]

# gRPC's own messages. Triton also answers UNAVAILABLE, for a model not ready.
_NO_CONNECTION = re.compile(
    r"failed to connect|connection (refused|reset|timed out|attempt timed out)|socket closed|goaway|no route|resolution"
    r"|errors resolving|address lookup|handshake|broken pipe|endpoint closing|stream removed|ping timeout|transport"
    r"|unreachable|recvmsg|sendmsg",
    re.IGNORECASE,
)
# gRPC's message for a call on a closing connection. The server never saw this call and still finishes accepted calls
# (RFC 9113, 6.8, GOAWAY), so a resend is safe.
_NOT_TAKEN = "goaway received"
_RESENDS = 2
_GRACE_S = 0.25  # time after a call's own deadline before it is given up
_END_S = 1.0  # longest wait for the end of a stream
_SERVICE = "inference.GRPCInferenceService"
_LIMITS = json.dumps(
    {
        "methodConfig": [
            {"name": [{"service": _SERVICE}], "maxResponseMessageBytes": ANSWER_BYTES},
            {"name": [{"service": _SERVICE, "method": "ModelInfer"}], "maxResponseMessageBytes": INFERENCE_BYTES},
        ]
    }
)


class GrpcTransport:
    """One gRPC channel to one server. Safe to share between threads."""

    def __init__(self, endpoint: ServerUrl, options: ClientOptions) -> None:
        self._endpoint = endpoint
        self._headers = options.all_headers("grpc")
        pem = grpc_pem(options.tls)
        arguments: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", INFERENCE_BYTES),
            ("grpc.service_config", _LIMITS),
            # Proxies lead to the internet, not to a model server given by address.
            ("grpc.enable_http_proxy", 0),
            # gRPC retries without pause or limit if a server closes each connection at once, and takes 200 MB more each
            # second. `_ask` retries instead.
            ("grpc.enable_retries", 0),
        ]
        if options.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", options.server_name))
        credentials = triton.grpc.ssl_channel_credentials(**pem) if endpoint.tls else None
        self._connected = functools.partial(
            triton.InferenceServerClient, endpoint.address, creds=credentials, channel_args=arguments
        )
        self._client = self._connected()
        self._deputies = Deputies()
        # gRPC logs a traceback for each answer that is no protobuf message. Our error reports it.
        logging.getLogger("grpc._common").setLevel(logging.CRITICAL)

    def _ask(self, what: str, timeout_s: float, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call the server, and translate errors.

        Raises:
            ServerUnreachableError: no answer within `timeout_s`, or no connection.
            ServerRefusedError: the server answers with an error, or with no valid answer.
        """
        end = time.monotonic() + timeout_s

        def act() -> Any:
            left_s = max(0.001, end - time.monotonic())
            return call(*given, headers=self._headers, client_timeout=left_s, **named)

        with self._translating(what, timeout_s):
            for _ in range(_RESENDS):
                try:
                    return self._deputies.call(act, end + _GRACE_S - time.monotonic())
                except triton_utils.InferenceServerException as exc:
                    if _NOT_TAKEN not in str(exc.message()).lower():
                        raise
            return self._deputies.call(act, end + _GRACE_S - time.monotonic())

    @contextlib.contextmanager
    def _translating(self, what: str, timeout_s: float) -> Iterator[None]:
        """Translate the errors of the client library, and whatever breaks on an answer."""
        with reading(self._endpoint, what):
            try:
                yield
            except TimeoutError as exc:
                raise self._late(what, timeout_s) from exc
            except triton_utils.InferenceServerException as exc:
                raise self._translated(exc, what, timeout_s) from exc

    def _late(self, what: str, timeout_s: float) -> ServerUnreachableError:
        return ServerUnreachableError(f"{self._endpoint} did not answer within {timeout_s:.3g} s: {what}")

    def _translated(self, exc: triton_utils.InferenceServerException, what: str, timeout_s: float) -> ServerError:
        status, reason = str(exc.status() or ""), str(exc.message() or exc).strip()
        if status.endswith("DEADLINE_EXCEEDED"):
            return self._late(what, timeout_s)
        if status.endswith("UNAVAILABLE") and _NO_CONNECTION.search(reason):
            return out_of_reach(self._endpoint, what, reason)
        return refusal(self._endpoint, what, reason)

    def live(self, timeout_s: float) -> bool:
        """Return whether the server is alive."""
        return bool(self._ask("liveness", timeout_s, self._client.is_server_live))

    def ready(self, timeout_s: float) -> bool:
        """Return whether the server is ready."""
        return bool(self._ask("readiness", timeout_s, self._client.is_server_ready))

    def metadata(self, timeout_s: float) -> ServerMetadata:
        """Return the server's metadata."""
        answer = self._ask("metadata", timeout_s, self._client.get_server_metadata)
        with reading(self._endpoint, "metadata"):
            return ServerMetadata(answer.name, answer.version, tuple(several(answer.extensions)))

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        """Return the repository index."""
        answer = self._ask("repository index", timeout_s, self._client.get_model_repository_index)
        with reading(self._endpoint, "repository index"):
            return tuple(
                IndexEntry(entry.name, version_of(entry.version), entry.state, without_stack(entry.reason))
                for entry in several(answer.models)
            )

    def load(self, name: str, config_json: str | None, files: Mapping[str, bytes], timeout_s: float) -> None:
        """Load or reload a model, as `Transport.load`."""
        given = {f"file:{place}": content for place, content in files.items()}
        self._ask(f"load {name}", timeout_s, self._client.load_model, name, config=config_json, files=given or None)

    def unload(self, name: str, dependents: bool, timeout_s: float) -> None:
        """Unload a model, as `Transport.unload`. Triton answers before it is gone."""
        self._ask(f"unload {name}", timeout_s, self._client.unload_model, name, unload_dependents=dependents)

    def statistics(self, name: str, version: str, timeout_s: float) -> tuple[VersionStatistics, ...]:
        """Return the counters of the loaded versions, as `Transport.statistics`."""
        answer = self._ask(f"statistics of {name}", timeout_s, self._client.get_inference_statistics, name, version)
        with reading(self._endpoint, f"statistics of {name}"):
            return tuple(
                VersionStatistics(
                    name=each.name,
                    version=version_of(each.version) or 0,
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
                for each in several(answer.model_stats)
            )

    def model_config(self, name: str, version: str, timeout_s: float) -> Config:
        """Return the config the server runs a model with, as `Transport.model_config`."""
        return self._ask(f"configuration of {name}", timeout_s, self._client.get_model_config, name, version).config

    def model_metadata(self, name: str, version: str, timeout_s: float) -> ModelMetadata:
        """Return the server's word on a model, as `Transport.model_metadata`."""
        answer = self._ask(f"metadata of {name}", timeout_s, self._client.get_model_metadata, name, version)
        with reading(self._endpoint, f"metadata of {name}"):
            inputs, outputs = (
                tuple(
                    TensorMetadata(each.name, each.datatype, tuple(map(int, each.shape))) for each in several(tensors)
                )
                for tensors in (answer.inputs, answer.outputs)
            )
            versions = tuple(str(version_of(version)) for version in several(answer.versions))
            return ModelMetadata(answer.name, versions, answer.platform, inputs, outputs)

    def register_memory(self, name: str, key: str | CudaHandle, size_bytes: int, timeout_s: float) -> None:
        """Let the server map POSIX shared memory, or memory of a GPU, as `Transport.register_memory`."""
        what = f"register shared memory {name}"
        if isinstance(key, CudaHandle):
            handle = base64.b64encode(key.raw)
            register = self._client.register_cuda_shared_memory
            self._ask(what, timeout_s, register, name, handle, key.device, size_bytes)
        else:
            self._ask(what, timeout_s, self._client.register_system_shared_memory, name, key, size_bytes)

    def unregister_memory(self, name: str, kind: MemoryKind, timeout_s: float) -> None:
        """Let the server forget a region, as `Transport.unregister_memory`."""
        of_kind = {
            "system": self._client.unregister_system_shared_memory,
            "cuda": self._client.unregister_cuda_shared_memory,
        }
        self._ask(f"unregister shared memory {name}", timeout_s, of_kind[kind], name)

    def registered_memory(self, kind: MemoryKind, timeout_s: float) -> tuple[str, ...]:
        """Return the names of the regions the server maps, as `Transport.registered_memory`."""
        of_kind = {
            "system": self._client.get_system_shared_memory_status,
            "cuda": self._client.get_cuda_shared_memory_status,
        }
        return tuple(self._ask("regions of shared memory", timeout_s, of_kind[kind]).regions)

    def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        """Return whether a version is ready, as `Transport.model_ready`."""
        return bool(self._ask(f"readiness of {name}", timeout_s, self._client.is_model_ready, name, version))

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
        wanted = None if outputs is None else [triton.InferRequestedOutput(output) for output in outputs]
        tensors = request_inputs(triton, inputs)
        what = f"inference on {name}"
        result = self._ask(
            what,
            timeout_s,
            self._client.infer,
            name,
            tensors,
            model_version=version,
            outputs=wanted,
            **options.arguments(),
        )
        with reading(self._endpoint, what):
            return _outputs_of(result)

    def stream(
        self,
        name: str,
        version: str,
        requests: Iterable[StreamRequest],
        timeout_s: float,
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Send requests on one stream, one after another, and yield every response, as `Transport.stream`.

        The stream has a connection of its own: Triton's client library keeps at most one stream a client.
        """
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        what = f"inference on {name}"
        client = self._connected()
        room = INFERENCE_BYTES

        def take(result: Any, error: Any) -> None:
            nonlocal room
            room -= 0 if result is None else result.get_response().ByteSize()
            if room < 0:
                result, error = None, triton_utils.InferenceServerException(f"more than {INFERENCE_BYTES >> 20} MiB")
            answers.put((result, error))

        try:
            with self._translating(what, timeout_s):
                client.start_stream(take, headers=self._headers)
            for request in requests:
                room = INFERENCE_BYTES
                deadline = time.monotonic() + timeout_s
                tensors = request_inputs(triton, request.inputs)
                arguments = request.options.arguments()
                with self._translating(what, timeout_s):
                    client.async_stream_infer(
                        name, tensors, model_version=version, enable_empty_final_response=True, **arguments
                    )
                yield from self._until_final(answers, what, deadline, timeout_s)
        finally:
            with contextlib.suppress(TimeoutError):  # a flooding stream does not stop when asked
                self._deputies.call(lambda: client.stop_stream(cancel_requests=True), _END_S)
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
                with reading(self._endpoint, what):
                    outputs = _outputs_of(result)
                yield outputs
            if final:
                return

    def close(self) -> None:
        """Close the channel."""
        self._deputies.close()
        self._client.close()


def _outputs_of(result: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {output.name: array_of(output.name, result) for output in result.get_response().outputs}
