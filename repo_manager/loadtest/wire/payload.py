"""Serialises requests once, so that the load loop only ever copies bytes."""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs.shared_memory import Area, Placement
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.target import TargetFacts
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.optional import require
from repo_manager.request_data.tensors import Sample, raw_bytes

__all__ = ["build_endpoint"]

_GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def build_endpoint(
    facts: TargetFacts, samples: list[Sample], options: LoadTestOptions, placement: Placement | None = None
) -> Endpoint:
    """Return the endpoint with one prebuilt message a sample.

    Args:
        facts: the model.
        samples: inputs of each request.
        options: of the load test.
        placement: where the tensors lie in shared memory; `None` puts them into the messages.

    Raises:
        UsageError: the model is decoupled or takes sequences, whose requests are no independent calls.
    """
    if facts.decoupled or facts.sequence:
        kind = "decoupled (several answers a request)" if facts.decoupled else "a sequence model"
        raise UsageError(f"the model {facts.model} is {kind}, which this load test cannot drive")
    types = {item.name: item.datatype for item in facts.inputs}
    host, port = options.address
    grpc = options.wire == "grpc"
    places = [_Places.of(placement, number) for number in range(len(samples))]
    built = [
        _grpc_message(sample, types, options, place) if grpc else _http_body(sample, types, place)
        for sample, place in zip(samples, places, strict=True)
    ]
    return Endpoint(
        host=host,
        port=port,
        authority=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        path=_GRPC_METHOD if grpc else _http_path(options),
        headers=tuple((name.lower(), value) for name, value in options.headers.items()),
        messages=tuple(message for message, _ in built),
        json_bytes=tuple(size for _, size in built),
        timeout_ns=round(options.timeout_s * 1e9),
        protocol=options.wire,
        tls=options.tls,
    )


def _http_path(options: LoadTestOptions) -> str:
    version = "" if options.version is None else f"/versions/{options.version}"
    return f"{options.path}/v2/models/{urllib.parse.quote(options.model, safe='')}{version}/infer"


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where one request's tensors lie; `region` is empty when they travel in the message."""

    region: str
    inputs: Mapping[str, Area]
    outputs: Mapping[str, Area]

    @classmethod
    def of(cls, placement: Placement | None, number: int) -> _Places:
        if placement is None:
            return cls("", {}, {})
        outputs = placement.outputs[number] if placement.outputs else {}
        return cls(placement.region, placement.inputs[number], outputs)

    def parameters(self, area: Area) -> dict[str, str | int]:
        """As the protocol's extension for system shared memory names them."""
        return {
            "shared_memory_region": self.region,
            "shared_memory_offset": area.offset,
            "shared_memory_byte_size": area.size,
        }


def _grpc_message(
    sample: Sample, types: dict[str, str], options: LoadTestOptions, places: _Places
) -> tuple[bytes, int]:
    messages = require("tritonclient.grpc.service_pb2")
    request = messages.ModelInferRequest(
        model_name=options.model, model_version="" if options.version is None else str(options.version)
    )
    for name, array in sample.items():
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, types[name]
        tensor.shape.extend(array.shape)
        if name in places.inputs:
            _set_parameters(tensor, places.parameters(places.inputs[name]))
        else:
            request.raw_input_contents.append(raw_bytes(array))
    for name, area in places.outputs.items():
        output = request.outputs.add()
        output.name = name
        _set_parameters(output, places.parameters(area))
    return request.SerializeToString(), 0


def _set_parameters(tensor: Any, parameters: Mapping[str, str | int]) -> None:
    for name, value in parameters.items():
        if isinstance(value, str):
            tensor.parameters[name].string_param = value
        else:
            tensor.parameters[name].int64_param = value


def _http_body(sample: Sample, types: dict[str, str], places: _Places) -> tuple[bytes, int]:
    raw = {name: b"" if name in places.inputs else raw_bytes(array) for name, array in sample.items()}
    document = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": types[name],
                "parameters": places.parameters(places.inputs[name])
                if name in places.inputs
                else {"binary_data_size": len(raw[name])},
            }
            for name, array in sample.items()
        ],
        "parameters": {"binary_data_output": True},
    }
    if places.outputs:
        document["outputs"] = [
            {"name": name, "parameters": places.parameters(area)} for name, area in places.outputs.items()
        ]
    header = json.dumps(document).encode()
    return header + b"".join(raw.values()), len(header)
