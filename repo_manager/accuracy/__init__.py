"""Accuracy on held-out data: what a conversion or a pruning costs in the unit that users know."""

from repo_manager.accuracy.evaluate import AccuracyGate, AccuracyOptions, Evaluator, load_evaluator

__all__ = ["AccuracyGate", "AccuracyOptions", "Evaluator", "load_evaluator"]
