"""How arrays pass between Triton's stub and ONNX Runtime (beside model.py, in Triton's stub process).

The stub of Triton 2.51 is compiled against NumPy 1: with NumPy 2, `pb_utils.Tensor` makes empty tensors. DLPack does
not depend on NumPy's layout, so with NumPy 2 arrays pass through it, still without a copy. It carries no strings, and
the stub takes no empty arrays by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

__all__ = ["array_of", "check_passable", "tensor_of"]

Array = np.ndarray[Any, Any]


def _tensor_by_dlpack(name: str, array: Array) -> Any:
    """Return a tensor in the array's memory."""
    return pb_utils.Tensor.from_dlpack(name, np.ascontiguousarray(array))


def _tensor_by_numpy(name: str, array: Array) -> Any:
    # Looks up pb_utils.Tensor late: the stub for completing configurations has none.
    return pb_utils.Tensor(name, array)


_HAS_NUMPY_2 = int(np.__version__.partition(".")[0]) >= 2


def check_passable(config: dict[str, Any]) -> None:
    """Refuse a model whose tensors cannot pass: an attempt would kill the stub.

    Raises:
        TritonModelException: a string input or output with NumPy 2.
    """
    for tensor in (*config.get("input", ()), *config.get("output", ())):
        if _HAS_NUMPY_2 and tensor["data_type"] == "TYPE_STRING":
            raise pb_utils.TritonModelException(
                f"tensor '{tensor['name']}' is a string, which Triton's Python stub cannot pass with NumPy "
                f"{np.__version__}; it needs NumPy below 2"
            )


# Returns a tensor's array without a copy. This is a library function because each tensor needs a call.
array_of: Callable[[Any], Array] = np.from_dlpack if _HAS_NUMPY_2 else operator.methodcaller("as_numpy")
tensor_of = _tensor_by_dlpack if _HAS_NUMPY_2 else _tensor_by_numpy
