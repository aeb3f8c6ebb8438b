"""From a sparse (2:4) ONNX model to a proven, load-tested, reversible NVIDIA Triton deployment."""

__version__ = "0.1.0"
