"""Pruning with calibration data: every layer is solved on its inputs, and the result is measured."""

from repo_manager.pruning.judge import metric_of
from repo_manager.pruning.prune import PruneOptions, prune_with_data

__all__ = ["PruneOptions", "metric_of", "prune_with_data"]
