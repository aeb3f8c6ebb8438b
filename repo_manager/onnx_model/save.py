"""Write a model to disk: one file, or one file and its external data."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO

import onnx
from google.protobuf.message import EncodeError, Message  # type: ignore[import-untyped]  # published without stubs

from repo_manager.errors import ModelError
from repo_manager.files import fsync_directory
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import is_external, payload_bytes

__all__ = ["save_model"]

_INLINE_LIMIT_BYTES = 2_000_000_000  # below protobuf's 2^31 - 1, with room for the graph
_EXTERNAL_TENSOR_BYTES = 1024
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data_path = path.with_name(path.name + ".data")
    data_temporary = path.with_name(f".{data_path.name}.{os.getpid()}.tmp")
    try:
        if external:
            with data_temporary.open("wb") as data_file:
                light = onnx.ModelProto()
                _copy(proto, light, data_file, data_path.name)
                _sync(data_file)
        else:
            light = proto
        try:
            serialised = light.SerializeToString()
        except (EncodeError, ValueError) as exc:
            raise ModelError(f"{path}: the model is above 2 GB", hint="Save it with external data.") from exc
        with temporary.open("wb") as file:
            file.write(serialised)
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


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _copy(source: Message, target: Message, data_file: IO[bytes], location: str) -> None:
    """Copy a message, sending the bytes of its large tensors to `data_file` instead of the copy.

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
                _copy_tensor(item, copy, data_file, location)
            elif kind == "onnx.NodeProto" and not any(a.HasField("t") or a.HasField("g") for a in item.attribute):
                copy.CopyFrom(item)
            else:
                _copy(item, copy, data_file, location)


def _is_repeated(field: object) -> bool:
    repeated = getattr(field, "is_repeated", None)  # protobuf 6.31 on; `label` is deprecated there
    return bool(repeated) if repeated is not None else getattr(field, "label", None) == 3


def _copy_tensor(source: onnx.TensorProto, target: onnx.TensorProto, data_file: IO[bytes], location: str) -> None:
    if not source.HasField("raw_data") or payload_bytes(source) < _EXTERNAL_TENSOR_BYTES:
        target.CopyFrom(source)
        return
    for field, value in source.ListFields():
        if field.name == "raw_data":
            offset_bytes = data_file.tell()
            padding = -offset_bytes % _ALIGNMENT_BYTES
            data_file.write(bytes(padding))
            data_file.write(value)
            entries = {"location": location, "offset": offset_bytes + padding, "length": len(value)}
            for key, entry in entries.items():
                target.external_data.add(key=key, value=str(entry))
            target.data_location = onnx.TensorProto.EXTERNAL
        elif _is_repeated(field):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)
