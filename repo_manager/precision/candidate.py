"""Build the converted draft for each precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from repo_manager.errors import ModelError, UsageError
from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import Array, Draft
from repo_manager.precision.calibration.ranges import largest_values, overflowing_nodes, percentile_values
from repo_manager.precision.options import ConvertOptions, KeptNode
from repo_manager.precision.passes.lower import lower
from repo_manager.precision.passes.prepare import PreparedDraft, SourceCheck, prepare, prepare_checked
from repo_manager.precision.passes.quantize import quantize
from repo_manager.precision.passes.quantize_plan import plan_quantization
from repo_manager.precision.passes.rounding import rounded
from repo_manager.types import Precision

__all__ = ["Builder", "Candidate", "Keep"]


# Patterns for the nodes to keep in FP32.


class Keep:
    """Says of a node whether one of the patterns names it: by its name, its operator, or an output's name.

    Args:
        patterns: shell patterns (`*`, `?`, `[...]`), case matters.
        names: further nodes to keep, by exact name, with reasons. `None`: no others.
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
        """Return a copy with further kept nodes: name -> why."""
        return Keep(self.patterns, {**names, **self.names})

    def check(self, graph: onnx.GraphProto) -> None:
        """Check whether every pattern names something.

        Raises:
            UsageError: one names nothing. A pattern without effect is a spelling mistake.
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


_QUANTIZED_OPSET = 13  # first opset with per-channel Q/DQ
_LOW_OPSET: dict[str | None, int] = {"bfloat16": 22}  # first opset with bfloat16 in Conv
_LOW: dict[str | None, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_STAGE: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
METHODS = ("minmax", "percentile")
_QUANTIZED = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}


@dataclass(frozen=True)
class Candidate:
    """A converted draft, not proven yet.

    Attributes:
        draft: the converted model, ready to be written.
        kept: nodes left in FP32, with the reason.
        stages: name -> draft after each change of precision, all values float32 (see `rounded`).
    """

    draft: Draft = field(repr=False)
    kept: tuple[KeptNode, ...]
    stages: tuple[tuple[str, Draft], ...] = field(repr=False)

    @property
    def stand_in(self) -> Draft | None:
        """The last stage, when it differs from the written file: the one with rounding to 16-bit values."""
        return None if self.stages[-1][1] is self.draft else self.stages[-1][1]


class Builder:
    """Builds candidates of one precision from one source, with more or fewer nodes kept in FP32.

    Steps independent of the kept nodes (preparation, ranges of activations) are done once.

    Args:
        draft: the model as a float32 draft.
        precision: precision of all candidates. INT8 needs `samples`, too.
        options: settings of the conversion. A bad `keep_fp32`, method or percentile is refused at once.
        samples: calibration inputs, for INT8. Iterated again for each pass.
        folder: scratch folder for temporary models.
        check: compares the prepared model with the source. `None`: it is not compared.

    Raises:
        ModelError: the source's operators cannot take this precision, or preparing it changes its numbers.
        UsageError: a `keep_fp32` pattern names nothing, or an unknown calibration method.
    """

    def __init__(
        self,
        draft: Draft,
        precision: Precision,
        options: ConvertOptions,
        samples: Iterable[Mapping[str, Array]],
        folder: Path,
        check: SourceCheck | None = None,
    ) -> None:
        keep = Keep(options.keep_fp32)
        keep.check(draft.graph)
        self.precision = precision
        self.options = options
        self.keep = keep
        self.samples = samples
        self.folder = folder
        if options.calibration_method not in METHODS:
            raise UsageError(f"calibration method {options.calibration_method!r} is not one of {', '.join(METHODS)}")
        if not 0 < options.percentile <= 100:
            raise UsageError(f"percentile is {options.percentile:g}, and has to be above 0 and at most 100")
        if self.quantizes and (found := _already_quantized(draft)):
            raise ModelError(
                f"the model is quantised already: node '{found.name}' is a {found.op_type}",
                hint="Convert the float32 model, or publish this one as it is with --precision fp32.",
            )
        low = precision.facts.low
        opset = max(_QUANTIZED_OPSET if precision.facts.quantizes else 1, _LOW_OPSET.get(low, 1))
        self.prepared = (
            PreparedDraft(prepare(draft, opset=opset))
            if check is None
            else prepare_checked(draft, opset=opset, check=check)
        )
        self.draft = self.prepared.draft
        self.ranges: dict[str, float] = {}
        self.quantized: frozenset[str] = frozenset()

    @property
    def quantizes(self) -> bool:
        """Return whether INT8 is part of the precision."""
        return self.precision.facts.quantizes

    @property
    def lowers_to_fp16(self) -> bool:
        """Return whether FP16 is part of the precision."""
        return self.precision.facts.low == "float16"

    def keep_overflowing(self, samples: Iterable[Mapping[str, Array]]) -> bool:
        """Keep the nodes FP16 cannot hold from now on. Return whether there is anything more to keep than before."""
        known = len(self.keep.names)
        self.keep = self.keep.also(overflowing_nodes(self.draft, samples, self.folder))
        return len(self.keep.names) > known

    def keep_node(self, name: str, reason: str) -> bool:
        """Keep a node from now on. Return whether there is one of this name not kept before."""
        if name in self.keep.names or all(node.name != name for node in self.draft.graph.node):
            return False
        self.keep = self.keep.also({name: reason})
        return True

    def can_keep(self, name: str) -> bool:
        """Return whether keeping a node would change an INT8 candidate: whether it is quantised."""
        return name in self.quantized

    def _ranges(self, values: Sequence[str]) -> dict[str, float]:
        largest = largest_values(self.draft, values, self.samples, self.folder)
        if self.options.calibration_method == "minmax":
            return largest
        return percentile_values(self.draft, largest, self.samples, self.folder, self.options.percentile)

    def build(self, also_keep: Iterable[str] = ()) -> Candidate:
        """Build the candidate, with further nodes (by name) left in FP32."""
        keep = self.keep.also(dict.fromkeys(also_keep, "needed for the drift to pass (auto_keep)"))
        draft, kept = self.draft, dict[str, tuple[str, str]]()
        stages: list[tuple[str, Draft]] = []
        if self.quantizes:
            plan = plan_quantization(
                draft,
                quantize_outputs=self.options.quantize_outputs,
                keep=keep,
                left_out=self.options.not_in_int8,
            )
            kept.update(plan.kept)
            self.quantized = frozenset(plan.nodes)
            missing = [value for value in plan.values if value not in self.ranges]
            self.ranges.update(self._ranges(missing))
            draft = quantize(draft, plan, self.ranges)
            stages.append(("int8", draft))
        low = _LOW.get(self.precision.facts.low)
        if low is not None:
            lowered = lower(draft, low, keep_io_types=self.options.keep_io_types, keep=keep)
            draft = lowered.draft
            stages.append((_STAGE[low], rounded(draft, low)))
            if not self.quantizes:
                kept.update(lowered.kept)
            else:  # Q/DQ nodes always stay in FP32, so they are not listed
                kept.update({n: k for n, k in lowered.kept.items() if k[0] not in _SCALES})
        nodes = tuple(KeptNode(name, *found, is_found=name in keep.names) for name, found in kept.items())
        return Candidate(draft, nodes, tuple(stages))


_SCALES = {"QuantizeLinear", "DequantizeLinear"}


def _already_quantized(draft: Draft) -> onnx.NodeProto | None:
    return next((node for node in draft.graph.node if node.op_type in _QUANTIZED), None)
