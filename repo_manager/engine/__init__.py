"""Building the file for a backend: an ONNX file, a TensorRT plan, a TensorRT-RTX engine.

Its modules are imported by their own names: a command with need of one does not wait for the others.
"""
