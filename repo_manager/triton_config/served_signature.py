"""A model's inputs and outputs as ONNX Runtime sees them once it has loaded the file as a server does.

While loading, ONNX Runtime folds constants, infers shapes and narrows the file's declarations: an output declared `[N,
?]` becomes `[N, 10]` when the graph says so. Triton's onnxruntime backends, the native one and the embedded one,
compare the configuration's output dims with the narrowed shape, exactly. A configuration derived from the file, or
from a load without optimisations, can be refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ConfigError, ModelError
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.onnx_model.runtime import RuntimeRefusedError, SessionSource, runtime_process
from repo_manager.triton_config.config import ModelConfig
from repo_manager.types import Backend, Dim, TensorSpec

if TYPE_CHECKING:
    from repo_manager.onnx_model.signature import Signature

__all__ = ["ServedSignature", "check_dtypes", "config_dtype", "runtime_signature", "served_signature", "triton_dtype"]


# Element types: NumPy's names (as in `TensorSpec`) to Triton's, and the types supported by each backend.

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

# onnxruntime: onnxruntime_utils.cc, ModelConfigDataTypeToOnnxDataType has no BF16 before release 26.03
# (onnxruntime_backend#335). Older servers refuse it, so it is refused here.
# tensorrt: tensorrt_utils.cc, ConvertTrtTypeToConfigDataType.
_CARRIED = {
    Backend.ONNXRUNTIME: frozenset(_TRITON) - {"bfloat16"},
    Backend.TENSORRT: frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "float32", "bfloat16"}),
    Backend.TENSORRT_RTX: frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "float32", "bfloat16"}),
}


def triton_dtype(dtype: str) -> str:
    """Return the type's name in the inference protocol, for instance `FP32` or `BYTES`.

    Args:
        dtype: NumPy's name, as in `TensorSpec.dtype`.

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
    """Check whether a backend can carry every tensor's type.

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


# onnxruntime names its tensor types after C++.
_DTYPES = {"float": "float32", "double": "float64"}
_LARGE_BYTES = 64 << 20  # bytes, with the external data in the same folder
_SESSION_PARAMETERS = ("session.", "optimization.", "ep.")


@dataclasses.dataclass(frozen=True)
class ServedSignature:
    """The parts of a signature for `check_config` and `derive_config`.

    Attributes:
        inputs: inputs without a default in the model, shapes with the batch axis.
        outputs: all outputs of the model, shapes with the batch axis.
        initializers: inputs with a default in the model.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    initializers: tuple[TensorSpec, ...] = ()


def served_signature(signature: Signature, path: Path, config: ModelConfig | None = None) -> Signature:
    """Return the signature with its shapes narrowed to ONNX Runtime's report to Triton.

    Args:
        signature: of the model in `path`.
        path: the ONNX file to be served.
        config: the model's configuration. `None`: it has none, or it cannot be parsed.

    Raises:
        ModelError: ONNX Runtime does not take the model.
    """
    runtime = runtime_signature(path, config)
    return dataclasses.replace(
        signature,
        inputs=_narrowed(signature.inputs, runtime.inputs),
        outputs=_narrowed(signature.outputs, runtime.outputs),
    )


def runtime_signature(path: Path, config: ModelConfig | None = None) -> ServedSignature:
    """Load an ONNX file as Triton's onnxruntime backends do, on the CPU, and return its inputs and outputs.

    A shape of rank 0 may also be an unknown rank: ONNX Runtime reports both alike, and so Triton treats them.

    Args:
        path: the ONNX file. External data are read from its folder.
        config: its graph optimisation level and session parameters are applied. `None` takes a server's defaults, all
            optimisations.

    Raises:
        ModelError: ONNX Runtime does not take the model, or a tensor is a sequence, map or optional.
        InputError: the file is a Git LFS pointer.
    """
    refuse_lfs_pointer(path)
    process = runtime_process()
    try:
        number, found = process.open(_source(path, config), str(path))
    except RuntimeRefusedError as exc:
        reason = " ".join(str(exc).split())
        raise ModelError(
            f"{path}: ONNX Runtime {process.version} does not take it: {reason}",
            hint="A server loads it the same way, and refuses it. Export the model again, or for another opset.",
        ) from exc
    process.close(number)
    return ServedSignature(
        _specs(found["inputs"], path), _specs(found["outputs"], path), _specs(found["initializers"], path)
    )


def _source(path: Path, config: ModelConfig | None) -> SessionSource:
    """Return the load for the same graph as in a server. Nothing runs, so nothing is packed."""
    entries = {"session.disable_prepacking": "1"}
    # The layout optimisations of ALL keep a second copy of the weights, and change no output's shape.
    folder_bytes = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
    level = everything = "ORT_ENABLE_EXTENDED" if folder_bytes >= _LARGE_BYTES else "ORT_ENABLE_ALL"
    if config is not None:
        message = config.message()
        # `optimization { graph { level } }`, with the native backend's meaning.
        named = {-1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
        level = named.get(message.optimization.graph.level, everything)
        for key, value in message.parameters.items():
            if key.startswith(_SESSION_PARAMETERS):
                entries[key] = value.string_value
    return SessionSource(str(path), level, (entries,), arena=False)


def _narrowed(declared: tuple[TensorSpec, ...], runtime: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    by_name = {spec.name: spec for spec in runtime}
    result = []
    for spec in declared:
        seen = by_name.get(spec.name)
        # Rank 0 may mean unknown: keep the declared rank.
        result.append(spec if seen is None or not seen.shape else dataclasses.replace(spec, shape=seen.shape))
    return tuple(result)


def _specs(values: Sequence[Mapping[str, Any]], path: Path) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value["name"], _dtype(value, path), _shape(value["shape"])) for value in values)


def _dtype(value: Mapping[str, Any], path: Path) -> str:
    kind = str(value["type"])
    if not kind.startswith("tensor(") or not kind.endswith(")"):
        raise ModelError(f"{path}: {value['name']!r} is {kind}, not a tensor, and Triton carries tensors only")
    name = kind[len("tensor(") : -1]
    return _DTYPES.get(name, name)


def _shape(shape: Any) -> tuple[Dim, ...]:
    return tuple(dim if isinstance(dim, str) or (isinstance(dim, int) and dim >= 0) else None for dim in shape)
