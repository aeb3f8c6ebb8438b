"""Score models on held-out data with labels, or by a function of the user's, and hold the score against limits."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.accuracy.labels import correct_answers, labels_of
from repo_manager.errors import GateError, InputError, UsageError
from repo_manager.files import sha256_file, work_folder
from repo_manager.onnx_model.batch_axis import find_batch_axis
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.precision.calibration.arrays import array_of_npz, from_npz
from repo_manager.precision.calibration.data import CalibrationData
from repo_manager.precision.calibration.load import load_function
from repo_manager.stats.accuracy import Accuracy, Score, judge_accuracy
from repo_manager.types import Digest, StrPath
from repo_manager.validation import check_fields, check_range

__all__ = ["AccuracyGate", "AccuracyOptions", "Evaluator", "Run", "load_evaluator"]

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Runs a model once: input name -> array, batch axis included, to output name -> array."""
_FEWEST_TOGETHER, _TOGETHER = 16, 32  # samples; with fewer, finding the batch axis takes longer
_FORMS = "FILE.npz:LABELS, FILE.npz:LABELS:OUTPUT, or module:function"


@dataclasses.dataclass(frozen=True)
class AccuracyOptions:
    """Held-out data, and a model's limits on it.

    Attributes:
        data: `FILE.npz:LABELS`, an array for each input and one of class numbers. `FILE.npz:LABELS:OUTPUT` for a model
            with several outputs. Or `module:function`, called with a function for a run of the model (input name ->
            array to output name -> array). It returns one number, or one for each sample. Higher is better.
        min_accuracy: the smallest score accepted. `None` for none.
        max_drop: the largest drop below the source's score accepted. `None` for none.
    """

    data: str
    min_accuracy: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("min_accuracy", self.min_accuracy, least=-math.inf)
        check_range("max_drop", self.max_drop)

    def check_for(self, evaluator: Evaluator) -> None:
        """Check the limits: a share of right answers is at most 1. A function may score in other units.

        Raises:
            UsageError: a limit is above 1.
        """
        if evaluator.digest is not None:
            check_range("min_accuracy", self.min_accuracy, most=1.0)
            check_range("max_drop", self.max_drop, most=1.0)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Scores models with the same inputs and outputs.

    Attributes:
        source: where the data came from, or the function.
        digest: of the data. `None` for a function.
        metric: name of the score in reports: `top-1 accuracy`, `accuracy`, or the function as `module:function`.
    """

    source: str
    digest: Digest | None
    metric: str
    _evaluate: Callable[[Run], Score] = dataclasses.field(repr=False, compare=False)

    def score(self, model: Model | Path, *, optimize: bool = True) -> Score:
        """Run a model on the data, by ONNX Runtime on the CPU.

        Args:
            model: a loaded model, or an ONNX file. float16 inputs get float16 where the data are float32.
            optimize: `False` runs the graph as it is written: INT8 is then the same on every CPU.

        Raises:
            ModelError: ONNX Runtime does not run it.
            InputError: the outputs do not fit the labels, or the function failed.
        """
        session = Session(model, optimize=optimize)
        return self._evaluate(lambda inputs: session.run(session.as_taken(inputs)))

    def score_of(self, run: Run) -> Score:
        """Score whatever `run` runs.

        Raises:
            InputError: the outputs do not fit the labels, or the function failed.
        """
        return self._evaluate(run)


@dataclasses.dataclass(frozen=True)
class AccuracyGate:
    """Compares models made of one model with the model itself and with limits.

    Attributes:
        evaluator: scores the source and every model made of it, on the same data.
        options: the limits on score and drop.
        baseline: the source's score, measured by `of`. `max_drop` counts from it.
    """

    evaluator: Evaluator
    options: AccuracyOptions
    baseline: Score

    @classmethod
    def of(cls, options: AccuracyOptions, source: Model) -> AccuracyGate:
        """Load the data and score the source.

        Raises:
            InputError: the data cannot be used.
            UsageError: `options.data` has another form.
            ModelError: ONNX Runtime does not run the source.
        """
        evaluator = load_evaluator(options.data, signature_of(source), model=source)
        options.check_for(evaluator)
        return cls(evaluator, options, evaluator.score(source))

    def judge(self, model: Path, optimize: bool = True) -> Accuracy:
        """Score a file made of the source.

        Raises:
            ModelError: ONNX Runtime does not run it.
            InputError: its outputs do not fit the labels, or the function failed.
        """
        return judge_accuracy(
            self.baseline,
            self.evaluator.score(model, optimize=optimize),
            data=self.evaluator.source,
            digest=self.evaluator.digest,
            metric=self.evaluator.metric,
            min_accuracy=self.options.min_accuracy,
            max_drop=self.options.max_drop,
        )

    def save(self, proto: onnx.ModelProto, path: Path, *, external: bool | None = None, keep: bool = True) -> Accuracy:
        """Write a model made of the source, if it is good enough. Otherwise nothing.

        Args:
            proto: the ONNX model. Large weights may be cut out.
            path: where to write. Its folder must exist.
            external: as in `save_model`: `None` writes a data file above 2 GB only.
            keep: `False` scores the model in a temporary folder and leaves nothing at `path`.

        Raises:
            GateError: it is below a limit.
            ModelError: ONNX Runtime does not run it.
            OSError: it cannot be written.
        """
        place = path.parent if keep else None
        with work_folder("repo-manager-score-" if place is None else f".{path.name}.", place) as folder:
            files = save_model(proto, Path(folder, path.name), external=external)
            found = self.judge(files[0])
            if not found.passed:
                raise GateError(
                    f"{path}: the accuracy gate failed: {found.detail}", hint=f"Nothing was written to {path}."
                )
            for file in reversed(files) if keep else ():
                file.replace(path.parent / file.name)
        return found


def load_evaluator(data: StrPath, signature: Signature, *, model: Model | None = None) -> Evaluator:
    """Read the data for scoring models.

    Args:
        data: see `AccuracyOptions`. A function is imported from the current folder or the environment, and so runs
            code: a caller with its name from a file asks the user first.
        signature: the model's inputs and outputs.
        model: one of them. Where its first axis is a batch axis, samples run together. `None`: one at a time.

    Raises:
        UsageError: it has another form.
        InputError: the data cannot be read, or do not fit the signature.
    """
    text = os.fspath(data)
    file, separator, names = text.rpartition(".npz:")
    if separator:
        labels, _, output = names.partition(":")
        return _of_labels(Path(f"{file}.npz"), labels, output, signature, model)
    module, separator, function = text.partition(":")
    if separator and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Evaluator(text, None, text, lambda run: _called(text, run))
    if text.endswith(".npz"):
        raise UsageError(f"--eval {text}: which of its arrays holds the labels?", hint=f"Expected {_FORMS}.")
    raise UsageError(f"--eval {text}: expected {_FORMS}")


def _of_labels(path: Path, name: str, output: str, signature: Signature, model: Model | None) -> Evaluator:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", hint=f"--eval takes {_FORMS}.")
    labels = labels_of(array_of_npz(path, name), f"{path}: '{name}'")
    samples = from_npz(path, signature, with_others=True)
    chosen = _chosen_output(output, name, signature)
    if not samples.count or labels.shape[0] % samples.count:
        raise InputError(f"{path}: '{name}' has {labels.shape[0]} labels for {samples.count} samples")
    single = all(spec.shape is None or len(spec.shape) < 3 for spec in signature.outputs if spec.name == chosen)
    metric = "top-1 accuracy" if single and labels.ndim == 1 else "accuracy"
    where = f"output '{chosen}'"
    is_batched = model is not None and samples.count >= _FEWEST_TOGETHER and find_batch_axis(model, signature).batched
    together = _TOGETHER if is_batched else 1
    rows = labels.shape[0] // samples.count

    def evaluate(run: Run) -> Score:
        rights = []
        for index, answer in enumerate(_answers(run, samples, chosen, together)):
            part = labels[index * rows : (index + 1) * rows]
            rights.append(correct_answers(_rows(answer, part.shape[0], where), part, where))
        counted = [right for right in rights if right.size]
        if not counted:
            raise InputError(f"{path}: '{name}' has no label that counts (all are below 0)")
        each = np.array([right.mean() for right in counted])
        return Score(float(np.concatenate(counted).mean()), each)

    given = f"{path.name}:{name}:{output}" if output else f"{path.name}:{name}"
    return Evaluator(given, sha256_file(path), metric, evaluate)


def _chosen_output(output: str, labels: str, signature: Signature) -> str:
    """Return the output the labels are about: the one named, the one of the labels' name, or the only one.

    Raises:
        UsageError: there is no such output, or it is not clear which.
    """
    names = [spec.name for spec in signature.outputs]
    listed = ", ".join(names)
    if output and output not in names:
        raise UsageError(f"--eval: the model has no output '{output}'", hint=f"Its outputs are {listed}.")
    if output or labels in names:
        return output or labels
    if len(names) > 1:
        raise UsageError(
            f"--eval: the model has the outputs {listed}; which one do the labels belong to?",
            hint=f"Name it: --eval FILE.npz:{labels}:OUTPUT",
        )
    return names[0]


def _answers(run: Run, samples: CalibrationData, output: str, together: int) -> Iterator[Array]:
    """Yield an output's answer to each sample. Up to so many samples of the same shapes run together."""
    waiting: list[dict[str, Array]] = []
    for sample in samples.batches():
        if waiting and (len(waiting) == together or _shapes(sample) != _shapes(waiting[0])):
            yield from _answers_of(run, waiting, output)
            waiting = []
        waiting.append(sample)
    yield from _answers_of(run, waiting, output)


