"""Answers of a served model against recorded ones, and against its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from repo_manager.repository.golden import Golden
from repo_manager.rollout.reference import DATA_TYPE, Array, as_served, dims_of, numpy_type
from repo_manager.triton_config.config import ModelConfig

__all__ = [
    "OutputComparison",
    "compare_outputs",
    "compare_recorded",
    "is_of_shape",
    "is_of_type",
    "type_name",
    "unlike_counts",
    "unlike_promised",
]


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output against its reference.

    Attributes:
        output: its name. In a sequence with the request's number, of several responses with the response's.
        error: largest `|served - reference|`, divided by the largest `|reference|`. For other than floats the share of
            elements that differ.
        tolerance: the largest `error` accepted. 0 where values other than floats were compared.
    """

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance


def compare_recorded(
    golden: Golden, answers: Sequence[Sequence[Mapping[str, Array]]], config: ModelConfig, tolerance: float
) -> tuple[OutputComparison, ...]:
    """Compare the responses to a sample's requests with the recorded ones, in order.

    Args:
        golden: the sample recorded with the version.
        answers: of each request the responses, as many as were recorded.
        config: gives the shapes of reshaped outputs.
        tolerance: largest accepted error of each output.
    """
    outputs = {entry.name: entry for entry in config.message().output}
    batched = config.max_batch_size > 0
    comparisons: list[OutputComparison] = []
    for number, (exchange, responses) in enumerate(zip(golden.exchanges, answers, strict=True), start=1):
        of_request = f"request {number}" if len(golden.exchanges) > 1 else ""
        for place, (served, recorded) in enumerate(zip(responses, exchange.responses, strict=True), start=1):
            of_response = f"response {place}" if len(responses) > 1 else ""
            expected = {
                key: as_served(array, dims_of(outputs[key], batched), batched)
                if key in outputs and getattr(served.get(key), "shape", None) != array.shape
                else array
                for key, array in recorded.items()
            }
            where = ", ".join(filter(None, (of_request, of_response)))
            comparisons += compare_outputs(served, expected, tolerance, where)
    return tuple(comparisons)


def unlike_counts(golden: Golden, answers: Sequence[Sequence[Mapping[str, Array]]]) -> list[str]:
    """List the requests answered with more or fewer responses than recorded.

    Args:
        golden: the sample recorded with the version.
        answers: responses to each of its requests.
    """
    several = len(golden.exchanges) > 1
    return [
        f"{f'request {number}' if several else 'the request'} with {len(responses)} responses, "
        f"recorded were {len(exchange.responses)}"
        for number, (exchange, responses) in enumerate(zip(golden.exchanges, answers, strict=True), start=1)
        if len(responses) != len(exchange.responses)
    ]


def type_name(output: Any) -> str:
    """Return the name of an output's data type, as `TYPE_FP32`.

    Args:
        output: an `output` entry of the configuration's message. Only its `data_type` is read.
    """
    return str(DATA_TYPE.values_by_number[output.data_type].name)


def is_of_type(array: Array, promised: str) -> bool:
    """Return whether an array is of a data type of the configuration.

    Args:
        array: output as the client gives it.
        promised: name of the data type, as `TYPE_FP32`.
    """
    wanted = [numpy_type(promised) or array.dtype]
    if promised == "TYPE_BF16":
        wanted.append(np.dtype(np.float32))  # clients return BF16 as float32
    return array.dtype in wanted


def is_of_shape(array: Array, dims: list[int]) -> bool:
    """Return whether an array has the dims of the configuration.

    Args:
        array: output as the client gives it.
        dims: with the batch axis. -1 is any size.
    """
    return len(dims) == array.ndim and all(size in (-1, have) for size, have in zip(dims, array.shape, strict=True))


def unlike_promised(config: ModelConfig, responses: Iterable[Mapping[str, Array]]) -> list[str]:
    """List the outputs whose type or shape differs from config.pbtxt. Triton does not check them.

    Args:
        config: configuration of the model (config.pbtxt).
        responses: output name -> array, of each response. Outputs unknown to `config` are skipped.
    """
    outputs = {entry.name: entry for entry in config.message().output}
    batched = config.max_batch_size > 0
    found: dict[str, tuple[str, str]] = {}
    for response in responses:
        for name, array in response.items():
            if array is None or name not in outputs:
                continue
            promised, dims = type_name(outputs[name]), dims_of(outputs[name], batched)
            if not is_of_type(array, promised):
                found[f"output {name} comes as"] = str(array.dtype), promised
            if not is_of_shape(array, dims):
                found[f"output {name} comes with the shape"] = str(list(array.shape)), str(dims)
    return [
        f"{what} {came}, and config.pbtxt promises {promised}: correct one of them"
        for what, (came, promised) in found.items()
    ]


def compare_outputs(
    served: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float, where: str = ""
) -> tuple[OutputComparison, ...]:
    """Compare a response's outputs with the reference. A missing output is infinitely far off.

    Args:
        served: output name -> array of the response. `None` counts as missing.
        expected: output name -> the reference. Other outputs are not compared.
        tolerance: largest accepted error of each output.
        where: the request and the response, where there are several.
    """
    suffix = f" ({where})" if where else ""
    return tuple(
        _compare(f"{key}{suffix}", served[key], array, tolerance)
        if served.get(key) is not None
        else OutputComparison(f"{key}{suffix}", float("inf"), tolerance)
        for key, array in expected.items()
    )


def _compare(name: str, served: Array, expected: Array, tolerance: float) -> OutputComparison:
    if served.shape != expected.shape:
        return OutputComparison(name, float("inf"), tolerance)
    if expected.dtype.kind == "O":
        pairs = zip(served.ravel().tolist(), expected.ravel().tolist(), strict=True)
        differ = sum(_text(one) != _text(other) for one, other in pairs)
        return OutputComparison(name, differ / max(1, served.size), 0.0)
    if expected.dtype.kind not in "fV":
        return OutputComparison(name, float(np.mean(served != expected)) if served.size else 0.0, 0.0)
    one, other = served.astype(np.float64), expected.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if bool(same.all()):
        return OutputComparison(name, 0.0, tolerance)
    scale = float(np.nanmax(np.abs(other[np.isfinite(other)]), initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):
        error = np.abs(one - other)[~same] / scale
    return OutputComparison(name, float("inf") if bool(np.isnan(error).any()) else float(error.max()), tolerance)


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
