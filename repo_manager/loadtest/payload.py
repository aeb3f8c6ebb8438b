"""Serialises requests once, so that the load loop only ever copies bytes."""

from __future__ import annotations

import json
import struct
import urllib.parse

import numpy as np

from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs import Array, Sample
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.target import TargetFacts
from repo_manager.loadtest.wire import Endpoint
from repo_manager.optional import require

__all__ = ["build_endpoint", "raw_bytes"]

_GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def raw_bytes(array: Array) -> bytes:
    """Return Triton's binary form: little-endian elements in C order; BYTES as 4-byte lengths and contents."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def build_endpoint(facts: TargetFacts, samples: list[Sample], options: LoadTestOptions) -> Endpoint:
    """Return the endpoint with one prebuilt message a sample.

    Raises:
        UsageError: the model is decoupled or takes sequences, whose requests are no independent calls.
    """
    if facts.decoupled or facts.sequence:
        kind = "decoupled (several answers a request)" if facts.decoupled else "a sequence model"
        raise UsageError(f"the model {facts.model} is {kind}, which this load test cannot drive")
    types = {item.name: item.datatype for item in facts.inputs}
    host, port = options.address
    grpc = options.wire == "grpc"
    built = [_grpc_message(sample, types, options) if grpc else _http_body(sample, types) for sample in samples]
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
    return f"/v2/models/{urllib.parse.quote(options.model, safe='')}{version}/infer"


def _grpc_message(sample: Sample, types: dict[str, str], options: LoadTestOptions) -> tuple[bytes, int]:
    messages = require("tritonclient.grpc.service_pb2")
    request = messages.ModelInferRequest(
        model_name=options.model, model_version="" if options.version is None else str(options.version)
    )
    for name, array in sample.items():
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, types[name]
        tensor.shape.extend(array.shape)
        request.raw_input_contents.append(raw_bytes(array))
    return request.SerializeToString(), 0


def _http_body(sample: Sample, types: dict[str, str]) -> tuple[bytes, int]:
    raw = {name: raw_bytes(array) for name, array in sample.items()}
    document = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": types[name],
                "parameters": {"binary_data_size": len(raw[name])},
            }
            for name, array in sample.items()
        ],
        "parameters": {"binary_data_output": True},
    }
    header = json.dumps(document).encode()
    return header + b"".join(raw.values()), len(header)
