"""The answers for `infer`: responses with their labels, and their form in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import UsageError
from repo_manager.rollout.comparison import OutputComparison
from repo_manager.summary import Summarized
from repo_manager.types import StrPath, as_json

__all__ = ["Answer", "Array", "Inference", "Label", "write_answers"]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Label:
    """A class of an output: its label, its place among the values, and its value."""

    label: str
    index: int
    value: float


@dataclasses.dataclass(frozen=True)
class WrittenOutput:
    """An output as JSON has it.

    Attributes:
        dtype: NumPy's name of the element type. `bytes` for strings.
        shape: the size of each axis, batch axis included.
        data: the values, as lists in lists, one level for each axis.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Any

    @classmethod
    def of(cls, array: Array) -> WrittenOutput:
        """Return an output as JSON has it. Strings other than UTF-8 are escaped."""
        dtype = "bytes" if array.dtype.kind == "O" else str(array.dtype)
        return cls(dtype, array.shape, _storable(array).tolist())


@dataclasses.dataclass(frozen=True)
class AnswerDocument:
    """One response as JSON has it.

    Attributes:
        request: the number of the request it answers, from 1.
        response: its number among the responses to this request, from 1.
        outputs: output name -> type, shape and values.
        elapsed_ns: time since the request was sent.
        labels: output with labels -> for each sample of the batch its highest values.
    """

    request: int
    response: int
    outputs: Mapping[str, WrittenOutput]
    elapsed_ns: int
    labels: Mapping[str, tuple[tuple[Label, ...], ...]]


@dataclasses.dataclass(frozen=True)
class InferenceDocument:
    """All requests and responses as JSON has them.

    Attributes:
        model: name of the model asked.
        version: the version asked. `None`: the server chose.
        url: address of the server asked.
        source: the origin of the requests: a file, or the golden sample.
        requests: number of requests sent. `answers` can have more or fewer if the model is decoupled.
        sequence: correlation ID. `None` without a sequence.
        answers: every response in the order of arrival.
        comparisons: with the golden sample, where sent.
    """

    model: str
    version: int | None
    url: str
    source: str
    requests: int
    sequence: int | str | None
    answers: tuple[AnswerDocument, ...]
    comparisons: tuple[OutputComparison, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
        request: number of the request it answers, from 1.
        response: number among the request's responses, from 1.
        outputs: output name -> array, batch axis included. Strings as bytes.
        elapsed_ns: time since the request was sent.
        labels: output with labels -> for each sample of the batch its highest values.
    """

    request: int
    response: int
    outputs: Mapping[str, Array]
    elapsed_ns: int
    labels: Mapping[str, tuple[tuple[Label, ...], ...]] = dataclasses.field(default_factory=dict)

    def document(self) -> AnswerDocument:
        """Return it as JSON has it: outputs with type, shape and values. Strings other than UTF-8 are escaped."""
        outputs = {name: WrittenOutput.of(array) for name, array in self.outputs.items()}
        return AnswerDocument(self.request, self.response, outputs, self.elapsed_ns, self.labels)


@dataclasses.dataclass(frozen=True, repr=False)
class Inference(Summarized):
    """All requests and answers.

    Attributes:
        model: name of the model asked.
        version: the version asked. `None`: the server chose.
        url: address of the server asked.
        source: the origin of the requests: a file, or the golden sample.
        requests: number of requests sent. `answers` can have more or fewer if the model is decoupled.
        sequence: correlation ID. `None` without a sequence.
        answers: every response in the order of arrival.
        comparisons: with the golden sample, where sent.
    """

    model: str
    version: int | None
    url: str
    source: str
    requests: int
    sequence: int | str | None
    answers: tuple[Answer, ...]
    comparisons: tuple[OutputComparison, ...] = ()

    def document(self) -> InferenceDocument:
        """Return it as `--json` prints it, the arrays as lists."""
        return InferenceDocument(
            model=self.model,
            version=self.version,
            url=self.url,
            source=self.source,
            requests=self.requests,
            sequence=self.sequence,
            answers=tuple(answer.document() for answer in self.answers),
            comparisons=self.comparisons,
        )

    def _summary(self) -> Mapping[str, Any]:
        return {
            "model": self.model if self.version is None else f"{self.model}:{self.version}",
            "server": self.url,
            "requests": f"{self.requests} ({self.source})",
            "answers": len(self.answers),
        }


def write_answers(path: StrPath, inference: Inference) -> None:
    """Write every output: `.json` as nested lists, `.npz` as arrays named as in a golden sample, without its inputs.

    Raises:
        UsageError: another suffix.
        OSError: it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        documents = as_json([answer.document() for answer in inference.answers])
        path.write_text(json.dumps(documents, indent=2) + "\n", "utf-8")
    elif suffix == ".npz":
        arrays: dict[str, Array] = {}
        for answer in inference.answers:
            prefix = "" if answer.request == 1 else f"request{answer.request}."
            prefix += "" if answer.response == 1 else f"response{answer.response}."
            arrays |= {prefix + name: _storable(array) for name, array in answer.outputs.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        raise UsageError(f"--output {path}: expected a file that ends in .npz or .json")


def _storable(array: Array) -> Array:
    if array.dtype.kind != "O":
        return array
    texts = [item.decode(errors="backslashreplace") if isinstance(item, bytes) else str(item) for item in array.flat]
    return np.array(texts, dtype=np.str_).reshape(array.shape)
