"""What is placed in a version's folder for its backend to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import MissingDependencyError
from repo_manager.optional import require
from repo_manager.types import Backend

__all__ = ["Artifact", "build_artifact"]

_ONNX_FILE_NAME = "model.onnx"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The files of one version, and what is known of them.

    Attributes:
        backend: the Triton backend that loads them.
        files: name inside the version's folder -> the file now.
        facts: what the manifest records: engine version, compute capability, layer evidence.
    """

    backend: Backend
    files: Mapping[str, Path]
    facts: Mapping[str, Any]


def build_artifact(files: tuple[Path, ...], backend: Backend) -> Artifact:
    """Make what `backend` serves out of a converted ONNX model.

    Args:
        files: the converted model's file first, then its external data.
        backend: onnxruntime serves the ONNX file as it is.

    Raises:
        MissingDependencyError: the backend's builder is not available here.
    """
    if backend is Backend.ONNXRUNTIME:
        model, *external = files
        named = {_ONNX_FILE_NAME: model, **{path.name: path for path in external}}
        return Artifact(backend, named, {"format": "onnx"})
    library = require(str(backend))
    raise MissingDependencyError(
        f"--backend {backend}: {library.__name__} {library.__version__} is installed, but this version of "
        "repo-manager has no engine builder yet",
        hint="Use --backend onnxruntime; Triton's onnxruntime backend runs it on CPU and GPU.",
    )
