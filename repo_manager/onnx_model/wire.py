"""Cut the large weights out of an ONNX file without parsing it, so only the graph is held in memory.

The protobuf wire format is walked by the field numbers of onnx.proto. A `raw_data` of at least `BLOB_BYTES` is
replaced by a short marker, and its place in the file is remembered. Everything else is kept byte for byte, unknown
fields too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from repo_manager.errors import ModelError

__all__ = ["BLOB_BYTES", "Blob", "cut_weights", "encode_unknown", "paste_weights"]

BLOB_BYTES = 4096
_MAX_DEPTH = 100  # nested messages: protobuf's default limit in C++ (protobuf.dev, "Proto Limits")

# kind of message -> {field number: kind of the nested message} (onnx.proto, IR version 14)
_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {},
}
_RAW_DATA = 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Blob:
    """Where a weight's bytes are in the model's file."""

    offset_bytes: int
    length_bytes: int


class _Cutter:
    def __init__(self, data: bytes | mmap.mmap, marker: bytes) -> None:
        self.data = data
        self.marker = marker
        self.blobs: dict[bytes, Blob] = {}

    def varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise _corrupt(position)

    def skip(self, wire_type: int, position: int, end: int) -> int:
        if wire_type == _VARINT:
            return self.varint(position, end)[1]
        step = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
        if step is None or position + step > end:  # ONNX does not use groups (3, 4)
            raise _corrupt(position)
        return position + step

    def rewrite(self, kind: str, start: int, end: int, depth: int) -> bytes:
        """Return the message in `[start, end)` with its large weights replaced by markers."""
        if depth > _MAX_DEPTH:
            raise ModelError(f"the graph is nested more than {_MAX_DEPTH} messages deep")
        nested = _NESTED[kind]
        out = bytearray()
        position = kept = start
        while position < end:
            field_start = position
            key, position = self.varint(position, end)
            if key & 7 != _LENGTH:
                position = self.skip(key & 7, position, end)
                continue
            length, position = self.varint(position, end)
            if length > end - position:
                raise _corrupt(position)
            body, position = position, position + length
            if length < BLOB_BYTES:
                continue
            if kind == "tensor" and key >> 3 == _RAW_DATA:
                replacement = b"%s%08x" % (self.marker, len(self.blobs))
                self.blobs[replacement] = Blob(body, length)
            elif key >> 3 in nested:
                replacement = self.rewrite(nested[key >> 3], body, position, depth + 1)
            else:
                continue
            out += self.data[kept:field_start]
            out += _varint_bytes(key) + _varint_bytes(len(replacement)) + replacement
            kept = position
        out += self.data[kept:end]
        return bytes(out)


def cut_weights(data: bytes | mmap.mmap, marker: bytes) -> tuple[bytes, dict[bytes, Blob]]:
    """Return a serialised `ModelProto` without its large weights, and where these are.

    Args:
        data: bytes of the whole file.
        marker: random bytes no tensor of the file can hold by accident. Each cut `raw_data` becomes the marker and a
            number, its key in the returned mapping.

    Raises:
        ModelError: the bytes are not a protobuf message, end too early, or are nested too deeply.
    """
    cutter = _Cutter(data, marker)
    return cutter.rewrite("model", 0, len(data), 0), cutter.blobs


def paste_weights(data: bytes, marker: bytes, lengths: Mapping[bytes, int]) -> list[bytes]:
    """Undo `cut_weights` on paper: return the pieces of the whole file in order, each weight by its key.

    Args:
        data: a serialised `ModelProto` in which a cut `raw_data` is `marker` and a number, its key.
        marker: the beginning of every key.
        lengths: how many bytes are behind each key.

    Returns:
        Pieces to write one after another. A key of `lengths` represents the weight's bytes.
    """
    return _paste("model", data, 0, len(data), marker, lengths)[0]


def _paste(
    kind: str, data: bytes, start: int, end: int, marker: bytes, lengths: Mapping[bytes, int]
) -> tuple[list[bytes], int]:
    """Return the pieces of one message, and their length in all."""
    cutter = _Cutter(data, marker)
    nested = _NESTED[kind]
    pieces: list[bytes] = []
    total = 0
    position = kept = start
    while position < end:
        field_start = position
        key, position = cutter.varint(position, end)
        if key & 7 != _LENGTH:
            position = cutter.skip(key & 7, position, end)
            continue
        length, position = cutter.varint(position, end)
        body, position = position, position + length
        number = key >> 3
        if kind == "tensor" and number == _RAW_DATA and data[body:position] in lengths:
            inner, size = [data[body:position]], lengths[data[body:position]]
        elif number in nested and data.find(marker, body, position) >= 0:
            inner, size = _paste(nested[number], data, body, position, marker, lengths)
        else:
            continue
        head = data[kept:field_start] + _varint_bytes(key) + _varint_bytes(size)
        pieces += [head, *inner]
        total += len(head) + size
        kept = position
    pieces.append(data[kept:end])
    return pieces, total + end - kept


def encode_unknown(fields: Iterable[Any]) -> bytes:
    """Encode a message's unknown fields (of a newer onnx.proto) as they were read. Groups are left out."""
    out = bytearray()
    for field in fields:
        tag = _varint_bytes(field.field_number << 3 | field.wire_type)
        if field.wire_type == _LENGTH:
            out += tag + _varint_bytes(len(field.data)) + field.data
        elif field.wire_type == _VARINT:
            out += tag + _varint_bytes(field.data)
        elif field.wire_type in (_FIXED64, _FIXED32):
            out += tag + int(field.data).to_bytes(8 if field.wire_type == _FIXED64 else 4, "little")
    return bytes(out)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _corrupt(position: int) -> ModelError:
    return ModelError(f"not a complete ONNX file: its protobuf encoding breaks off at byte {position}")
