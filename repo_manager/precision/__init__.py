"""FP16 and INT8 conversions of ONNX graphs, their calibration data and their post-conditions."""
