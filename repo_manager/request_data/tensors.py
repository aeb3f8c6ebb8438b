"""Triton's data types in NumPy, and the bytes that travel."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["NUMPY_OF_TRITON", "Array", "InputFacts", "Sample", "elements_of", "raw_bytes"]

Array = npt.NDArray[Any]
Sample = dict[str, Array]
"""The inputs of one request by name, batch axis included where the model has one."""

NUMPY_OF_TRITON: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}


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


def raw_bytes(array: Array) -> bytes:
    """Return Triton's binary form: little-endian elements in C order; BYTES as 4-byte lengths and contents."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def elements_of(shape: Sequence[int]) -> int:
    """Return how many elements a shape without dynamic dimensions has."""
    return int(np.prod(shape, dtype=np.int64)) if shape else 1
