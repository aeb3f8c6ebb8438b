"""Building what a backend serves: an ONNX file, a TensorRT plan, a TensorRT-RTX engine.

Its modules are imported by their own names: a command that needs one of them does not wait for the others.
"""
