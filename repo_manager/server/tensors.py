"""NumPy arrays as Triton's requests carry them, the same for both protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repo_manager.errors import UsageError
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import ml_dtypes
    import numpy as np
    import tritonclient.utils as triton_utils
else:
    ml_dtypes = deferred("ml_dtypes")
    np = deferred("numpy")
    triton_utils = deferred("tritonclient.utils")

__all__ = ["request_inputs"]


def request_inputs(module: Any, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
    """Return the `InferInput` list of a request.

    Args:
        module: `tritonclient.grpc` or `tritonclient.http`.
        inputs: name -> array of any shape; strings as `object`, `S` or `U` arrays; bfloat16 as ml_dtypes has it.

    Raises:
        UsageError: an element type that Triton does not carry.
    """
    tensors = []
    for name, array in inputs.items():
        values = np.ascontiguousarray(array).reshape(np.shape(array))
        if values.dtype == ml_dtypes.bfloat16:
            datatype, values = "BF16", values.astype(np.float32)  # the client library rounds it back
        elif values.dtype.kind in "USO":
            datatype, values = "BYTES", _encoded(values)
        else:
            datatype = triton_utils.np_to_triton_dtype(values.dtype)
        if datatype is None:
            raise UsageError(f"Input {name}: Triton carries no {values.dtype} tensors")
        tensor = module.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values)
        tensors.append(tensor)
    return tensors


def _encoded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the strings of an array as an object array of bytes."""
    flat = [item if isinstance(item, bytes) else str(item).encode() for item in values.ravel().tolist()]
    encoded = np.empty(len(flat), dtype=np.object_)
    encoded[:] = flat
    return encoded.reshape(values.shape)
