"""The effect on a model's answers when Triton joins requests to a batch.

It is separate because judging the graph needs onnx and NumPy, and reading a repository does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.optional import deferred

if TYPE_CHECKING:
    from repo_manager.onnx_model import batch_graph, model
else:
    batch_graph = deferred("repo_manager.onnx_model.batch_graph")
    model = deferred("repo_manager.onnx_model.model")

__all__ = ["dependence_in_batch"]


def dependence_in_batch(path: Path) -> str | None:
    """Return the node of an ONNX file by which samples depend on each other, or `None`. Weights are not read.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    verdict = batch_graph.judge_graph(model.load_graph(path))
    return str(verdict.reason) if verdict.kind == "dependent" else None
