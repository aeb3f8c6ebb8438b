"""The server's word on itself and the model: metadata, configuration, statistics."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from repo_manager.errors import ServerRefusedError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, InputFacts, Sample
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import kind_of
from repo_manager.server.transport import CudaHandle, MemoryKind, ModelMetadata, RequestOptions, TensorMetadata

__all__ = ["DEPLOY_FIRST", "ModelStatistics", "ServedModel", "ServedModelFacts", "connect"]

DEPLOY_FIRST = "Deploy it first"
"""The beginning of the advice for a model not served."""
_STAGES = ("queue", "compute_input", "compute_infer", "compute_output", "success", "fail")
_TIMEOUT_S = 10.0
_DEEPEST = 16


@dataclasses.dataclass(frozen=True)
class ServedModelFacts:
    """The server and the model under load.

    Attributes:
        max_batch_size: 0 when the model has no batch axis of Triton's.
        response_cache: whether answers may come from the server's response cache.
        sequence: each request belongs to a sequence.
        decoupled: a request has any number of responses.
        text_id: the correlation ID is a string.
        parts: of an ensemble, the models it is made of, those of inner ensembles too.
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
    text_id: bool = False
    parts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelStatistics:
    """Counters since the model was loaded: nanoseconds, counts, executions by batch size.

    Attributes:
        parts: of an ensemble, the same of each model it is made of, anyone who asks it.
    """

    requests: int
    inferences: int
    executions: int
    failures: int
    cache_hits: int
    stage_ns: Mapping[str, int]
    batches: Mapping[int, int]
    parts: Mapping[str, ModelStatistics] = dataclasses.field(default_factory=dict)


class ServedModel:
    """One model on one server, asked by the client every other command uses."""

    def __init__(self, options: LoadTestOptions) -> None:
        self._options = options
        self._timeout_s = min(_TIMEOUT_S, options.timeout_s)
        self._client = TritonClient.connect(options.server_url, options.access)
        self._parts: dict[str, int | None] = {}  # composing model -> its version; `None`: the newest

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def facts(self) -> ServedModelFacts:
        """Return the server's word on itself and the model.

        Raises:
            ServerUnreachableError: no answer.
            ServerRefusedError: unknown model or version, or not ready.
        """
        options = self._options
        server = self._client.metadata(timeout_s=self._timeout_s)
        try:
            metadata = self._client.model_metadata(options.model, options.version, timeout_s=self._timeout_s)
            config = self._client.model_config(options.model, options.version, timeout_s=self._timeout_s)
            kind = kind_of(self._client, options.model, options.version, config=config)
        except ServerRefusedError as exc:
            raise ServerRefusedError(exc.message, hint=_hint(options)) from exc
        self._parts = self._parts_of(config, _DEEPEST)
        batch = int(config.max_batch_size)
        optional = {str(item.name) for item in config.input if item.optional}
        _require_types(metadata)
        return ServedModelFacts(
            url=options.url,
            protocol=options.wire,
            server=server.name,
            server_version=server.version,
            model=metadata.name,
            version=str(options.version or _newest(metadata.versions)),
            backend=str(config.backend or metadata.platform),
            max_batch_size=batch,
            inputs=tuple(_input(item, batch, optional) for item in metadata.inputs),
            outputs=tuple(item.name for item in metadata.outputs),
            response_cache=bool(config.response_cache.enable),
            dynamic_batching=config.HasField("dynamic_batching"),
            decoupled=kind.decoupled,
            sequence=kind.sequence,
            text_id=kind.text_id,
            parts=tuple(self._parts),
            output_facts=tuple(_input(item, batch, set()) for item in metadata.outputs),
        )

    def statistics(self) -> ModelStatistics:
        """Return the model's counters, summed over the answering versions.

        Raises:
            ServerError: as `facts`.
        """
        found = self._statistics(self._options.model, self._options.version)
        parts = {}
        for name, version in self._parts.items():
            with contextlib.suppress(ServerRefusedError):  # the statistics may be restricted, or the model was unloaded
                parts[name] = self._statistics(name, version)
        return dataclasses.replace(found, parts=parts)

    def _statistics(self, name: str, version: int | None) -> ModelStatistics:
        versions = self._client.statistics(name, version, timeout_s=self._timeout_s)
        batches: dict[int, int] = {}
        for each in versions:
            for size, count in each.batches.items():
                batches[size] = batches.get(size, 0) + count
        return ModelStatistics(
            requests=sum(each.success_count for each in versions),
            inferences=sum(each.inference_count for each in versions),
            executions=sum(each.execution_count for each in versions),
            failures=sum(each.fail_count for each in versions),
            cache_hits=sum(each.cache_hit_count for each in versions),
            stage_ns={stage: sum(getattr(each, f"{stage}_ns") for each in versions) for stage in _STAGES},
            batches=batches,
        )

    def _parts_of(self, config: Any, depth: int) -> dict[str, int | None]:
        """Return the models of an ensemble with the versions it asks for, those of inner ensembles too."""
        found: dict[str, int | None] = {}
        for step in config.ensemble_scheduling.step if depth else ():
            version = step.model_version if step.model_version > 0 else None
            found[step.model_name] = version
            with contextlib.suppress(ServerRefusedError):  # the configuration may be restricted
                inner = self._client.model_config(step.model_name, version, timeout_s=self._timeout_s)
                found |= self._parts_of(inner, depth - 1)
        return found

    def refusal(self, sample: Sample) -> str | None:
        """Send one request. Return why the model refuses it, `None` when it answers.

        Raises:
            ServerUnreachableError: no answer.
        """
        options = self._options
        parameters = RequestOptions(parameters=options.parameters)
        try:
            self._client.infer(options.model, options.version, sample, options=parameters, timeout_s=options.timeout_s)
        except ServerRefusedError as exc:
            return exc.message
        return None

    def register_memory(self, name: str, key: str | CudaHandle, size_bytes: int) -> None:
        """Let the server map memory as region `name`: POSIX shared memory by its key, or memory of a GPU.

        Args:
            name: name of the region on the server.
            key: key of the POSIX region, or handle of the GPU's memory.
            size_bytes: size of the memory in bytes.

        Raises:
            ServerError: it cannot, or is not allowed to.
        """
        self._client.register_memory(name, key, size_bytes, timeout_s=self._timeout_s)

    def unregister_memory(self, name: str, kind: MemoryKind = "system") -> None:
        """Let the server forget a region. Raises as `register_memory`."""
        self._client.unregister_memory(name, kind, timeout_s=self._timeout_s)

    def registered_memory(self, kind: MemoryKind = "system") -> tuple[str, ...]:
        """Return the names of the regions the server maps. Raises as `register_memory`."""
        return self._client.registered_memory(kind, timeout_s=self._timeout_s)


