"""The answers of today's configuration, the measure for those of every other one.

A configuration may change a model's answers: a model wrongly said to have a batch axis answers otherwise in a larger
batch. Such a configuration is never proposed, however fast it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from repo_manager.accuracy.evaluate import AccuracyOptions, Evaluator, load_evaluator
from repo_manager.errors import GateError, ServerRefusedError
from repo_manager.loadtest.inputs.samples import make_samples
from repo_manager.loadtest.served_model import connect
from repo_manager.onnx_model.signature import Signature
from repo_manager.request_data.tensors import NUMPY_OF_TRITON
from repo_manager.rollout.comparison import OutputComparison, compare_outputs
from repo_manager.server.client import TritonClient
from repo_manager.stats.accuracy import Accuracy, Score, judge_accuracy
from repo_manager.tuning.measuring import Loads
from repo_manager.tuning.subjects import Subjects
from repo_manager.types import TensorSpec

__all__ = ["Answers", "HeldOut"]

_SAMPLES = 8
_THREADS = 4
_LARGEST_JOINED = 32
Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out data the copies of a model are scored on, and the limits of the score.

    Attributes:
        evaluator: holds the data, and scores a model by its answers to them.
        limits: limits for today's configuration and every other one.
    """

    evaluator: Evaluator
    limits: AccuracyOptions

    @classmethod
    def of(cls, limits: AccuracyOptions | None, subjects: Subjects) -> HeldOut | None:
        """Read the data. Return `None` without limits.

        Raises:
            InputError: the data cannot be used.
            UsageError: `limits.data` has another form.
        """
        if limits is None:
            return None
        message = subjects.models[subjects.tops[0]].config.message()
        axis: tuple[str, ...] = ("batch",) if message.max_batch_size else ()
        inputs, outputs = (
            tuple(
                TensorSpec(tensor.name, _dtype(tensor), (*axis, *(size if size >= 0 else None for size in tensor.dims)))
                for tensor in tensors
            )
            for tensors in (message.input, message.output)
        )
        evaluator = load_evaluator(limits.data, Signature(inputs, outputs, 0, 0, {}))
        limits.check_for(evaluator)
        return cls(evaluator, limits)

    def judge(self, today: Score, found: Score) -> Accuracy:
        """Hold the score of a configuration against today's and against the limits."""
        return judge_accuracy(
            today,
            found,
            data=self.evaluator.source,
            digest=self.evaluator.digest,
            metric=self.evaluator.metric,
            min_accuracy=self.limits.min_accuracy,
            max_drop=self.limits.max_drop,
            beside="today's",
        )


def _dtype(tensor: Any) -> str:
    """Return NumPy's name of a tensor's type in config.pbtxt."""
    kind = type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    name = kind.removeprefix("TYPE_")
    return "string" if name == "STRING" else str(NUMPY_OF_TRITON[name])


