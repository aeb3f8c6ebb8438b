"""Write a model to disk: one file, or one file and its external data. One weight at a time.

The written form is an outline, a model whose large weights are short markers, and a way to get each weight's bytes. So
the peak is one weight beside the caller's own memory. A draft holds nothing: its weights are read when their turn
comes. Above protobuf's 2 GB the weights go to a second file, as ONNX external data.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf import unknown_fields  # type: ignore[import-untyped]  # published without stubs
from google.protobuf.message import Message  # type: ignore[import-untyped]  # published without stubs

from repo_manager.errors import ModelError
from repo_manager.files import fsync_directory, work_folder
from repo_manager.onnx_model import dtypes
from repo_manager.onnx_model.draft import Draft, Weight
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import is_external
from repo_manager.onnx_model.wire import encode_unknown, paste_weights
from repo_manager.triton_messages import is_repeated
from repo_manager.types import StrPath

__all__ = ["WeightPlace", "WrittenModel", "save_model", "write_draft", "write_view"]

PROTOBUF_LIMIT_BYTES = 2**31 - 1
_MARGIN_BYTES = 1 << 20  # for lengths known only during the write
_ALIGNMENT_BYTES = 4096  # alignment of external data: a runtime can map each weight
_KEPT_BYTES = 1024  # smaller weights stay in the graph for shape inference
_HOLDERS = {
    f"onnx.{name}"
    for name in ("ModelProto", "GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TrainingInfoProto")
}


@dataclass(frozen=True)
class WeightPlace:
    """Where a weight's bytes are."""

    file: Path
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class WrittenModel:
    """The files of a written model, model file first, and where the large weights of the main graph are in them."""

    files: tuple[Path, ...]
    places: dict[str, WeightPlace] = field(repr=False)


def save_model(proto: onnx.ModelProto, path: StrPath, *, external: bool | None = None) -> tuple[Path, ...]:
    """Write a model. A reader never sees a half-written .onnx file.

    Args:
        proto: the whole model, its external data loaded, not changed.
        path: the .onnx file to create or replace. Its folder must exist.
        external: put the weights into `<path>.data` beside it. `None` does so above 2 GB only.

    Returns:
        The files written, the model first.

    Raises:
        ModelError: `external=False` for a model above 2 GB, or a tensor's external data is not loaded.
        OSError: the disk is full or the folder not writable. Nothing is left over then.
    """
    path = Path(path)
    for tensor in tensors_of(proto):
        if is_external(tensor):
            raise ModelError(f"{path}: the external data of tensor '{tensor.name}' is not loaded")
    outline = _outline_of_model(proto)
    if external is None:
        external = outline.size_bytes > PROTOBUF_LIMIT_BYTES
    elif not external and outline.size_bytes > PROTOBUF_LIMIT_BYTES:
        raise ModelError(f"{path}: the model is above 2 GB", hint="Save it with external data.")
    data_path = path.with_name(path.name + ".data")
    with work_folder(f".{path.name}.", path.parent) as folder:
        temporary, data_temporary = folder / path.name, folder / data_path.name
        if external:
            with data_temporary.open("wb") as data_file:
                outline.write_external(data_file, data_path)
                _sync(data_file)
        with temporary.open("wb") as file:
            outline.write(file, path)
            _sync(file)
        if external:
            data_temporary.replace(data_path)
        temporary.replace(path)
    fsync_directory(path.parent)
    return (path, data_path) if external else (path,)


def write_draft(draft: Draft, path: Path, *, limit_bytes: int = PROTOBUF_LIMIT_BYTES) -> WrittenModel:
    """Write `path`, and `path` + `.data` beside it when the model exceeds `limit_bytes`.

    For a folder of one's own: nothing is synchronised to disk, and an error leaves a part of the file behind.

    Args:
        draft: the model as a float32 draft.
        path: the model's file. Replaced when there.
        limit_bytes: the most one file may hold before the weights move out of it.

    Raises:
        OSError: the disk is full, read-only, ...
        ModelError: a weight of the source can no longer be read.
    """
    outline = _outline_of_draft(draft)
    files = [path]
    if outline.size_bytes > limit_bytes:
        data_path = path.with_name(path.name + ".data")
        files.append(data_path)
        with data_path.open("wb") as data_file:
            outline.write_external(data_file, data_path)
    with path.open("wb") as file:
        outline.write(file, path)
    return WrittenModel(tuple(files), outline.places)


def write_view(draft: Draft, written: WrittenModel, path: Path) -> None:
    """Write a small model beside a written one, whose weights it refers to and does not copy.

    Args:
        draft: shares weights, by name, with the written one. Further ones are stored inside.
        written: the written model. The view refers to its files, so they have to stay.
        path: in the folder of `written`.
    """
    outline = _outline_of_draft(draft, written.places)
    with path.open("wb") as file:
        outline.write(file, path)


@dataclass(frozen=True)
class _Payload:
    """The bytes of one large weight."""

    name: str
    length_bytes: int
    load: Callable[[], bytes | memoryview]


