"""The other files named by a model's file: the external data of ONNX, the weights of OpenVINO."""

from __future__ import annotations

from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import load_graph
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import external_data, is_external

__all__ = ["files_beside"]


def files_beside(path: Path) -> tuple[str, ...]:
    """Return the names of the files, relative to the model's folder. A file other than a model names none."""
    suffix = path.suffix.lower()
    if suffix == ".xml":
        return (path.with_suffix(".bin").name,)
    if suffix != ".onnx":
        return ()
    try:
        proto = load_graph(path).graph_only
        return tuple(sorted({external_data(each).location for each in tensors_of(proto) if is_external(each)}))
    except ModelError:
        return ()