def _require_types(metadata: ModelMetadata) -> None:
    """Check whether requests can be made of all tensors' types.

    Raises:
        ServerRefusedError: a tensor's type cannot be sent.
    """
    for item in (*metadata.inputs, *metadata.outputs):
        if item.datatype not in NUMPY_OF_TRITON:
            raise ServerRefusedError(
                f"the server says that {item.name} of {metadata.name} is of type {item.datatype!r:.40}, which is none "
                f"of Triton's: {', '.join(NUMPY_OF_TRITON)}"
            )


def _newest(versions: Sequence[str]) -> str:
    return max(versions, key=lambda text: int(text) if text.isdigit() else -1, default="")


def _input(item: TensorMetadata, max_batch_size: int, optional: set[str]) -> InputFacts:
    shape = item.shape[1:] if max_batch_size > 0 else item.shape
    return InputFacts(item.name, item.datatype, shape, item.name in optional)


def _hint(options: LoadTestOptions) -> str:
    """Return the advice for a model not served."""
    # The control model of `compare --control` exists only if somebody added and deployed it.
    is_control = options.model.endswith(("__dense", "__noflag"))
    control = f"`add --control` makes it, `deploy {options.model}` serves it. " if is_control else ""
    version = f":{options.version}" if options.version else ""
    beside = " (--keep-previous leaves the served version loaded)" if version else ""
    return (
        f"{control}{DEPLOY_FIRST}: repo-manager deploy {options.model}{version}{beside}. "
        "What is served: repo-manager status; what there is: repo-manager list."
    )


def connect(options: LoadTestOptions) -> ServedModel:
    """Return a `ServedModel`, to be closed. Connects with the first question.

    Raises:
        UsageError: a certificate cannot be read.
    """
    return ServedModel(options)
