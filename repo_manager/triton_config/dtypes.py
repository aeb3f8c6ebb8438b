"""Element types: NumPy's names (as in `TensorSpec`) to Triton's, and what each backend can carry."""

from __future__ import annotations

from repo_manager.errors import ConfigError
from repo_manager.types import Backend, TensorSpec

__all__ = ["check_dtypes", "config_dtype", "triton_dtype"]

# ModelConfig's DataType (model_config.proto) and the name on the wire (the KServe v2 protocol).
_TRITON = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}

# onnxruntime: onnxruntime_utils.cc, ModelConfigDataTypeToOnnxDataType knows no BF16.
# tensorrt: tensorrt_utils.cc, ConvertTrtTypeToConfigDataType.
_CARRIED = {
    Backend.ONNXRUNTIME: frozenset(_TRITON) - {"bfloat16"},
    Backend.TENSORRT: frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "float32", "bfloat16"}),
    Backend.TENSORRT_RTX: frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "float32", "bfloat16"}),
}


def triton_dtype(dtype: str) -> str:
    """Return the type's name in the inference protocol, for instance `FP32` or `BYTES`.

    Args:
        dtype: as in `TensorSpec.dtype`.

    Raises:
        ConfigError: Triton has no such type (complex numbers, 8-bit floats, 4-bit integers).
    """
    try:
        return _TRITON[dtype]
    except KeyError:
        raise ConfigError(
            f"Triton has no type for {dtype}; it carries {', '.join(_TRITON)}",
            hint="Add a Cast to one of these types at the model's input or output.",
        ) from None


def config_dtype(dtype: str) -> str:
    """Return the type's name in config.pbtxt, for instance `TYPE_FP32` or `TYPE_STRING`.

    Raises:
        ConfigError: Triton has no such type.
    """
    name = triton_dtype(dtype)
    return "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"


def check_dtypes(specs: tuple[TensorSpec, ...], backend: Backend) -> None:
    """Check that a backend can carry every tensor's type.

    Raises:
        ConfigError: names the first tensor whose type Triton or the backend cannot carry.
    """
    carried = _CARRIED[backend]
    for spec in specs:
        if spec.dtype not in carried:
            raise ConfigError(
                f"tensor {spec.name!r} has type {spec.dtype}, which Triton's {backend} backend cannot carry; "
                f"it carries {', '.join(name for name in _TRITON if name in carried)}",
                hint="Add a Cast to one of these types at the model's input or output.",
            )
