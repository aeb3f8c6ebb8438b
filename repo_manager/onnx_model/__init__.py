"""ONNX models: load and check, save, signature, weights, running them, and their batch axis.

Its modules are imported by their own names: a command that needs one of them does not wait for the others.
"""
