"""The result of `prune`: the layers it pruned and those it left, and the evidence for its choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from repo_manager.stats.accuracy import Accuracy
from repo_manager.stats.drift import OutputDrift
from repo_manager.summary import Summarized
from repo_manager.types import Digest

__all__ = [
    "BudgetEvidence",
    "DistillationEvidence",
    "FrontPoint",
    "PermutationEvidence",
    "PruneEvidence",
    "PruneReport",
    "PrunedLayer",
    "SkippedLayer",
]

RETRAIN_ADVICE = (
    "Pruning without retraining costs accuracy. Retrain with the masks fixed (NVIDIA's recipe: train dense, "
    "prune, train again with the same schedule), then export again."
)


@dataclass(frozen=True)
class PrunedLayer:
    """One weight pruned.

    Attributes:
        node: the first node with it.
        weight: name of the stored tensor.
        shape: as that node uses it.
        axis: the reduction axis of `shape`.
        values: how many values it has.
        removed: how many non-zero values became zero.
        lost_magnitude: their share of the sum of all magnitudes, 0 to 1.
        error: of its outputs against the dense model's on the calibration data, relative. `None` without data.
        magnitude_error: the same for weights from magnitude pruning.
        shifted: the constant with the change of its outputs' means. `None`: none could.
        macs: multiply-accumulates per sample. `None` when not known.
        damping: share of its Hessian's mean diagonal, added to solve it. `None` for magnitude pruning.
    """

    node: str
    weight: str
    shape: tuple[int, ...]
    axis: int
    values: int
    removed: int
    lost_magnitude: float
    error: float | None = None
    magnitude_error: float | None = None
    shifted: str | None = None
    macs: int | None = None
    damping: float | None = None


@dataclass(frozen=True)
class SkippedLayer:
    """One weight left alone, and why."""

    node: str
    weight: str
    reason: str


@dataclass(frozen=True)
class FrontPoint:
    """One set of layers open to pruning, and its cost, on samples to choose by.

    Attributes:
        layers: how many layers are pruned in this set, in all.
        added: those the point before has not, by name. Empty for the final set.
        macs_share: share of the model's multiply-accumulates able to run sparse.
        drift: the worst output's relative error. `None` if a metric counts.
        drift_upper: the 95 % bound for this one set. Sets are chosen by it, so only the bound of the result, on samples
            that chose nothing, predicts other inputs.
        metric: the user's metric. `None` if the drift counts.
        final: its layers are solved one behind the other, as in the result. Elsewhere each is solved on its own.
    """

    layers: int
    added: tuple[str, ...]
    macs_share: float
    drift: float | None
    drift_upper: float | None
    metric: float | None
    final: bool


@dataclass(frozen=True)
class BudgetEvidence:
    """How layers were chosen within a budget.

    Attributes:
        kind: `drift` with `PruneOptions.max_drift`, `metric` with `PruneOptions.metric`.
        limit: of the drift, or of how far the metric may fall.
        samples: how many the layers were chosen by. 0 with a metric: it has data of its own.
        looks: how many sets were measured on the held-out samples. Above 1 the first ones exceeded the limit there. The
            bounds in `PruneEvidence.drift_upper` are corrected for them: look k spends 6 / (pi k)^2 of the 5 %.
        dense_metric: the dense model's, when it judges. `None` without a metric.
        metric: the pruned model's, when it judges.
        front: all measurements, from few layers to all.
        shared: the metric judges by the data that chose the layers. Its value on other data is then lower.
    """

    kind: str
    limit: float
    samples: int
    looks: int
    dense_metric: float | None
    metric: float | None
    front: tuple[FrontPoint, ...]
    shared: bool = False


@dataclass(frozen=True)
class PermutationEvidence:
    """Channels permuted before the choice of the mask.

    Attributes:
        channels: how many could change places.
        layers: the weights whose input channels did.
        kept_before: share of their magnitude kept by 2:4 in the order of the source.
        kept_after: the same in the new order.
        largest_difference: of an output of the permuted dense model against the source's on a sample, as a share of the
            output's largest value: sums in another order round otherwise.
    """

    channels: int
    layers: tuple[str, ...]
    kept_before: float
    kept_after: float
    largest_difference: float


@dataclass(frozen=True)
class DistillationEvidence:
    """How the pruned model was trained against the dense one.

    Attributes:
        epochs: how often each sample was trained on.
        kept_epoch: the one whose values are kept; 0: none did better than no training.
        samples: how many the values were trained on.
        choosing_samples: how many the epoch was chosen by.
        errors: the worst output's relative error on the latter, before training and after each epoch.
        trained: how many tensors were trained: pruned weights, biases and scales.
        largest_difference: of PyTorch's outputs from ONNX Runtime's for the dense model, as a share of the output's
            largest value.
    """

    epochs: int
    kept_epoch: int
    samples: int
    choosing_samples: int
    errors: tuple[float, ...]
    trained: int
    largest_difference: float = 0.0


@dataclass(frozen=True)
class PruneEvidence:
    """The data layers were solved on, and the distance of the pruned model from the dense one.

    Attributes:
        data: where the calibration data came from.
        data_digest: of all samples, those held out included.
        samples: how many the layers were solved on.
        judged_on: `held-out`, or `calibration` when there were too few samples to hold some out.
        judged_samples: how many samples `drift` was measured on.
        drift: error of each output against the dense model.
        magnitude_drift: the same for the model whose same layers are pruned by magnitude.
        macs: of the whole model, per sample.
        sparse_macs: of the pruned layers, per sample. Layers without a known number add 0.
        seed: of the draws of columns.
        versions: of the libraries that computed.
        drift_upper: output -> with 95 % confidence, its drift on inputs of the same kind is below this. `None`: the
            judging samples are those the layers were solved on, so nothing is known of others.
        budget: how layers were chosen. `None`: all were pruned.
        permutation: of channels. `None`: none was asked for.
    """

    data: str
    data_digest: Digest
    samples: int
    judged_on: str
    judged_samples: int
    drift: tuple[OutputDrift, ...]
    magnitude_drift: tuple[OutputDrift, ...]
    macs: int
    sparse_macs: int
    seed: int
    versions: Mapping[str, str]
    drift_upper: Mapping[str, float] | None = None
    budget: BudgetEvidence | None = None
    permutation: PermutationEvidence | None = None
    distillation: DistillationEvidence | None = None


@dataclass(frozen=True, repr=False)
class PruneReport(Summarized):
    """The result of `prune`.

    Attributes:
        source: digest of the model it started from.
        pruned: one entry per pruned tensor, in the graph's order.
        skipped: one entry per use left alone, with the reason.
        advice: why and how to retrain.
        method: `magnitude`, or `second-order` with calibration data.
        evidence: measurements on the calibration data. `None` for magnitude pruning.
        accuracy: on held-out data with known answers, where it was asked for.
    """

    source: Digest
    pruned: tuple[PrunedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    advice: str = RETRAIN_ADVICE
    method: str = "magnitude"
    evidence: PruneEvidence | None = None
    accuracy: Accuracy | None = None

    def with_distillation(self, found: DistillationEvidence | None) -> PruneReport:
        """Return the report of a model trained afterwards.

        Args:
            found: evidence of the training. `None` changes nothing.
        """
        if found is None or self.evidence is None:
            return self
        return replace(self, evidence=replace(self.evidence, distillation=found))

    def _summary(self) -> Mapping[str, Any]:
        evidence = self.evidence
        drift = max((item.worst for item in evidence.drift), default=None) if evidence is not None else None
        return {
            "method": self.method,
            "pruned": f"{len(self.pruned)} layers",
            "left alone": len(self.skipped),
            "largest drift": None if drift is None else f"{drift:.3g}",
        }