class Answers:
    """Asks sets of copies the same, alone, at once and joined, and compares their answers.

    Args:
        loads: puts load on the copies.
        held_out: data the copies are scored on. `None`: they are not scored.

    Attributes:
        notes: models whose answers are not compared, and why.
    """

    def __init__(self, loads: Loads, held_out: HeldOut | None = None) -> None:
        self._loads, self._held_out = loads, held_out
        self._todays_score: Score | None = None
        self._copies = loads.copies
        self._asked: dict[str, list[Tensors]] = {}
        self._expected: dict[str, list[Tensors]] = {}
        self.notes: list[str] = []

    def record(self, copy: str) -> None:
        """Ask today's set. Outputs with two different answers are not compared later.

        Raises:
            ServerRefusedError: it does not answer.
            GateError: its accuracy is below a limit.
        """
        for model in self._copies.subjects.tops:
            served = self._copies.named(copy, model)
            self._asked[model] = self._samples(copy, model)
            with TritonClient.connect(self._copies.url, self._copies.access) as client:
                self._expected[model] = [client.infer(served, None, sample) for sample in self._asked[model]]
            problem = self._difference(copy, model)
            if problem:
                self.notes.append(f"answers of {model} are not compared: today's are not always the same, {problem}")
                del self._asked[model]
        if self._held_out is not None:
            self._todays_score = self._score(copy, self._held_out)
            found = self._held_out.judge(self._todays_score, self._todays_score)
            if not found.passed:
                raise GateError(
                    f"{self._copies.subjects.title}: today's configuration is below the limit: {found.detail}",
                    hint="Nothing was tuned.",
                )

    def differ(self, copy: str) -> str:
        """Return how a set's answers differ from today's. Empty when they do not."""
        problems = (self._difference(copy, model) for model in self._asked)
        return next((problem for problem in problems if problem), "")

    def accuracy(self, copy: str) -> Accuracy | None:
        """Score a set on the held-out data. `record` scores today's first. Return `None` without data.

        Raises:
            InputError: the answers do not fit the labels, or the user's function failed.
        """
        if self._held_out is None or self._todays_score is None:
            return None
        return self._held_out.judge(self._todays_score, self._score(copy, self._held_out))

    def _score(self, copy: str, held_out: HeldOut) -> Score:
        served = self._copies.named(copy, self._copies.subjects.tops[0])
        with TritonClient.connect(self._copies.url, self._copies.access) as client:
            return held_out.evaluator.score_of(lambda inputs: client.infer(served, None, inputs))

    def _samples(self, copy: str, model: str) -> list[Tensors]:
        options = self._loads.options_of(copy, model, rate=(1.0,), distinct=_SAMPLES)
        with connect(options) as served_model:
            facts = served_model.facts()
            samples = make_samples(facts, options)[:_SAMPLES]
            if options.fallback and options.data is None and not options.recorded:
                refused = any(served_model.refusal(sample) is not None for sample in samples[:2])
                if refused:
                    samples = make_samples(facts, dataclasses.replace(options, recorded=options.fallback))[:_SAMPLES]
        return list(samples)

    def _difference(self, copy: str, model: str) -> str:
        """Ask all samples at once from several connections, then joined. Return the first difference."""
        served, tolerance = self._copies.named(copy, model), self._copies.subjects.models[model].tolerance
        asked, expected = self._asked[model], self._expected[model]
        numbers = [list(range(first, len(asked), _THREADS)) for first in range(min(_THREADS, len(asked)))]

        def share(own: Sequence[int]) -> list[tuple[int, Tensors]]:
            with TritonClient.connect(self._copies.url, self._copies.access) as client:
                return [(number, client.infer(served, None, asked[number])) for number in own]

        try:
            with ThreadPoolExecutor(len(numbers)) as threads:
                answers = [answer for found in threads.map(share, numbers) for answer in found]
            for number, answer in answers:
                if wrong := _wrong(compare_outputs(answer, expected[number], tolerance)):
                    return f"to single requests at once: {wrong}"
            return self._joined(served, asked, expected, tolerance)
        except ServerRefusedError as exc:
            return f"a request is refused: {exc.reason or exc.message}"

    def _joined(self, served: str, asked: Sequence[Tensors], expected: Sequence[Tensors], tolerance: float) -> str:
        """Send one request with as many samples as the configuration lets into a batch."""
        with TritonClient.connect(self._copies.url, self._copies.access) as client:
            size = min(int(client.model_config(served).max_batch_size), _LARGEST_JOINED)
            order = [number % len(asked) for number in range(size)]
            shapes = {tuple((name, array.shape) for name, array in sorted(sample.items())) for sample in asked}
            if size < 2 or len(shapes) > 1 or any(array.shape[0] != 1 for array in asked[0].values()):
                return ""
            whole = client.infer(
                served, None, {name: np.concatenate([asked[number][name] for number in order]) for name in asked[0]}
            )
        for row, number in enumerate(order):
            parts = {name: array[row : row + 1] for name, array in whole.items() if array.ndim}
            if wrong := _wrong(compare_outputs(parts, expected[number], tolerance)):
                return f"in a batch of {size}: {wrong}"
        return ""


def _wrong(compared: Sequence[OutputComparison]) -> str:
    """Return the output farthest off, when one is outside its tolerance."""
    failed = [each for each in compared if not each.passed]
    worst = max(failed, key=lambda each: each.error, default=None)
    return "" if worst is None else f"{worst.output} is off by {worst.error:.3g}, allowed {worst.tolerance:.3g}"
