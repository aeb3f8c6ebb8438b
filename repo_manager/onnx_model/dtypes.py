"""ONNX element types: their names here, their size, and NumPy's view of their stored bytes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from repo_manager.errors import ModelError
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import ml_dtypes
    import onnx
else:
    ml_dtypes = deferred("ml_dtypes")
    onnx = deferred("onnx")

__all__ = ["dtype_name", "numpy_dtype", "stored_bits"]


@functools.cache
def _by_number() -> dict[int, tuple[str, int, DTypeLike | None]]:
    """Return for each number of an element type: its name here, the bits of a stored element, and NumPy's type.

    `None` in place of NumPy's type: packed below a byte, or none.
    """
    table: dict[str, tuple[str, int, DTypeLike | None]] = {
        "FLOAT": ("float32", 32, np.float32),
        "UINT8": ("uint8", 8, np.uint8),
        "INT8": ("int8", 8, np.int8),
        "UINT16": ("uint16", 16, np.uint16),
        "INT16": ("int16", 16, np.int16),
        "INT32": ("int32", 32, np.int32),
        "INT64": ("int64", 64, np.int64),
        "STRING": ("string", 0, None),
        "BOOL": ("bool", 8, np.bool_),
        "FLOAT16": ("float16", 16, np.float16),
        "DOUBLE": ("float64", 64, np.float64),
        "UINT32": ("uint32", 32, np.uint32),
        "UINT64": ("uint64", 64, np.uint64),
        "COMPLEX64": ("complex64", 64, np.complex64),
        "COMPLEX128": ("complex128", 128, np.complex128),
        "BFLOAT16": ("bfloat16", 16, ml_dtypes.bfloat16),
        "FLOAT8E4M3FN": ("float8_e4m3fn", 8, ml_dtypes.float8_e4m3fn),
        "FLOAT8E4M3FNUZ": ("float8_e4m3fnuz", 8, ml_dtypes.float8_e4m3fnuz),
        "FLOAT8E5M2": ("float8_e5m2", 8, ml_dtypes.float8_e5m2),
        "FLOAT8E5M2FNUZ": ("float8_e5m2fnuz", 8, ml_dtypes.float8_e5m2fnuz),
        "FLOAT8E8M0": ("float8_e8m0fnu", 8, getattr(ml_dtypes, "float8_e8m0fnu", None)),
        "UINT4": ("uint4", 4, None),
        "INT4": ("int4", 4, None),
        "FLOAT4E2M1": ("float4_e2m1fn", 4, None),
        "UINT2": ("uint2", 2, None),
        "INT2": ("int2", 2, None),
    }
    return {number: table[name] for name, number in onnx.TensorProto.DataType.items() if name in table}


def _entry(data_type: int, where: str) -> tuple[str, int, DTypeLike | None]:
    entry = _by_number().get(data_type)
    if entry is None:
        raise ModelError(f"{where} has element type {data_type}, unknown to repo-manager")
    return entry


def dtype_name(data_type: int, where: str) -> str:
    """Return the name of an ONNX element type (`float32`, `bfloat16`, `string`, ...).

    Raises:
        ModelError: the number is no known element type. `where` opens the message.
    """
    return _entry(data_type, where)[0]


def stored_bits(data_type: int, where: str) -> int:
    """Return how many bits one element takes in `raw_data`. 0 for strings: they cannot be stored there.

    Raises:
        ModelError: the number is no known element type.
    """
    return _entry(data_type, where)[1]


def numpy_dtype(data_type: int, where: str) -> np.dtype[np.generic] | None:
    """Return NumPy's little-endian type of an element, or `None` for strings and types below a byte.

    Raises:
        ModelError: the number is no known element type.
    """
    dtype = _entry(data_type, where)[2]
    return None if dtype is None else np.dtype(dtype)
