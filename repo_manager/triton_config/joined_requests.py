"""What Triton does to a model's answers when it joins requests to a batch."""

from __future__ import annotations

from pathlib import Path

from repo_manager.onnx_model.batch_graph import judge_graph
from repo_manager.onnx_model.model import load_graph

__all__ = ["dependence_in_batch"]


def dependence_in_batch(path: Path) -> str | None:
    """Return which node of an ONNX file makes samples depend on each other, or `None`. Weights are not read.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    verdict = judge_graph(load_graph(path))
    return str(verdict.reason) if verdict.kind == "dependent" else None
