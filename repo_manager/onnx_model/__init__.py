"""ONNX models: load and check, save, signature, weights, running them, and their batch axis.

Its modules are imported by their own names: a command with need of one does not wait for the others.
"""
