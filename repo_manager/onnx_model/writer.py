"""Write a draft as an ONNX file, one weight at a time.

The file is laid out by the protobuf wire format's rules: a message's fields may come in any order, so the
graph's small part is written first and each initializer is appended to it. The peak is one weight, however
large the model. Above 2 GB, protobuf's limit, the weights go to a second file as ONNX external data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from repo_manager.onnx_model import dtypes
from repo_manager.onnx_model.draft import Draft, Weight

__all__ = ["Place", "WrittenModel", "write_draft", "write_view"]

PROTOBUF_LIMIT_BYTES = 2**31 - 1
_MARGIN_BYTES = 1 << 20  # for the parts that are sized only while writing
_ALIGNMENT_BYTES = 4096  # of external data, so that it can be mapped
_EXTERNAL_FLOOR_BYTES = 1024  # smaller weights stay in the file: shape inference reads them
_GRAPH_TAG, _INITIALIZER_TAG, _RAW_DATA_TAG = (7 << 3) | 2, (5 << 3) | 2, (9 << 3) | 2


@dataclass(frozen=True)
class Place:
    """Where a weight's bytes lie."""

    file: Path
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class WrittenModel:
    """The files of a written model, model file first, and where each weight's bytes lie in them."""

    files: tuple[Path, ...]
    places: dict[str, Place] = field(repr=False)


def write_draft(draft: Draft, path: Path, *, limit_bytes: int = PROTOBUF_LIMIT_BYTES) -> WrittenModel:
    """Write `path`, and `path` + `.data` beside it when the model exceeds `limit_bytes`.

    Args:
        draft: what to write.
        path: the model's file; replaced when there.
        limit_bytes: the most that one file may hold before the weights move out of it.

    Raises:
        OSError: the disk is full, read-only, ...
        ModelError: a weight of the source can no longer be read.
    """
    payload = sum(_payload_bytes(weight) for weight in draft.weights.values())
    if payload + draft.proto.ByteSize() + 256 * len(draft.weights) + _MARGIN_BYTES > limit_bytes:
        return _write_external(draft, path)
    return _write_single(draft, path)


def _payload_bytes(weight: Weight) -> int:
    if weight.tensor is not None:
        return int(weight.tensor.ByteSize())
    dtype = dtypes.numpy_dtype(weight.data_type, "a weight")
    return weight.size * (dtype.itemsize if dtype is not None else 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(name: str, weight: Weight) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=weight.data_type, dims=weight.shape)


def _stored(name: str, weight: Weight) -> onnx.TensorProto:
    """Return a weight of a type that is stored as it came, under its (possibly new) name."""
    tensor = onnx.TensorProto()
    if weight.tensor is not None:
        tensor.CopyFrom(weight.tensor)
    tensor.name = name
    return tensor


def _chunks(draft: Draft) -> Iterator[tuple[str, bytes, int]]:
    """Yield each weight's name, the bytes before its values, and how many bytes its values take (-1: none follow)."""
    for name, weight in draft.weights.items():
        if weight.tensor is not None:
            message = _stored(name, weight).SerializeToString()
            yield name, bytes([_INITIALIZER_TAG]) + _varint(len(message)) + message, -1
            continue
        length = _payload_bytes(weight)
        head = _header(name, weight).SerializeToString() + bytes([_RAW_DATA_TAG]) + _varint(length)
        yield name, bytes([_INITIALIZER_TAG]) + _varint(len(head) + length) + head, length


def _little_endian(weight: Weight) -> memoryview:
    array = np.ascontiguousarray(weight.load())
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write_single(draft: Draft, path: Path) -> WrittenModel:
    rest = onnx.ModelProto()
    rest.CopyFrom(draft.proto)
    rest.ClearField("graph")
    graph = draft.graph.SerializeToString()
    chunks = list(_chunks(draft))
    total = len(graph) + sum(len(head) + max(length, 0) for _, head, length in chunks)
    places: dict[str, Place] = {}
    with path.open("wb") as file:
        file.write(rest.SerializeToString() + bytes([_GRAPH_TAG]) + _varint(total) + graph)
        for name, head, length in chunks:
            file.write(head)
            if length >= 0:
                places[name] = Place(path, file.tell(), length)
                file.write(_little_endian(draft.weights[name]))
    return WrittenModel((path,), places)


def _write_external(draft: Draft, path: Path) -> WrittenModel:
    data_path = path.with_name(path.name + ".data")
    model = onnx.ModelProto()
    model.CopyFrom(draft.proto)
    places: dict[str, Place] = {}
    with data_path.open("wb") as data:
        for name, weight in draft.weights.items():
            if weight.tensor is not None:
                model.graph.initializer.append(_stored(name, weight))
                continue
            tensor = _header(name, weight)
            length = _payload_bytes(weight)
            if length < _EXTERNAL_FLOOR_BYTES:
                tensor.raw_data = _little_endian(weight).tobytes()
            else:
                places[name] = _append(data, data_path, weight, length)
                point_to(tensor, data_path.name, places[name])
            model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    return WrittenModel((path, data_path), places)


def _append(data: BinaryIO, data_path: Path, weight: Weight, length: int) -> Place:
    data.write(b"\0" * (-data.tell() % _ALIGNMENT_BYTES))
    place = Place(data_path, data.tell(), length)
    data.write(_little_endian(weight))
    return place


def write_view(draft: Draft, written: WrittenModel, path: Path) -> None:
    """Write a small model beside a written one, whose weights it refers to and does not copy.

    Args:
        draft: shares weights, by name, with the written one; further ones are stored inside.
        written: where the weights lie.
        path: in the folder of `written`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(draft.proto)
    for name, weight in draft.weights.items():
        place = written.places.get(name)
        if weight.tensor is not None:
            model.graph.initializer.append(_stored(name, weight))
            continue
        tensor = _header(name, weight)
        if place is not None and place.length_bytes >= _EXTERNAL_FLOOR_BYTES:
            point_to(tensor, place.file.name, place)
        else:
            tensor.raw_data = _little_endian(weight).tobytes()
        model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


def point_to(tensor: onnx.TensorProto, location: str, place: Place) -> None:
    """Make a tensor without values refer to bytes in another file (ONNX external data)."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(place.offset_bytes), "length": str(place.length_bytes)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
