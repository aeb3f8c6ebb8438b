"""How far a candidate's outputs are from the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["DriftMeter", "OutputDrift", "looks_like_scores", "relative_error", "table"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutputDrift:
    """How far one output is from the source's, over all samples.

    Attributes:
        output: name of the output, or of the inner value if `is_output` is `False`.
        cosine: of the two, all samples joined. 1.0 is equal. `None` for types with no angle.
        relative_error: |candidate - source| / |source|. For integers, booleans and strings the share of elements that
            differ. Infinite when shapes differ or a number became NaN or infinite.
        max_abs_error: largest difference of one element. 0 for integers, booleans and strings, infinite for other
            shapes or NaN.
        top1_agreement: share of rows with the same top class. `None` when the output is no class score.
        rounded_relative_error: the relative error when each 16-bit value is rounded as it is written, as a GPU does.
            ONNX Runtime's CPU computes FP16 in FP32 and shows less. `None`: not 16-bit.
        samples: samples the numbers are over, one for each `DriftMeter.add`.
        rows: how many rows `top1_agreement` was counted over.
        calibration_relative_error: INT8: the relative error on samples the scales were calibrated with. The other
            numbers are of held-out ones. `None`: no samples were held out.
        served_relative_error: INT8: the relative error as ONNX Runtime serves it on this CPU, with its fused kernels.
            `relative_error` is of the arithmetic in the file, the same on every machine. `None`: not measured.
        judged_by: values judged in place of this output, a selection (boxes kept, top classes) whose members or number
            change with the smallest error. Empty: the output itself is judged.
        is_output: `False` for such a value.
        top1_lost: in how many of them another class came first the source does not rank level with its own (closer
            than `max_drift` times the spread of the row's scores).
    """

    output: str
    cosine: float | None
    relative_error: float
    max_abs_error: float
    top1_agreement: float | None
    rounded_relative_error: float | None = None
    samples: int = 0
    rows: int = 0
    top1_lost: int = 0
    calibration_relative_error: float | None = None
    served_relative_error: float | None = None
    judged_by: tuple[str, ...] = ()
    is_output: bool = True

    @property
    def worst(self) -> float:
        """The larger of the relative errors with and without 16-bit rounding."""
        return max(self.relative_error, self.rounded_relative_error or 0.0)


def relative_error(candidate: Array, source: Array) -> float:
    """Return |candidate - source| / |source| (Euclidean). Infinite when shapes differ or only one is finite."""
    meter = _Sums()
    meter.add(candidate, source)
    return meter.relative_error


@dataclass
class _Sums:
    """Running sums over samples, in float64."""

    dot: float = 0.0
    source_square: float = 0.0
    candidate_square: float = 0.0
    error_square: float = 0.0
    max_abs: float = 0.0
    broken: bool = False
    rows: int = 0
    same_top: int = 0
    lost_top: int = 0
    is_float: bool = True
    elements: int = 0
    different: int = 0

    def add(self, candidate: Array, source: Array) -> None:
        if candidate.shape != source.shape:
            self.broken = True
            return
        if source.dtype.kind not in "fV" and source.dtype.name != "bfloat16":
            self.is_float = False
            self.elements += source.size
            self.different += int(np.count_nonzero(candidate != source))
            return
        a, b = candidate.astype(np.float64).reshape(-1), source.astype(np.float64).reshape(-1)
        finite = np.isfinite(b)
        if not finite.all():
            same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
            self.broken = self.broken or not same
            a, b = a[finite], b[finite]
        if not np.isfinite(a).all():
            self.broken = True
            return
        error = a - b
        self.dot += float(a @ b)
        self.source_square += float(b @ b)
        self.candidate_square += float(a @ a)
        self.error_square += float(error @ error)
        self.max_abs = max(self.max_abs, float(np.abs(error).max(initial=0.0)))

    def add_rows(self, candidate: Array, source: Array, tie: float) -> None:
        if candidate.shape == source.shape:
            self.rows += source.shape[0]
            rows, before, after = np.arange(source.shape[0]), source.argmax(axis=1), candidate.argmax(axis=1)
            self.same_top += int(np.count_nonzero(before == after))
            with np.errstate(all="ignore"):
                margin = source[rows, before] - source[rows, after]
                self.lost_top += int(np.count_nonzero(margin > tie * source.std(axis=1)))

    @property
    def relative_error(self) -> float:
        if self.broken:
            return float("inf")
        if not self.is_float:
            return self.different / self.elements if self.elements else 0.0
        if self.error_square == 0.0:
            return 0.0
        if self.source_square == 0.0:
            return float("inf") if self.max_abs > 1e-6 else 0.0
        return float(np.sqrt(self.error_square / self.source_square))

    @property
    def cosine(self) -> float | None:
        if not self.is_float:
            return None
        if self.broken:
            return 0.0
        if self.error_square == 0.0:
            return 1.0
        size = np.sqrt(self.source_square * self.candidate_square)
        return float(self.dot / size) if size > 0 else 0.0


class DriftMeter:
    """Accumulates the drift of every output, sample by sample, holding no sample.

    Args:
        outputs: names to measure. Both mappings given to `add` must have each.
        tie: two classes whose scores differ, in the source, by less than this share of the spread (standard
            deviation) of the row's scores are level: either may come first.
    """

    def __init__(self, outputs: Sequence[str], tie: float = 0.0) -> None:
        self.tie = tie
        self.sums = {name: _Sums() for name in outputs}
        self.samples = 0

    def add(self, candidate: Mapping[str, Array], source: Mapping[str, Array]) -> None:
        """Add one sample's outputs."""
        self.samples += 1
        for name, sums in self.sums.items():
            sums.add(candidate[name], source[name])
            if looks_like_scores(source[name]):
                sums.add_rows(candidate[name], source[name], self.tie)

    def result(self) -> tuple[OutputDrift, ...]:
        """Return the drift of each output over all samples so far."""
        return tuple(
            OutputDrift(
                output=name,
                cosine=sums.cosine,
                relative_error=sums.relative_error,
                max_abs_error=sums.max_abs if not sums.broken else float("inf"),
                top1_agreement=sums.same_top / sums.rows if sums.rows else None,
                samples=self.samples,
                rows=sums.rows,
                top1_lost=sums.lost_top,
            )
            for name, sums in self.sums.items()
        )


def looks_like_scores(output: Array) -> bool:
    """Return whether an output looks like one row of class scores per sample: floats of shape [N, classes > 1]."""
    return output.dtype.kind == "f" and output.ndim == 2 and output.shape[1] > 1


def table(drift: Sequence[OutputDrift]) -> str:
    """Return the drift as a plain table, one line an output."""
    head = ("output", "relative error", "cosine", "largest error", "same top class")
    rows = [head]
    for item in drift:
        rows.append(
            (
                item.output if item.is_output else f"({item.output})",
                f"{item.worst:.3g}",
                "-" if item.cosine is None else f"{item.cosine:.6f}",
                f"{item.max_abs_error:.3g}",
                "-" if item.top1_agreement is None else f"{item.top1_agreement:.1%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
