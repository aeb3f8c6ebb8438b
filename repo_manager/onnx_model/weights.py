"""Read a weight's values on demand, from the model's file, an external file or the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.dtypes import numpy_dtype, stored_bits
from repo_manager.onnx_model.wire import Blob
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = [
    "ExternalData",
    "WeightStore",
    "element_count",
    "external_data",
    "is_external",
    "payload_bytes",
    "set_bytes",
    "unpack",
]

_VALUE_FIELDS = (
    "external_data",
    "data_location",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
MAX_TENSOR_BYTES = 1 << 46  # 64 TiB: a larger declared size is an error, not a large model


@dataclass(frozen=True)
class ExternalData:
    """Where an external tensor's bytes are. `length_bytes` is `None` when the file does not say."""

    location: str
    offset_bytes: int
    length_bytes: int | None


def element_count(tensor: onnx.TensorProto) -> int:
    """Return the product of a tensor's dims (1 for a scalar), exactly.

    Raises:
        ModelError: a dimension is negative, or the product is absurd.
    """
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims):
        raise ModelError(f"tensor '{tensor.name}' has a negative dimension in its shape {_shape(dims)}")
    count = math.prod(int(dim) for dim in dims)
    if count > MAX_TENSOR_BYTES:
        raise ModelError(f"tensor '{tensor.name}' declares an absurd shape {_shape(dims)}")
    return count


def _shape(dims: list[int]) -> str:
    shown = [str(dim) for dim in dims[:8]]
    return "[" + ", ".join(shown) + (", ...]" if len(dims) > 8 else "]")


