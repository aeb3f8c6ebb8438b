"""Options and results of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from repo_manager.sparsity.report import SparsityReport
from repo_manager.stats.accuracy import Accuracy
from repo_manager.stats.drift import OutputDrift
from repo_manager.summary import Summarized
from repo_manager.types import Digest, Precision
from repo_manager.validation import check_fields, check_range

__all__ = ["Check", "Conversion", "ConvertOptions", "KeptNode"]


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert, and the limits for the result.

    Attributes:
        max_drift: largest relative error of any output, |candidate - source| / |source| (Euclidean, over all samples).
            `None` takes the precision's default, and lets probabilities differ by 0.001 at most.
        min_cosine: smallest cosine of any output. `None` sets no limit beyond the one implied by `max_drift`.
        min_top1: smallest share of rows with the top class kept (or one level with it, see `OutputDrift.top1_lost`),
            for outputs in the form of class scores, on calibration data. `None` takes the default.
        keep_fp32: patterns (`*`, `?`) of node names, operators or output names to leave in FP32.
        keep_overflowing: leave operators in FP32 whose values exceed FP16's range on the samples. Each is listed.
            `False` lets the gate fail instead.
        keep_io_types: leave float32 inputs and outputs float32. `False` gives them the low type.
        auto_keep: how many layers may be kept in FP32 to pass the gate. 0 tries none.
        calibration_method: of INT8: `minmax`, or `percentile` (clips the rarest values).
        percentile: share of absolute values, in percent, inside the range picked by `percentile`.
        quantize_outputs: of INT8: also quantise the results of quantised layers where the reader can take INT8.
            TensorRT picks sparse INT8 kernels mostly then.
        shapes: input -> every size, the batch included, of made-up inputs, for models that run with some sizes only.
            Others are found by trying. Calibration data has sizes of its own.
        drift_samples: how many samples the drift is measured on.
        seed: seed of the natural inputs, made where there is no calibration data.
        allow_unchanged: of INT8: write the result also when no operator could become INT8.
        not_in_int8: of INT8: operators and names of nodes the target's builder computes in floating point even where
            the graph asks for INT8. They are left out and listed. `add` fills this in.
        judge_served: of INT8: also run the result as ONNX Runtime serves it on this CPU, and report that number. It
            never decides, because CPUs differ. `add` leaves it out for TensorRT.
    """

    max_drift: float | None = None
    min_cosine: float | None = None
    min_top1: float | None = None
    keep_fp32: tuple[str, ...] = ()
    keep_overflowing: bool = True
    keep_io_types: bool = True
    auto_keep: int = 0
    calibration_method: Literal["minmax", "percentile"] = "minmax"
    percentile: float = 99.99
    quantize_outputs: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    drift_samples: int = 16
    seed: int = 0
    allow_unchanged: bool = False
    not_in_int8: tuple[str, ...] = ()
    judge_served: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("max_drift", self.max_drift)
        check_range("min_cosine", self.min_cosine, least=-1.0, most=1.0)
        check_range("min_top1", self.min_top1, most=1.0)
        check_range("auto_keep", self.auto_keep)
        check_range("percentile", self.percentile, most=100.0)
        check_range("drift_samples", self.drift_samples, least=1)


@dataclass(frozen=True)
class Check:
    """One post-condition.

    Attributes:
        name: subject of the check, such as `signature` or `drift`.
        passed: whether the result passed. One `False` fails the gate.
        detail: the finding, and the deciding rule.
        is_empty: it holds only because there was nothing to see: no 2:4 weight to lose, or samples without an answer
            of the source.
    """

    name: str
    passed: bool
    detail: str
    is_empty: bool = False


@dataclass(frozen=True)
class KeptNode:
    """An operator left in FP32 (of INT8: out of INT8), and why.

    Attributes:
        node: name of the node.
        op_type: operator of the node, such as `Softmax`.
        reason: why it was kept, with the numbers where a value overflows.
        is_found: whether this conversion found out it must be: its values overflow FP16, or the drift passes only so.
            The same graph with other weights need not.
    """

    node: str
    op_type: str
    reason: str
    is_found: bool = False


@dataclass(frozen=True, repr=False)
class Conversion(Summarized):
    """A converted model. It passed every check.

    Attributes:
        source: digest of the source, external files included.
        digest: digest of the written model.
        precision: as asked for, also when some operators stay in FP32.
        files: written files. The model's own is the first.
        checks: in the order they were made.
        drift: one per output, then one per value judged in place of an output.
        sparsity: 2:4 report of the written model.
        accuracy: on held-out data, where a judge was given, else `None`.
        kept: operators left in FP32 (of INT8: out of INT8), each with the reason.
        kept_macs_share: share of the multiply-accumulates these do, 0 to 1. `None`: not counted.
        samples: how many the drift was measured on.
        inputs: where they came from: `held-out` (calibration data no scale was made from), `calibration` or `natural`
            (seeded random numbers).
        tools: name -> version of the tools used.
        seconds: wall-clock time of it all.
    """

    source: Digest
    digest: Digest
    precision: Precision
    files: tuple[Path, ...]
    checks: tuple[Check, ...]
    drift: tuple[OutputDrift, ...]
    sparsity: SparsityReport
    kept: tuple[KeptNode, ...]
    kept_macs_share: float | None
    samples: int
    inputs: str
    tools: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    accuracy: Accuracy | None = None

    def _summary(self) -> Mapping[str, Any]:
        return {
            "precision": self.precision,
            "largest drift": f"{self.worst_drift:.3g} on {self.samples} {self.inputs} samples",
            "accuracy": None
            if self.accuracy is None
            else f"{self.accuracy.value:.4g} (source {self.accuracy.source:.4g})",
            "checks": f"{sum(check.passed for check in self.checks)} of {len(self.checks)} passed",
            "kept in FP32": len(self.kept) or None,
            "files": ", ".join(str(file) for file in self.files) or None,
        }

    @property
    def worst_drift(self) -> float:
        """The largest relative error judged, 16-bit rounding included. 0.0 where nothing was."""
        return max((item.worst for item in self.drift if not item.judged_by), default=0.0)
