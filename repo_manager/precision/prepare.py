"""The passes that come before any change of precision."""

from __future__ import annotations

from repo_manager.onnx_model.draft import Draft
from repo_manager.onnx_model.source import named, without_unused
from repo_manager.precision.fold_batchnorm import fold_batchnorm
from repo_manager.precision.fold_constants import fold_constants
from repo_manager.precision.raise_opset import raise_opset

__all__ = ["prepare"]


def prepare(draft: Draft, *, opset: int) -> Draft:
    """Raise the opset to at least `opset`, and fold constants and BatchNormalization.

    Ensures: same results up to rounding, topological order, names on all nodes.

    Raises:
        ModelError: the opset cannot be raised.
    """
    draft = named(raise_opset(draft, opset))
    return without_unused(fold_batchnorm(without_unused(fold_constants(draft))))
