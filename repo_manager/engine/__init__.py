"""Building what a backend serves: an ONNX file, a TensorRT plan, a TensorRT-RTX engine."""