class _Outline:
    """A model whose large weights are markers, and their bytes."""

    def __init__(self) -> None:
        self.proto = onnx.ModelProto()
        self.marker = b"repo-manager:write:" + secrets.token_bytes(16)
        self.payloads: dict[bytes, _Payload] = {}
        self.places: dict[str, WeightPlace] = {}

    @property
    def size_bytes(self) -> int:
        """How large the whole model is in one file, at most."""
        rest = int(self.proto.ByteSize()) + _MARGIN_BYTES
        return rest + sum(payload.length_bytes + 64 for payload in self.payloads.values())

    def add(self, tensor: onnx.TensorProto, length_bytes: int, load: Callable[[], bytes | memoryview]) -> None:
        """Mark a tensor of the outline whose bytes come when it is written."""
        key = b"%s%08x" % (self.marker, len(self.payloads))
        self.payloads[key] = _Payload(tensor.name, length_bytes, load)
        tensor.raw_data = key

    def write_external(self, file: BinaryIO, path: Path) -> None:
        """Write the weights into `file`, the later `path`, and let the outline refer to them."""
        for tensor in tensors_of(self.proto):
            payload = self.payloads.pop(tensor.raw_data, None)
            if payload is not None:
                file.write(bytes(-file.tell() % _ALIGNMENT_BYTES))
                place = self.places[payload.name] = WeightPlace(path, file.tell(), payload.length_bytes)
                file.write(payload.load())
                tensor.ClearField("raw_data")
                _point_to(tensor, place)

    def write(self, file: BinaryIO, path: Path) -> None:
        """Write the model's file, the later `path`, with the weights not external."""
        lengths = {key: payload.length_bytes for key, payload in self.payloads.items()}
        for piece in paste_weights(self.proto.SerializeToString(), self.marker, lengths):
            payload = self.payloads.get(piece)
            if payload is None:
                file.write(piece)
            else:
                self.places[payload.name] = WeightPlace(path, file.tell(), payload.length_bytes)
                file.write(payload.load())


def _point_to(tensor: onnx.TensorProto, place: WeightPlace) -> None:
    """Make a tensor without values refer to bytes in another file of its folder (ONNX external data)."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": place.file.name, "offset": place.offset_bytes, "length": place.length_bytes}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def _outline_of_draft(draft: Draft, places: dict[str, WeightPlace] | None = None) -> _Outline:
    """Mark a draft's weights. Those with a place already are referred to there."""
    outline = _Outline()
    outline.proto.CopyFrom(draft.proto)
    for name, weight in draft.weights.items():
        tensor = outline.proto.graph.initializer.add()
        if weight.tensor is not None:  # a type stored unchanged, under its (possibly new) name
            tensor.CopyFrom(weight.tensor)
            tensor.name = name
            continue
        tensor.name, tensor.data_type = name, weight.data_type
        tensor.dims.extend(weight.shape)
        length = _payload_bytes(weight)
        place = (places or {}).get(name)
        if place is not None:
            _point_to(tensor, place)
        elif length < _KEPT_BYTES:
            tensor.raw_data = bytes(_little_endian(weight))
        else:
            outline.add(tensor, length, functools.partial(_little_endian, weight))
    return outline


def _payload_bytes(weight: Weight) -> int:
    dtype = dtypes.numpy_dtype(weight.data_type, "a weight")
    return weight.size * (dtype.itemsize if dtype is not None else 1)


def _little_endian(weight: Weight) -> memoryview:
    array = np.ascontiguousarray(weight.load())
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _outline_of_model(proto: onnx.ModelProto) -> _Outline:
    outline = _Outline()
    _copy(proto, outline.proto, outline)
    return outline


def _copy(source: Message, target: Message, outline: _Outline) -> None:
    """Copy a message, its large tensors as markers.

    Sparse tensors stay inline: ONNX Runtime reads their parts from the model's file only.
    """
    for descriptor, value in source.ListFields():
        kind = descriptor.message_type.full_name if descriptor.message_type is not None else ""
        repeated = is_repeated(descriptor)
        if kind not in _HOLDERS and kind != "onnx.TensorProto":
            if repeated:
                getattr(target, descriptor.name).extend(value)
            elif kind:
                getattr(target, descriptor.name).CopyFrom(value)
            else:
                setattr(target, descriptor.name, value)
            continue
        for item in value if repeated else [value]:
            copy = getattr(target, descriptor.name).add() if repeated else getattr(target, descriptor.name)
            copy.SetInParent()
            if kind == "onnx.TensorProto":
                _copy_tensor(item, copy, outline)
            elif kind == "onnx.NodeProto" and not _holds_tensors(item):
                copy.CopyFrom(item)
            else:
                _copy(item, copy, outline)
    _copy_unknown(source, target)


def _holds_tensors(node: onnx.NodeProto) -> bool:
    return any(a.HasField("t") or a.HasField("g") or a.tensors or a.graphs for a in node.attribute)


def _copy_unknown(source: Message, target: Message) -> None:
    unknown = encode_unknown(unknown_fields.UnknownFieldSet(source))
    if unknown:
        target.MergeFromString(unknown)


def _copy_tensor(source: onnx.TensorProto, target: onnx.TensorProto, outline: _Outline) -> None:
    if not source.HasField("raw_data") or len(source.raw_data) < _KEPT_BYTES:
        target.CopyFrom(source)
        return
    for descriptor, value in source.ListFields():
        if descriptor.name == "raw_data":
            continue
        if is_repeated(descriptor):
            getattr(target, descriptor.name).extend(value)
        else:
            setattr(target, descriptor.name, value)
    outline.add(target, len(source.raw_data), lambda: source.raw_data)
    _copy_unknown(source, target)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