def _shapes(sample: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in sample.items()}


def _answers_of(run: Run, samples: Sequence[Mapping[str, Array]], output: str) -> list[Array]:
    if len(samples) > 1:
        joined = np.asarray(
            run({name: np.concatenate([each[name] for each in samples]) for name in samples[0]})[output]
        )
        size = next(iter(samples[0].values())).shape[0]
        if joined.ndim and joined.shape[0] == size * len(samples):
            return [joined[start : start + size] for start in range(0, joined.shape[0], size)]
    return [np.asarray(run(sample)[output]) for sample in samples]


def _rows(answer: Array, rows: int, where: str) -> Array:
    """Return an output with one entry for each row of labels along its first axis."""
    found = np.asarray(answer, np.float64 if answer.dtype.kind not in "iubO" else None)
    if found.ndim and found.shape[0] == rows:
        return found
    if rows == 1:
        return found[None]
    raise InputError(f"{where} has shape {list(found.shape)} for a sample of {rows} labels")


def _called(text: str, run: Run) -> Score:
    """Call `module:function`. This runs the user's code, as asked.

    Raises:
        CalibrationError: it cannot be imported.
        InputError: it failed, or returned no finite number.
    """
    function = load_function(text)
    try:
        returned = function(run)
        each = np.asarray(returned, np.float64)
    except Exception as exc:
        raise InputError(
            f"--eval {text}: {type(exc).__name__}: {exc}",
            hint="It gets a function to run the model with, and returns a number.",
        ) from exc
    if each.ndim > 1 or not each.size or not np.isfinite(each).all():
        raise InputError(f"--eval {text} returned {returned!r:.80}, expected a number, or one for each sample")
    return Score(float(each)) if each.ndim == 0 else Score(float(each.mean()), each)
