"""ONNX models: load and check, save, signature, weights, running them, and their batch axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repo_manager.lazy import lazy_exports

if TYPE_CHECKING:
    from repo_manager.onnx_model.batch_axis import BatchAxis, find_batch_axis
    from repo_manager.onnx_model.batch_graph import GraphVerdict, judge_graph
    from repo_manager.onnx_model.inputs import find_sizes, natural_inputs
    from repo_manager.onnx_model.model import Model, load_graph, load_model, parameter_count
    from repo_manager.onnx_model.save import save_model
    from repo_manager.onnx_model.session import Session
    from repo_manager.onnx_model.signature import Signature, resolve_shape, signature_of

__all__ = [
    "BatchAxis",
    "GraphVerdict",
    "Model",
    "Session",
    "Signature",
    "find_batch_axis",
    "find_sizes",
    "judge_graph",
    "load_graph",
    "load_model",
    "natural_inputs",
    "parameter_count",
    "resolve_shape",
    "save_model",
    "signature_of",
]

_MODULES = {
    "batch_axis": (
        "BatchAxis",
        "find_batch_axis",
    ),
    "batch_graph": (
        "GraphVerdict",
        "judge_graph",
    ),
    "inputs": (
        "find_sizes",
        "natural_inputs",
    ),
    "model": (
        "Model",
        "load_graph",
        "load_model",
        "parameter_count",
    ),
    "save": ("save_model",),
    "session": ("Session",),
    "signature": (
        "Signature",
        "resolve_shape",
        "signature_of",
    ),
}
__getattr__ = lazy_exports(__name__, _MODULES)
