"""What Triton does to a model's answers when it joins requests to a batch.

It stands apart because the graph is judged by modules that import onnx, and reading a repository does not.
"""

from __future__ import annotations

from pathlib import Path

from repo_manager.lazy import lazy_exports

__all__ = ["dependence_in_batch"]

_when_used = lazy_exports("repo_manager.onnx_model", {"batch_graph": ("judge_graph",), "model": ("load_graph",)})


def dependence_in_batch(path: Path) -> str | None:
    """Return which node of an ONNX file makes samples depend on each other, or `None`. Weights are not read.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    verdict = _when_used("judge_graph")(_when_used("load_graph")(path))
    return str(verdict.reason) if verdict.kind == "dependent" else None
