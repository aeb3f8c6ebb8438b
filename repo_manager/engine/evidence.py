"""How far sparsity got in each layer: pattern valid, eligible, chosen. From the builder's own report, never from a
flag.

Two wordings (strings of the libraries of TensorRT 8.6.0 and TensorRT-RTX 1.7.1, and public logs):

    (Sparsity) Layers eligible for sparse math: a, b
    (Sparsity) TRT inference plan picked sparse implementation for layers: a

    (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b
    (Sparsity) Chose 1 layer(s) using sparse tactics: a

The newer one names layers only at VERBOSE. The pair repeats per pass of the build. The last one counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from repo_manager.engine.layers import EngineLayer
from repo_manager.sparsity import LayerSparsity, SparsityReport

__all__ = ["BuilderEvidence", "LayerEvidence", "join_evidence", "read_evidence"]

_PREFIX = "(Sparsity) "
_OLD_ELIGIBLE = re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)", re.DOTALL)
_OLD_CHOSEN = re.compile(
    r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(?P<names>.*)", re.DOTALL
)
_NEW_ELIGIBLE = re.compile(
    r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?P<names>.*)", re.DOTALL
)
_NEW_CHOSEN = re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics(?P<names>.*)", re.DOTALL)
_SPARSE_KERNEL = re.compile(r"spars|spmma", re.IGNORECASE)

NOT_REPORTED = "not reported by this builder"


@dataclasses.dataclass(frozen=True)
class BuilderEvidence:
    """A builder's report on sparse kernels.

    Attributes:
        eligible: layers with weights it found 2:4 and with sparse kernels for them. `None` when it did not give names
            (or said nothing).
        chosen: layers won by a sparse kernel. `None` as for `eligible`.
        eligible_count: their number. `None` when it said nothing.
        chosen_count: number of chosen layers. `None` when it said nothing.
    """

    eligible: tuple[str, ...] | None = None
    chosen: tuple[str, ...] | None = None
    eligible_count: int | None = None
    chosen_count: int | None = None

    @property
    def reported(self) -> bool:
        """Whether it said anything at all."""
        return self.eligible_count is not None or self.chosen_count is not None


@dataclasses.dataclass(frozen=True)
class LayerEvidence:
    """One weight's way to a sparse kernel.

    Attributes:
        layer: name of the weight's node in the graph.
        op_type: the node's operator, such as `Conv`.
        pattern: the verdict of the 2:4 report.
        engine_layer: the engine's (fused) layer for it. `None` when it is not listed.
        eligible: whether the builder offered it to sparse kernels. `None`: not reported by this builder.
        chosen: whether a sparse kernel was chosen. `None`: not reported by this builder.
        tactic: the kernel's name, empty when it is not known.
        reason: where it stopped, in words.
        time_sparse_ns: of the engine layer, measured on the GPU. `None`: not measured, or not listed.
        time_dense_ns: of the same node's layer in the dense twin. `None` as for the sparse time. A fused layer's time
            is counted in the row of each of its nodes.
    """

    layer: str
    op_type: str
    pattern: str
    engine_layer: str | None
    eligible: bool | None
    chosen: bool | None
    tactic: str
    reason: str
    time_sparse_ns: int | None = None
    time_dense_ns: int | None = None


def read_evidence(messages: Iterable[str]) -> BuilderEvidence:
    """Read a build log's sparsity lines, in both wordings.

    Args:
        messages: the messages in order, with or without a line prefix such as a time.
    """
    eligible: tuple[int, tuple[str, ...] | None] | None = None
    chosen: tuple[int, tuple[str, ...] | None] | None = None
    for message in messages:
        if _PREFIX not in message:
            continue
        if match := _OLD_ELIGIBLE.search(message) or _NEW_ELIGIBLE.search(message):
            eligible, chosen = _counted(match), None
        elif match := _OLD_CHOSEN.search(message) or _NEW_CHOSEN.search(message):
            chosen = _counted(match)
    return BuilderEvidence(
        eligible=eligible[1] if eligible else None,
        chosen=chosen[1] if chosen else None,
        eligible_count=eligible[0] if eligible else None,
        chosen_count=chosen[0] if chosen else None,
    )


def _counted(match: re.Match[str]) -> tuple[int, tuple[str, ...] | None]:
    """Number and names. No names when the line only counts, as it does below VERBOSE."""
    names = tuple(name for part in match["names"].strip().removeprefix(":").split(", ") if (name := part.strip()))
    if "count" not in match.groupdict():
        return len(names), names
    count = int(match["count"])
    return count, names if len(names) == count else None


def join_evidence(
    report: SparsityReport, builder: BuilderEvidence, layers: Sequence[EngineLayer]
) -> tuple[LayerEvidence, ...]:
    """Join the 2:4 report with the builder's: one row per weight.

    Args:
        report: of the ONNX file built.
        builder: the builder's log and layers, from `read_evidence`.
        layers: of the engine. Their kernel names count as evidence too.
    """
    return tuple(_row(layer, builder, layers) for layer in report.layers)


def _row(layer: LayerSparsity, builder: BuilderEvidence, layers: Sequence[EngineLayer]) -> LayerEvidence:
    candidates = [item for item in layers if item.computes(layer.node)]
    engine_layer = next((item for item in candidates if item.is_matrix_math), candidates[0] if candidates else None)
    tactic = engine_layer.tactic if engine_layer else ""
    eligible = _listed(layer.node, builder.eligible, builder.eligible_count)
    chosen = _listed(layer.node, builder.chosen, builder.chosen_count)
    if tactic and _SPARSE_KERNEL.search(tactic):
        chosen = eligible = True
    return LayerEvidence(
        layer=layer.node,
        op_type=layer.op_type,
        pattern=str(layer.verdict),
        engine_layer=engine_layer.name if engine_layer else None,
        eligible=eligible,
        chosen=chosen,
        tactic=tactic,
        reason=_reason(layer, eligible, chosen),
    )


def _listed(node: str, names: tuple[str, ...] | None, count: int | None) -> bool | None:
    if names is None:
        return False if count == 0 else None
    return any(node in _parts(name) for name in names)


def _parts(name: str) -> set[str]:
    """The ONNX nodes in a fused layer's name."""
    return {part.strip() for part in name.split(" + ")}


def _reason(layer: LayerSparsity, eligible: bool | None, chosen: bool | None) -> str:
    if chosen:
        return "a sparse kernel was chosen"
    if not is_valid(layer):
        return f"weights are not 2:4: {layer.reason}"
    if eligible is None:
        return f"weights are 2:4; eligible and chosen: {NOT_REPORTED}"
    if not eligible:
        return "weights are 2:4, and the builder has no sparse kernel for this layer (shape, type or operator)"
    if chosen is None:
        return f"eligible; chosen: {NOT_REPORTED}"
    return "eligible, and a dense kernel was faster"


def is_valid(layer: LayerSparsity) -> bool:
    """Whether every group of a weight is 2:4."""
    return layer.groups > 0 and layer.valid_groups == layer.groups
