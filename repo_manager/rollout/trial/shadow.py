"""A trial's recorded requests, and the result of mirroring them to two versions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from repo_manager.errors import InputError
from repo_manager.gates import GateResult, Outcome
from repo_manager.request_data.read import read_streams
from repo_manager.request_data.tensors import Array, InputFacts
from repo_manager.stats.drift import OutputDrift
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_messages import model_config_pb2

__all__ = ["Array", "Exchange", "LatencySummary", "ShadowReport", "read_exchanges"]


# Recorded requests of a trial. They have a batch axis if the model does.

Request = Mapping[str, Array]
"""Input name -> array, batch axis included where the model has one."""

Exchange = Sequence[Request]
"""The unit sent to both versions and compared: a request, or the requests of a whole sequence."""

_DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR


def read_exchanges(path: Path, config: ModelConfig, *, sequence: bool = False) -> tuple[Exchange, ...]:
    """Read recorded requests for a model. See `request_data.read.read_rows` for the forms of the file.

    A request without batch axis gets one of size 1 where the model batches.

    Args:
        path: file of recorded requests: .npz, .json or .jsonl.
        config: the configuration the server runs the model with: names, types and dims come from it.
        sequence: a file is one sequence, of perf_analyzer's JSON each stream, else each request is on its own.

    Raises:
        InputError: the file cannot be read, holds no request, or one does not fit the model. With its number.
    """
    inputs = {entry.name: _facts(entry) for entry in config.message().input}
    batched = config.max_batch_size > 0
    numbers = itertools.count(1)

    def fitted(row: Request) -> Request:
        where = f"{path}, request {next(numbers)}"
        return {name: _fitted(array, inputs[name], batched, where) for name, array in row.items()}

    streams = [tuple(map(fitted, stream)) for stream in read_streams(path, list(inputs.values()))]
    return tuple(streams) if sequence else tuple((request,) for stream in streams for request in stream)


def _facts(entry: model_config_pb2.ModelInput) -> InputFacts:
    kind = _DATA_TYPE.values_by_number[entry.data_type].name.removeprefix("TYPE_")
    return InputFacts(
        entry.name, "BYTES" if kind == "STRING" else kind, tuple(int(size) for size in entry.dims), entry.optional
    )


def _fitted(array: Array, item: InputFacts, batched: bool, where: str) -> Array:
    """Return the array with its batch axis.

    Raises:
        InputError: its shape is not the input's.
    """
    wanted = (-1, *item.shape) if batched else item.shape
    if batched and array.ndim == len(item.shape):
        array = array[None]
    fits = array.ndim == len(wanted) and all(
        size in (-1, found) for size, found in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        raise InputError(f"{where}, input {item.name}: the shape is {list(array.shape)}, expected {list(wanted)}")
    return array


@dataclasses.dataclass(frozen=True)
class LatencySummary:
    """Latencies of one version, the client's work included. `None` without an answer."""

    mean_ns: float | None
    p50_ns: float | None
    p95_ns: float | None
    p99_ns: float | None

    @classmethod
    def of(cls, latencies_ns: Array) -> LatencySummary:
        """Summarise `[requests]` latencies."""
        if not latencies_ns.size:
            return cls(None, None, None, None)
        p50, p95, p99 = np.quantile(latencies_ns, (0.5, 0.95, 0.99)).tolist()
        return cls(float(latencies_ns.mean()), p50, p95, p99)


@dataclasses.dataclass(frozen=True)
class ShadowReport:
    """The result of mirroring.

    Attributes:
        model: name of the model on trial.
        old: number of the version served before. Its answers are the reference.
        new: number of the version on trial.
        pairs: requests, or whole sequences, sent to both versions. Those neither could answer are in `refused_by_both`
            alone.
        errors_old: of these, how many the old version failed.
        errors_new: of these, how many the new one failed.
        first_error: the new version's first error. `None` without one.
        refused_by_both: recorded requests neither version could answer.
        skipped: requests due while all workers waited for answers.
        seconds: wall time of the mirroring, warm-up and last answers included.
        outputs: drift of every output over all answers.
        latency_old: of the pairs both answered.
        latency_new: the same of the new version.
        gates: result of each gate, in the order given. Empty when the mirroring broke off.
        outcome: the worst outcome of `gates`. `pass` without any.
    """

    model: str
    old: int
    new: int
    pairs: int
    errors_old: int
    errors_new: int
    first_error: str | None
    refused_by_both: int
    skipped: int
    seconds: float
    outputs: tuple[OutputDrift, ...]
    latency_old: LatencySummary
    latency_new: LatencySummary
    gates: tuple[GateResult, ...]
    outcome: Outcome
