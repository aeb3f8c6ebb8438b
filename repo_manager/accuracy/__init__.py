"""Accuracy on held-out data: the cost of a conversion or a pruning in the users' own unit."""

from repo_manager.accuracy.evaluate import AccuracyGate, AccuracyOptions, Evaluator, load_evaluator

__all__ = ["AccuracyGate", "AccuracyOptions", "Evaluator", "load_evaluator"]
