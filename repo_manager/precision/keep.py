"""Patterns that name the nodes to keep in FP32."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

import onnx

from repo_manager.errors import UsageError
from repo_manager.onnx_model import walk

__all__ = ["Keep"]


class Keep:
    """Says of a node whether one of the patterns names it: by its name, its operator, or an output's name.

    Args:
        patterns: shell patterns (`*`, `?`, `[...]`), case matters.
        names: further nodes, by exact name, and why.
    """

    def __init__(self, patterns: Iterable[str] = (), names: Mapping[str, str] | None = None) -> None:
        self.patterns = tuple(patterns)
        self.names = dict(names or {})

    def __call__(self, node: onnx.NodeProto) -> str | None:
        """Return why a node stays in FP32, or `None` when no pattern names it."""
        if any(_matches(node, pattern) for pattern in self.patterns):
            return "asked for by keep_fp32"
        return self.names.get(node.name)

    def also(self, names: Mapping[str, str]) -> Keep:
        """Return a copy that keeps further nodes: name -> why."""
        return Keep(self.patterns, {**names, **self.names})

    def check(self, graph: onnx.GraphProto) -> None:
        """See that every pattern names something.

        Raises:
            UsageError: one names nothing; a pattern that does nothing is a spelling mistake.
        """
        nodes = [node for each in walk.graphs_of(graph) for node in each.node]
        for pattern in self.patterns:
            if not any(_matches(node, pattern) for node in nodes):
                shown = ", ".join(repr(node.name) for node in nodes[:5])
                raise UsageError(
                    f"--keep-fp32 {pattern!r} names no node, operator or output of the model",
                    hint=f"Its first nodes are {shown}; `repo-manager inspect` lists the layers.",
                )


def _matches(node: onnx.NodeProto, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (node.name, node.op_type, *node.output) if text)
