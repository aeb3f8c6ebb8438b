"""2:4 structured sparsity: find every weight, judge it, prune it."""

from repo_manager.sparsity.pattern import two_four_mask, valid_groups
from repo_manager.sparsity.prune import prune
from repo_manager.sparsity.prune_report import PrunedLayer, PruneReport, SkippedLayer
from repo_manager.sparsity.report import LayerSparsity, SparsityReport, SparsityTotals, sparsity_report
from repo_manager.sparsity.verdict import SparsityVerdict

__all__ = [
    "LayerSparsity",
    "PruneReport",
    "PrunedLayer",
    "SkippedLayer",
    "SparsityReport",
    "SparsityTotals",
    "SparsityVerdict",
    "prune",
    "sparsity_report",
    "two_four_mask",
    "valid_groups",
]