def payload_bytes(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor's values take when stored raw, rounded up to whole bytes.

    Raises:
        ModelError: unknown element type, negative or absurd shape.
    """
    return (element_count(tensor) * stored_bits(tensor.data_type, f"tensor '{tensor.name}'") + 7) // 8


def is_external(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor's values are in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_data(tensor: onnx.TensorProto) -> ExternalData:
    """Parse a tensor's external-data entries.

    Raises:
        ModelError: no location, or an offset or length other than a non-negative integer.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or "\0" in location:
        raise ModelError(f"tensor '{tensor.name}' has external data without a usable location")
    numbers: dict[str, int | None] = {}
    for key in ("offset", "length"):
        text = entries.get(key)
        if text is None or text == "":
            numbers[key] = None
        elif text.isascii() and text.isdecimal() and len(text) < 19:
            numbers[key] = int(text)
        else:
            raise ModelError(f"tensor '{tensor.name}' has external data with {key} {text[:40]!r}, not a byte count")
    return ExternalData(location, numbers["offset"] or 0, numbers["length"])


@dataclass(frozen=True)
class WeightStore:
    """Gives a tensor's stored bytes and values, reading from disk only when asked.

    Attributes:
        path: the model's file. `None` for a model in memory, whose tensors hold their own bytes.
        blobs: marker -> place in the file, for the weights cut out of the graph.
    """

    path: Path | None = None
    blobs: Mapping[bytes, Blob] = field(default_factory=dict)

    def blob_of(self, tensor: onnx.TensorProto) -> Blob | None:
        """Return the place of a weight cut out of the file, or `None`."""
        if not self.blobs or not tensor.HasField("raw_data"):
            return None
        return self.blobs.get(tensor.raw_data)

    def is_elsewhere(self, tensor: onnx.TensorProto) -> bool:
        """Return whether a tensor's bytes are not in the graph: they are in another file, or were cut out."""
        return is_external(tensor) or self.blob_of(tensor) is not None

    def raw(self, tensor: onnx.TensorProto) -> bytes | memoryview:
        """Return a tensor's values as stored bytes (little-endian, as in `raw_data`).

        Raises:
            ModelError: strings, or the file no longer holds the bytes.
        """
        if is_external(tensor):
            place = external_data(tensor)
            if self.path is None:
                raise ModelError(f"tensor '{tensor.name}' has external data, but the model has no folder")
            length = payload_bytes(tensor)
            return _read(self.path.parent / place.location, Blob(place.offset_bytes, length), tensor.name)
        blob = self.blob_of(tensor)
        if blob is not None and self.path is not None:
            return _read(self.path, blob, tensor.name)
        if tensor.HasField("raw_data"):
            return bytes(tensor.raw_data)
        return _typed_values(tensor)

    def array(self, tensor: onnx.TensorProto) -> NDArray[np.generic]:
        """Return a tensor's values in their own type. Types below a byte as int8 or uint8 of the same value.

        Raises:
            ModelError: strings, or bytes too few or too many for the shape.
        """
        data = self.raw(tensor)
        shape = tuple(tensor.dims)
        if len(data) < payload_bytes(tensor):
            raise ModelError(
                f"tensor '{tensor.name}' holds {len(data)} bytes; its shape {_shape(list(shape))} "
                f"needs {payload_bytes(tensor)}"
            )
        dtype = numpy_dtype(tensor.data_type, f"tensor '{tensor.name}'")
        if dtype is None:
            return unpack(np.frombuffer(data, np.uint8), tensor.data_type, element_count(tensor)).reshape(shape)
        return np.frombuffer(data, dtype.newbyteorder("<"), element_count(tensor)).reshape(shape)


def set_bytes(tensor: onnx.TensorProto, data: bytes | memoryview) -> None:
    """Make `data` a tensor's values, whatever held them before."""
    for name in _VALUE_FIELDS:
        tensor.ClearField(name)
    tensor.raw_data = bytes(data)


def unpack(packed: NDArray[np.uint8], data_type: int, count: int) -> NDArray[np.generic]:
    """Spread 4-bit and 2-bit values, lowest bits first, to one byte each.

    Integers keep their value. A `float4_e2m1fn` becomes its signed place in the order of magnitudes (int8, -7 to 7):
    its sign and its zeros are those of the number.

    Args:
        packed: bytes as ONNX stores them.
        data_type: element type, a `TensorProto` constant.
        count: number of elements to return.

    Raises:
        ModelError: the type is not one below a byte.
    """
    bits = stored_bits(data_type, "a packed tensor")
    if bits not in (2, 4):
        raise ModelError("a tensor of strings has no numbers to read")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = ((packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    if data_type == _FLOAT4:
        order = (values & np.uint8(7)).astype(np.int8)
        return np.where(values > 7, -order, order)
    if data_type in _SIGNED:
        sign = np.uint8(1 << (bits - 1))
        return ((values ^ sign).astype(np.int8) - sign.astype(np.int8)).astype(np.int8)
    return values


# onnx.TensorProto.DataType numbers, the same in every release with the type.
_FLOAT4 = 23
_SIGNED = {22, 26}  # INT4, INT2


def _read(path: Path, blob: Blob, name: str) -> memoryview:
    """Read exactly one blob into fresh memory. A file shrunk during the read is an error, never a crash."""
    buffer: memoryview = np.empty(blob.length_bytes, np.uint8).data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(blob.offset_bytes)
            done = 0
            while done < blob.length_bytes:
                count = file.readinto(buffer[done : done + (1 << 30)])
                if not count:
                    raise ModelError(
                        f"{path} ends before the values of tensor '{name}'; was it changed during the read?"
                    )
                done += count
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}") from exc
    return buffer


def _typed_values(tensor: onnx.TensorProto) -> bytes:
    """Return the bytes of a tensor stored in `float_data`, `int32_data`, ... (onnx.proto says which for which)."""
    dtype = numpy_dtype(tensor.data_type, f"tensor '{tensor.name}'")
    bits = stored_bits(tensor.data_type, f"tensor '{tensor.name}'")
    if bits == 0:
        raise ModelError(f"tensor '{tensor.name}' holds strings, which have no numbers to read")
    name = dtype.name if dtype is not None else ""
    if name in ("float32", "complex64"):
        return np.array(tensor.float_data, np.float32).tobytes()
    if name in ("float64", "complex128"):
        return np.array(tensor.double_data, np.float64).tobytes()
    if name == "int64":
        return np.array(tensor.int64_data, np.int64).tobytes()
    if name in ("uint32", "uint64"):
        return np.array(tensor.uint64_data, np.uint64).astype(dtype).tobytes()
    words = np.array(tensor.int32_data, np.int64)
    return words.astype(f"<u{max(bits, 8) // 8}").tobytes()
