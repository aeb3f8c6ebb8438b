"""Serialises requests once, so the load loop only ever copies bytes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import urllib.parse
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs.shared_memory import Area, Placement
from repo_manager.loadtest.options import LoadTestOptions, Parameter
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.wire.sequences import DEFAULT_LENGTH, FIRST_ID, SequencePlan, drawn_lengths, encoded_id
from repo_manager.optional import require
from repo_manager.request_data.tensors import Sample, raw_bytes

__all__ = ["build_endpoint"]

_GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_GRPC_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_HTTP_PARAMETERS = {"binary_data_output": True}


def build_endpoint(
    facts: ServedModelFacts,
    samples: list[Sample],
    options: LoadTestOptions,
    placement: Placement | None = None,
    *,
    streams: Sequence[Sequence[int]] = (),
) -> Endpoint:
    """Return the endpoint with one prebuilt message a sample.

    Args:
        facts: the model's inputs, outputs and limits, as the server reports them.
        samples: input name -> array of each request. The messages keep this order.
        options: give address, protocol, headers, compression and time-out.
        placement: where the tensors are in shared memory. `None` puts them into the messages.
        streams: recorded sequences, each the numbers of its samples. Of a sequence model only.

    Raises:
        UsageError: the model is decoupled and the protocol HTTP, or takes sequences and the batch size is above 1.
    """
    _check_kind(facts, options)
    types = {item.name: item.datatype for item in facts.inputs}
    host, port = options.address
    grpc = options.wire == "grpc"
    places = [_Places.of(placement, number) for number in range(len(samples))]
    built = [
        _grpc_message(sample, types, options, place, marks_final=facts.decoupled and _keeps_streams(facts, options))
        if grpc
        else _http_body(sample, types, options, place, in_sequence=facts.sequence)
        for sample, place in zip(samples, places, strict=True)
    ]
    return Endpoint(
        host=host,
        port=port,
        authority=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        path=_grpc_path(facts, options) if grpc else _http_path(options),
        headers=(*_compression_headers(options), *((name.lower(), value) for name, value in options.headers.items())),
        messages=tuple(_compressed(message, options.compression) for message, _ in built),
        json_bytes=tuple(size for _, size in built),
        timeout_ns=round(options.timeout_s * 1e9),
        protocol=options.wire,
        tls=options.tls,
        sequences=_sequences(facts, options, len(samples), streams) if facts.sequence else None,
        decoupled=facts.decoupled,
        keeps_streams=_keeps_streams(facts, options),
        is_compressed=grpc and options.compression != "none",
    )


def _keeps_streams(facts: ServedModelFacts, options: LoadTestOptions) -> bool:
    """Return whether the calls are streams of one request after another."""
    return options.wire == "grpc" and (facts.decoupled if options.streaming is None else options.streaming)


def _grpc_path(facts: ServedModelFacts, options: LoadTestOptions) -> str:
    return _GRPC_STREAM if facts.decoupled or _keeps_streams(facts, options) else _GRPC_METHOD


def _compressed(message: bytes, compression: str) -> bytes:
    if compression == "none":
        return message
    return gzip.compress(message, mtime=0) if compression == "gzip" else zlib.compress(message)


def _compression_headers(options: LoadTestOptions) -> tuple[tuple[str, str], ...]:
    if options.compression == "none":
        return ()
    if options.wire == "grpc":
        return (("grpc-encoding", options.compression),)
    return (("content-encoding", options.compression), ("accept-encoding", options.compression))


def _check_kind(facts: ServedModelFacts, options: LoadTestOptions) -> None:
    if facts.decoupled and options.wire == "http":
        raise UsageError(
            f"the model {facts.model} is decoupled: Triton sends its responses, any number a request, over gRPC only",
            hint="Give a grpc:// URL.",
        )
    if facts.sequence and options.compression != "none":
        raise UsageError("requests of sequences differ in their correlation IDs and cannot be compressed in advance")
    if facts.sequence and options.batch_size > 1:
        raise UsageError(
            f"the model {facts.model} takes sequences, whose requests hold one sample each; the batch size is "
            f"{options.batch_size}"
        )


def _sequences(
    facts: ServedModelFacts, options: LoadTestOptions, messages: int, streams: Sequence[Sequence[int]]
) -> SequencePlan:
    """Return the material of the sequences: recorded ones, or lengths in rotation."""
    grpc = options.wire == "grpc"
    build = _grpc_sequence_parts if grpc else _http_sequence_parts
    no, yes = (
        (build(options, is_first, False, as_text=facts.text_id), build(options, is_first, True, as_text=facts.text_id))
        for is_first in (False, True)
    )
    lengths = drawn_lengths(options.sequence_length or DEFAULT_LENGTH, options.seed)
    recorded = tuple(tuple(stream) for stream in streams) if options.sequence_length is None else ()
    return SequencePlan((no, yes), grpc and not facts.text_id, messages, recorded, () if recorded else lengths)


def _grpc_sequence_parts(
    options: LoadTestOptions, is_first: bool, is_last: bool, *, as_text: bool
) -> tuple[bytes, bytes]:
    """Return the bytes before and after the correlation ID. Protobuf merges consecutive messages."""
    messages = require("tritonclient.grpc.service_pb2")
    identity, flags = messages.ModelInferRequest(), messages.ModelInferRequest()
    if as_text:
        identity.parameters["sequence_id"].string_param = str(FIRST_ID)
    else:
        identity.parameters["sequence_id"].int64_param = FIRST_ID
    flags.parameters["sequence_start"].bool_param = is_first
    flags.parameters["sequence_end"].bool_param = is_last
    size = len(encoded_id(FIRST_ID, as_varint=not as_text))
    return identity.SerializeToString()[:-size], flags.SerializeToString()


def _http_sequence_parts(
    options: LoadTestOptions, is_first: bool, is_last: bool, *, as_text: bool
) -> tuple[bytes, bytes]:
    """Return the start of a body before and after the correlation ID. The next bytes begin with the inputs."""
    quote = b'"' if as_text else b""
    flags = {"sequence_start": is_first, "sequence_end": is_last, **_HTTP_PARAMETERS, **options.parameters}
    return b'{"parameters": {"sequence_id": ' + quote, quote + b", " + json.dumps(flags).encode()[1:] + b", "


def _http_path(options: LoadTestOptions) -> str:
    version = "" if options.version is None else f"/versions/{options.version}"
    return f"{options.path}/v2/models/{urllib.parse.quote(options.model, safe='')}{version}/infer"


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where one request's tensors are. `region` is empty when they travel in the message."""

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
    sample: Sample, types: dict[str, str], options: LoadTestOptions, places: _Places, *, marks_final: bool
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
    _set_parameters(request, options.parameters)
    if marks_final:
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, area in places.outputs.items():
        output = request.outputs.add()
        output.name = name
        _set_parameters(output, places.parameters(area))
    return request.SerializeToString(), 0


def _set_parameters(message: Any, parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        elif isinstance(value, bool):
            message.parameters[name].bool_param = value
        elif isinstance(value, float):
            message.parameters[name].double_param = value
        else:
            message.parameters[name].int64_param = value


def _http_body(
    sample: Sample, types: dict[str, str], options: LoadTestOptions, places: _Places, *, in_sequence: bool
) -> tuple[bytes, int]:
    """Return a body and the length of its JSON part. Of a sequence without its start, the part with the parameters."""
    raw = {name: b"" if name in places.inputs else raw_bytes(array) for name, array in sample.items()}
    document: dict[str, Any] = {
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
    }
    if not in_sequence:
        document["parameters"] = {**_HTTP_PARAMETERS, **options.parameters}
    if places.outputs:
        document["outputs"] = [
            {"name": name, "parameters": places.parameters(area)} for name, area in places.outputs.items()
        ]
    header = json.dumps(document).encode()[1 if in_sequence else 0 :]
    return header + b"".join(raw.values()), len(header)
