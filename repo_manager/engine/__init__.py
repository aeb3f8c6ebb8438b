"""Building what a backend serves: an ONNX file, a TensorRT plan, a TensorRT-RTX engine."""

from repo_manager.engine.artifact import Artifact, build_artifact
from repo_manager.engine.gpu import Gpu, find_gpus
from repo_manager.engine.select import BackendChoice, choose_backend

__all__ = ["Artifact", "BackendChoice", "Gpu", "build_artifact", "choose_backend", "find_gpus"]
