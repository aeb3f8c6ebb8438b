"""What the server says about itself and the model: metadata, configuration, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from repo_manager.loadtest.ask import Call, grpc_call, http_call
from repo_manager.loadtest.options import LoadTestOptions

__all__ = ["InputFacts", "ModelStatistics", "Target", "TargetFacts", "connect"]

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
    return Target(options, grpc_call(options) if options.wire == "grpc" else http_call(options))
