"""Compare pruned models with the dense one on inputs no layer was solved on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.accuracy import Evaluator
from repo_manager.errors import CalibrationError, RepoManagerError
from repo_manager.onnx_model.draft import Draft, Weight
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision.calibration.data import CalibrationData
from repo_manager.stats.drift import DriftMeter, OutputDrift

__all__ = [
    "Judge",
    "Judgement",
    "Metric",
    "errors_by_sample",
    "is_better",
    "is_shared",
    "metric_of",
    "upper_bound",
    "worst_drift",
]

Array = NDArray[Any]
Runs = Callable[[Mapping[str, Array]], dict[str, Array]]
Metric = Callable[..., float]
"""Takes a function for one run of the model, and returns how good the model is: greater is better."""

_ALPHA = 0.05
_HARMLESS = 0.2  # risk of keeping a change without a gain on other samples
_MIN_TO_HALVE = 8  # samples of a metric
_HALVES_SEED = 2


@dataclass(frozen=True)
class Judgement:
    """The result of one comparison.

    Attributes:
        drift: error of each output against the dense model.
        upper: output -> with 95 % confidence its drift on inputs of the same kind is below this. Infinite if too few
            samples tell.
        metric: of the user. `None` without one.
    """

    drift: tuple[OutputDrift, ...]
    upper: Mapping[str, float]
    metric: float | None = None

    @property
    def worst(self) -> float:
        """The largest relative error of an output."""
        return max((item.relative_error for item in self.drift), default=0.0)

    @property
    def worst_upper(self) -> float:
        """The largest upper bound of an output."""
        return max(self.upper.values(), default=0.0)


class Judge:
    """Measures models on one set of samples, against the dense model's answers.

    Args:
        model: the ONNX model. It is not changed.
        data: representative inputs of the model.
        folder: scratch folder for temporary models.
        metric: the user's metric. `None`: only the drift is measured.
        part: `choose` or `judge`: the purpose of this judge, passed to a metric with two parameters.
    """

    def __init__(
        self, model: Model, data: CalibrationData, folder: Path, metric: Metric | None = None, part: str = "judge"
    ) -> None:
        self.model, self.data, self.folder, self.metric, self.part = model, data, folder, metric, part
        session = Session(model.path)
        self.names = session.output_names
        self.answers = [session.run(sample) for sample in data.batches()]
        self.dense_metric = None if metric is None else measure_metric(metric, session.run, part)

    def measure(
        self, draft: Draft, changed: Mapping[str, Weight], *, drift: bool = True, alpha: float = _ALPHA
    ) -> Judgement:
        """Measure a draft with some constants changed.

        Args:
            draft: the model as a float32 draft.
            changed: name -> constants to put in place of the draft's. `draft` itself stays.
            drift: `False` asks the metric only.
            alpha: how often the drift may be above its bound, see `upper_bound`.

        Raises:
            CalibrationError: the metric fails, or gives no finite number.
            ModelError: ONNX Runtime does not run the model.
        """
        path = self.folder / "judged.onnx"
        written = write_draft(Draft(draft.proto, {**draft.weights, **changed}), path)
        session = Session(path)
        try:
            metric = None if self.metric is None else measure_metric(self.metric, session.run, self.part)
            if not drift and metric is not None:
                return Judgement((), {}, metric)
            meter = DriftMeter(self.names)

            def outputs() -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
                for sample, answer in zip(self.data.batches(), self.answers, strict=True):
                    found = session.run(sample)
                    meter.add(found, answer)
                    yield found, answer

            errors = errors_by_sample(outputs(), self.names)
            return Judgement(
                meter.result(), {name: upper_bound(pairs, alpha) for name, pairs in errors.items()}, metric
            )
        finally:
            for file in written.files:
                file.unlink()


@dataclass
class SplitMetric:
    """A metric of labelled data, or of a function with one number for each sample.

    One of each two samples, drawn at random, chooses layers, and the other one judges the result. A function with
    one number for all samples does both on the same data.

    Attributes:
        evaluator: scores a model, with one number for each sample where it can.
        shared: whether the same data did both so far.
    """

    evaluator: Evaluator
    shared: bool = True

    def __call__(self, run: Runs, part: str) -> float:
        """Return the mean score of a part: `choose` or `judge`."""
        found = self.evaluator.score_of(run)
        self.shared = found.each is None or len(found.each) < _MIN_TO_HALVE
        if found.each is None or self.shared:
            return found.value
        chooses = np.zeros(len(found.each), bool)
        drawn = np.random.default_rng(_HALVES_SEED).integers(2, size=len(chooses) // 2)
        chooses[2 * np.arange(len(drawn)) + drawn] = True
        return float(found.each[chooses if part == "choose" else ~chooses].mean())


def metric_of(evaluator: Evaluator) -> Metric:
    """Return a metric for labelled data, or for a function with one number for each sample."""
    return SplitMetric(evaluator)


def is_shared(metric: Metric) -> bool:
    """Return whether a metric chooses and judges by the same data. To be asked after it was measured."""
    return getattr(metric, "shared", not _takes_part(metric))


def _takes_part(metric: Metric) -> bool:
    return len(inspect.signature(metric).parameters) > 1


def measure_metric(metric: Metric, run: Runs, part: str) -> float:
    """Ask the user's function.

    Args:
        metric: the quantity that is measured.
        run: function for a run of the model.
        part: name of the measured model, for messages.

    Raises:
        CalibrationError: it fails, or gives no finite number.
    """
    name = getattr(metric, "__name__", "the metric")
    try:
        value = float(metric(run, part) if _takes_part(metric) else metric(run))
    except RepoManagerError:
        raise
    except Exception as exc:
        raise CalibrationError(
            f"metric '{name}': {type(exc).__name__}: {exc}",
            hint="It is called as metric(run) or metric(run, part): run(inputs) gives the outputs by name, part is "
            "'choose' or 'judge'. It returns one number, greater is better.",
        ) from exc
    if not math.isfinite(value):
        raise CalibrationError(f"metric '{name}' is {value}: expected a finite number")
    return value


def errors_by_sample(
    outputs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Return, by output, each sample's squared error and squared size, as `upper_bound` takes them.

    Args:
        outputs: for each sample the outputs of the candidate and of the source, by name.
        names: outputs to compare. Both dictionaries need them all.
    """
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for candidate, source in outputs:
        for name, pairs in errors.items():
            pairs.append(_squares(candidate[name], source[name]))
    return errors


