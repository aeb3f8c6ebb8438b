"""Write a model to disk: one file, or one file and its external data."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import onnx
from google.protobuf import unknown_fields  # type: ignore[import-untyped]  # published without stubs
from google.protobuf.message import Message  # type: ignore[import-untyped]  # published without stubs

from repo_manager.errors import ModelError
from repo_manager.files import fsync_directory
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import is_external, payload_bytes
from repo_manager.onnx_model.wire import encode_unknown, paste_weights

__all__ = ["save_model"]

_INLINE_LIMIT_BYTES = 2_000_000_000  # below protobuf's 2^31 - 1, with room for the graph
_KEPT_TENSOR_BYTES = 1024  # smaller ones stay in the graph
_ALIGNMENT_BYTES = 4096  # so that a runtime can map each weight
_HOLDERS = {
    f"onnx.{name}"
    for name in ("ModelProto", "GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TrainingInfoProto")
}


def save_model(proto: onnx.ModelProto, path: Path, *, external: bool | None = None) -> tuple[Path, ...]:
    """Write a model; a reader never sees a half-written .onnx file.

    Args:
        proto: the whole model, its external data loaded; not changed.
        path: the .onnx file to create or replace; its folder must exist.
        external: put the weights into `<path>.data` beside it; `None` does so above 2 GB only.

    Returns:
        The files written, the model first.

    Raises:
        ModelError: `external=False` for a model above 2 GB, or a tensor's external data is not loaded.
        OSError: the disk is full or the folder not writable; nothing is left over then.
    """
    path = Path(path)
    size_bytes = 0
    for tensor in tensors_of(proto):
        if is_external(tensor):
            raise ModelError(f"{path}: the external data of tensor '{tensor.name}' is not loaded")
        if tensor.data_type != onnx.TensorProto.STRING:
            size_bytes += payload_bytes(tensor)
    if external is None:
        external = size_bytes > _INLINE_LIMIT_BYTES
    elif not external and size_bytes > _INLINE_LIMIT_BYTES:
        raise ModelError(f"{path}: the model is above 2 GB", hint="Save it with external data.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data_path = path.with_name(path.name + ".data")
    data_temporary = path.with_name(f".{data_path.name}.{os.getpid()}.tmp")
    try:
        if external:
            with data_temporary.open("wb") as data_file:
                sink: _Sink = _ExternalSink(data_file, data_path.name)
                light = _light_copy(proto, sink)
                _sync(data_file)
        else:
            sink = _InlineSink()
            light = _light_copy(proto, sink)
        with temporary.open("wb") as file:
            for piece in sink.pieces(light):
                file.write(piece)
            _sync(file)
        if external:
            data_temporary.replace(data_path)
        temporary.replace(path)
    except BaseException:
        for leftover in (temporary, data_temporary):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
    return (path, data_path) if external else (path,)


class _Sink(Protocol):
    """Where the bytes of large tensors go while the graph is copied."""

    def take(self, source: onnx.TensorProto, target: onnx.TensorProto) -> None:
        """Note in `target` where the bytes of `source` are."""
        ...

    def pieces(self, light: onnx.ModelProto) -> Iterator[bytes]:
        """Yield the .onnx file."""
        ...


class _ExternalSink:
    """Writes them to the external file at once."""

    def __init__(self, file: IO[bytes], location: str) -> None:
        self.file = file
        self.location = location

    def take(self, source: onnx.TensorProto, target: onnx.TensorProto) -> None:
        """See `_Sink`."""
        position = self.file.tell()
        padding = -position % _ALIGNMENT_BYTES
        self.file.write(bytes(padding))
        length = self.file.write(source.raw_data)
        for key, entry in {"location": self.location, "offset": position + padding, "length": length}.items():
            target.external_data.add(key=key, value=str(entry))
        target.data_location = onnx.TensorProto.EXTERNAL

    def pieces(self, light: onnx.ModelProto) -> Iterator[bytes]:
        """See `_Sink`."""
        yield light.SerializeToString()


class _InlineSink:
    """Leaves markers in the copy; the bytes are fetched one tensor at a time when the file is written.

    Serialising the whole model would hold it twice more.
    """

    def __init__(self) -> None:
        self.marker = b"repo-manager:save:" + secrets.token_bytes(16)
        self.tensors: dict[bytes, onnx.TensorProto] = {}

    def take(self, source: onnx.TensorProto, target: onnx.TensorProto) -> None:
        """See `_Sink`."""
        key = b"%s%08x" % (self.marker, len(self.tensors))
        self.tensors[key] = source
        target.raw_data = key

    def pieces(self, light: onnx.ModelProto) -> Iterator[bytes]:
        """See `_Sink`."""
        lengths = {key: len(tensor.raw_data) for key, tensor in self.tensors.items()}
        for piece in paste_weights(light.SerializeToString(), self.marker, lengths):
            yield self.tensors[piece].raw_data if piece in self.tensors else piece


def _light_copy(proto: onnx.ModelProto, sink: _Sink) -> onnx.ModelProto:
    light = onnx.ModelProto()
    _copy(proto, light, sink)
    return light


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _copy(source: Message, target: Message, sink: _Sink) -> None:
    """Copy a message, sending the bytes of its large tensors to `sink` instead of the copy.

    Sparse tensors stay inline: ONNX Runtime reads their parts from the model's file only.
    """
    for field, value in source.ListFields():
        kind = field.message_type.full_name if field.message_type is not None else ""
        repeated = _is_repeated(field)
        if kind not in _HOLDERS and kind != "onnx.TensorProto":
            if repeated:
                getattr(target, field.name).extend(value)
            elif kind:
                getattr(target, field.name).CopyFrom(value)
            else:
                setattr(target, field.name, value)
            continue
        for item in value if repeated else [value]:
            copy = getattr(target, field.name).add() if repeated else getattr(target, field.name)
            copy.SetInParent()
            if kind == "onnx.TensorProto":
                _copy_tensor(item, copy, sink)
            elif kind == "onnx.NodeProto" and not _holds_tensors(item):
                copy.CopyFrom(item)
            else:
                _copy(item, copy, sink)
    _copy_unknown(source, target)


def _holds_tensors(node: onnx.NodeProto) -> bool:
    return any(a.HasField("t") or a.HasField("g") or a.tensors or a.graphs for a in node.attribute)


def _copy_unknown(source: Message, target: Message) -> None:
    unknown = encode_unknown(unknown_fields.UnknownFieldSet(source))
    if unknown:
        target.MergeFromString(unknown)


def _is_repeated(field: object) -> bool:
    repeated = getattr(field, "is_repeated", None)  # protobuf 6.31 on; `label` is deprecated there
    return bool(repeated) if repeated is not None else getattr(field, "label", None) == 3


def _copy_tensor(source: onnx.TensorProto, target: onnx.TensorProto, sink: _Sink) -> None:
    if not source.HasField("raw_data") or payload_bytes(source) < _KEPT_TENSOR_BYTES:
        target.CopyFrom(source)
        return
    for field, value in source.ListFields():
        if field.name == "raw_data":
            sink.take(source, target)
        elif _is_repeated(field):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)
    _copy_unknown(source, target)
