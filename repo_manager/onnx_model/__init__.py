"""Reading, checking and running ONNX models."""