def worst_drift(errors: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Return the largest drift of an output, from `errors_by_sample`."""
    sums = [np.array(pairs, np.float64).sum(axis=0) for pairs in errors.values()]
    return max((math.sqrt(error / size) if size else 0.0 for error, size in sums), default=0.0)


Errors = Mapping[str, Sequence[tuple[float, float]]]


def is_better(before: Errors, after: Errors) -> bool:
    """Return whether one model is closer to its source than another: by Student's one-sided test with 80 % confidence.

    Args:
        before: errors of one model, from `errors_by_sample`.
        after: errors of the other one, on the same samples.
    """
    parts = [
        (np.array(before[name], np.float64), np.array(pairs, np.float64)) for name, pairs in after.items() if pairs
    ]
    gains = sum((old[:, 0] - new[:, 0]) / (old[:, 1].sum() or 1.0) for old, new in parts)
    if np.size(gains) < 2 or not np.isfinite(gains).all():
        return False
    error = float(np.std(gains, ddof=1)) / math.sqrt(np.size(gains))
    return float(np.mean(gains)) > _student(1 - _HARMLESS, np.size(gains) - 1) * error


def _squares(candidate: Array, source: Array) -> tuple[float, float]:
    """Return one sample's squared error and squared size. For types without sizes, the counts of differing elements
    and of all."""
    if candidate.shape != source.shape:
        return math.inf, 1.0
    if source.dtype.kind not in "fV":
        return float(np.count_nonzero(candidate != source)), float(source.size)
    a, b = candidate.astype(np.float64).reshape(-1), source.astype(np.float64).reshape(-1)
    finite = np.isfinite(b)
    error = a[finite] - b[finite]
    return float(error @ error), float(b[finite] @ b[finite])


def upper_bound(pairs: Sequence[tuple[float, float]], alpha: float = _ALPHA) -> float:
    """Bound the drift sqrt(sum of errors / sum of sizes) to expect with more samples of the same kind.

    One-sided: Student's interval of the logarithm, with the jackknife's standard error over samples and a correction
    for their skewness (Hall, "On the removal of skewness by transformation", 1992): few samples are hard. The bound
    holds with the worst sample counted twice, too: few samples seldom show the hardest inputs.

    Args:
        pairs: squared error and squared size of each sample.
        alpha: how often the drift may be above the bound, 0 to 1.

    Returns:
        The bound. Infinite with fewer than two differing samples, 0 if nothing differs.
    """
    worst = max(pairs, key=lambda pair: pair[0], default=(0.0, 0.0))
    return max(_students_bound(pairs, alpha), _students_bound([*pairs, worst], alpha))


def _students_bound(pairs: Sequence[tuple[float, float]], alpha: float) -> float:
    errors, sizes = np.array(pairs, np.float64).reshape(-1, 2).T
    count, total, size = len(errors), float(errors.sum()), float(sizes.sum())
    if total == 0:
        return 0.0
    if count < 2 or not np.isfinite(total) or size == 0:
        return math.inf
    rest, rest_size = total - errors, size - sizes
    if (rest <= 0).any() or (rest_size <= 0).any():  # one sample holds all of it
        return math.inf
    logs = np.log(rest / rest_size)
    moved = logs.mean() - logs  # influence of each sample
    error = math.sqrt((count - 1) / count * float((moved**2).sum()))
    skew = float((moved**3).mean() / (moved**2).mean() ** 1.5) if error > 0 else 0.0
    quantile = _student(1 - alpha, max(count - 2, 1))
    quantile += max(skew, 0.0) / (6 * math.sqrt(count)) * (1 + 2 * quantile**2)
    return math.sqrt(total / size * math.exp(min(quantile * error, 700.0)))


def _student(share: float, degrees: int) -> float:
    """Return a quantile of Student's t: exact up to 2 degrees, else by a series (Abramowitz and Stegun, 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (share - 0.5))
    if degrees == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / degrees**power for power, term in enumerate(terms)))
