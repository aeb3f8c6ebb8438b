"""A model's inputs and outputs as ONNX Runtime sees them once it has loaded the file.

While loading, ONNX Runtime infers shapes and narrows what the file declares: an output declared `[N, ?]` becomes
`[N, 10]` when the graph says so. Triton's onnxruntime backend compares the configuration's output dims with the
narrowed shape, exactly; a configuration derived from the file alone can be refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ModelError
from repo_manager.optional import require
from repo_manager.types import Dim, TensorSpec

if TYPE_CHECKING:  # Annotations only: reading a repository does not have to import onnx.
    from repo_manager.onnx_model import Signature

__all__ = ["ServedSignature", "runtime_signature", "served_signature"]

# onnxruntime names its tensor types after C++.
_DTYPES = {"float": "float32", "double": "float64"}


@dataclasses.dataclass(frozen=True)
class ServedSignature:
    """Inputs and outputs; what `check_config` and `derive_config` need of a signature."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def served_signature(signature: Signature, path: Path) -> Signature:
    """Return the signature with its shapes narrowed to what ONNX Runtime will report to Triton.

    Args:
        signature: of the model in `path`.
        path: the ONNX file that is going to be served.

    Raises:
        ModelError: ONNX Runtime does not take the model.
    """
    runtime = runtime_signature(path)
    return dataclasses.replace(
        signature,
        inputs=_narrowed(signature.inputs, runtime.inputs),
        outputs=_narrowed(signature.outputs, runtime.outputs),
    )


def runtime_signature(path: Path) -> ServedSignature:
    """Load an ONNX file by ONNX Runtime, graph optimisation off, and return its inputs and outputs.

    A shape of rank 0 may also be an unknown rank: ONNX Runtime reports both alike, and so Triton treats them.

    Raises:
        ModelError: ONNX Runtime does not take the model, or a tensor is a sequence, map or optional.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # Fatal only: what matters is raised.
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        reason = " ".join(str(exc).split())
        raise ModelError(f"{path}: ONNX Runtime {onnxruntime.__version__} does not take it: {reason}") from exc
    return ServedSignature(_specs(session.get_inputs(), path), _specs(session.get_outputs(), path))


def _narrowed(declared: tuple[TensorSpec, ...], runtime: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    by_name = {spec.name: spec for spec in runtime}
    result = []
    for spec in declared:
        seen = by_name.get(spec.name)
        # Rank 0 may mean unknown, so what is declared stands.
        result.append(spec if seen is None or not seen.shape else dataclasses.replace(spec, shape=seen.shape))
    return tuple(result)


def _specs(values: Any, path: Path) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value.name, _dtype(value, path), _shape(value.shape)) for value in values)


def _dtype(value: Any, path: Path) -> str:
    kind = str(value.type)
    if not kind.startswith("tensor(") or not kind.endswith(")"):
        raise ModelError(f"{path}: {value.name!r} is {kind}, not a tensor, and Triton carries tensors only")
    name = kind[len("tensor(") : -1]
    return _DTYPES.get(name, name)


def _shape(shape: Any) -> tuple[Dim, ...]:
    return tuple(dim if isinstance(dim, str) or (isinstance(dim, int) and dim >= 0) else None for dim in shape)
