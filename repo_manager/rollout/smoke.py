"""Real requests to a served version, in the way that its model is asked, and the answers compared with a reference."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from repo_manager.errors import ServerError, ServerRefusedError, UsageError
from repo_manager.onnx_model.runtime import runtime_within
from repo_manager.repository.golden import Golden
from repo_manager.repository.location import Location
from repo_manager.rollout.reference import (
    DATA_TYPE,
    Array,
    Reference,
    as_served,
    dims_of,
    numpy_type,
    reference_of,
    typed,
    unknown_types,
)
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind, ask, kind_of
from repo_manager.triton_config.config import ModelConfig

__all__ = ["OutputComparison", "SmokeFailedError", "SmokeResult", "compare_outputs", "smoke_test", "unlike_promised"]


_DEAD = "not healthy"  # triton-inference-server/python_backend: the process of the model has ended
_MADE_UP_HINT = (
    "The inputs were made up, because the version has no recorded sample. Record one (repo-manager add --sample), or "
    "deploy it on its readiness alone: --proof readiness."
)


class SmokeFailedError(ServerError):
    """The version is READY and does not answer as it must."""


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output against its reference.

    Attributes:
        output: its name. In a sequence with the request's number, of several responses with the response's.
        error: largest `|served - reference|`, divided by the largest `|reference|`. For other than floats the share of
            elements that differ.
        tolerance: the largest error allowed.
    """

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class SmokeResult:
    """What a smoke inference showed.

    Attributes:
        version: the version asked.
        reference: `golden` (recorded with the version), `onnxruntime` (run now on the version's ONNX file), `none` (an
            answer came and has the shapes and types that the configuration promises), or `readiness` (no request
            could be made: the server says that the version is ready, and that is all that is known).
        outputs: one comparison per output that has a reference.
        latency_ns: of all requests together, the client's work included.
        requests: how many were sent. More than one for a sequence.
        responses: how many came.
        note: why nothing was asked, for `readiness`, or why answers were not compared, else empty.
    """

    version: int
    reference: str
    outputs: tuple[OutputComparison, ...]
    latency_ns: int
    requests: int = 1
    responses: int = 1
    note: str = ""


def smoke_test(
    client: TritonClient,
    folder: Location,
    name: str,
    version: int,
    config: ModelConfig,
    *,
    timeout_s: float = 60.0,
    readiness_only: bool = False,
    compare: bool = True,
) -> SmokeResult:
    """Ask a version as its model wants to be asked, and compare its answers.

    A sequence is sent with one correlation ID from start to end. From a decoupled model every response is taken until
    the final one, and compared in order.

    Args:
        client: connected client of the server.
        folder: the version's folder in the repository.
        name: name of the model.
        version: version of the model.
        config: what the server runs it with.
        timeout_s: deadline of each request, and of the run that answers it here where no answer was recorded.
        readiness_only: made-up requests that the server refuses say nothing of the version: its readiness is enough.
        compare: hold the answers against the recorded ones, else only what is promised of them must be there.

    Raises:
        SmokeFailedError: an output is wrong. With the numbers.
        ServerRefusedError: the inference failed on the server. With its reason.
        ServerUnreachableError: no answer.
    """
    kind = kind_of(client, name, version)
    with runtime_within(timeout_s):
        reference = reference_of(folder, config, kind)
    changed = reference.changed_parts(client)
    changes = [f"not compared with the recorded answers: {changed}"] if changed else []
    if reference.source != "none" and (changed or not compare):
        reference = dataclasses.replace(reference, source="none")
    if not reference.tries:
        return _ready(client, name, version, f"no request can be made up for {unknown_types(config)}")
    began_ns = time.perf_counter_ns()
    refusal: ServerRefusedError | None = None
    for golden in reference.tries:
        try:
            answers = _answers(client, name, version, config, golden, kind, timeout_s)
        except UsageError as exc:
            return _ready(client, name, version, exc.message)
        except ServerRefusedError as exc:
            if reference.source != "none" or _DEAD in exc.message:
                raise
            refusal = refusal or exc
            continue
        outputs = _compared(f"{name}:{version}", golden, answers, config, reference, kind)
        latency_ns, responses = time.perf_counter_ns() - began_ns, sum(map(len, answers))
        note = "; ".join([*changes, *unlike_promised(reference.promised or config, itertools.chain(*answers))])
        return SmokeResult(version, reference.source, outputs, latency_ns, len(golden.exchanges), responses, note)
    assert refusal is not None
    if readiness_only:
        return _ready(client, name, version, f"made-up requests were refused: {refusal.reason or refusal.message}")
    raise _with_hint(refusal)


def _with_hint(refusal: ServerRefusedError) -> ServerRefusedError:
    refused = ServerRefusedError(refusal.message, hint=_MADE_UP_HINT)
    refused.reason = refusal.reason
    return refused


def _ready(client: TritonClient, name: str, version: int, why: str) -> SmokeResult:
    """Take the server's word for it that a version is ready.

    Raises:
        SmokeFailedError: it is not.
    """
    if not client.model_ready(name, version):
        raise SmokeFailedError(f"{name}:{version} is not ready, and no inference can be sent: {why}")
    return SmokeResult(version, "readiness", (), 0, requests=0, responses=0, note=why)


def _answers(
    client: TritonClient,
    name: str,
    version: int,
    config: ModelConfig,
    golden: Golden,
    kind: ModelKind,
    timeout_s: float,
) -> list[list[Mapping[str, Array]]]:
    """Send every request. Return the responses of each."""
    batched = config.max_batch_size > 0
    entries = {entry.name: entry for entry in config.message().input}
    requests = [
        {
            key: as_served(typed(array, entries[key]), dims_of(entries[key], batched), batched)
            for key, array in exchange.inputs.items()
            if key in entries
        }
        for exchange in golden.exchanges
    ]
    answers: list[list[Mapping[str, Array]]] = [[] for _ in requests]
    for response in ask(client, name, version, requests, kind, timeout_s=timeout_s):
        answers[response.request].append(response.outputs)
    return answers


def _compared(
    what: str,
    golden: Golden,
    answers: Sequence[Sequence[Mapping[str, Array]]],
    config: ModelConfig,
    reference: Reference,
    kind: ModelKind,
) -> tuple[OutputComparison, ...]:
    """Compare every response with its reference.

    Raises:
        SmokeFailedError: outputs are missing or wrong, or there are more or fewer responses.
    """
    outputs = {entry.name: entry for entry in (reference.promised or config).message().output}
    batched = config.max_batch_size > 0
    recorded = [
        (key, array) for exchange in golden.exchanges for each in exchange.responses for key, array in each.items()
    ]
    for responses in answers:
        if not responses and not kind.decoupled:
            raise SmokeFailedError(f"{what} gave no answer to a request")
        for response in responses:
            # What was recorded in another type or shape than promised is known, and noted. A decoupled model may send
            # some outputs in one response, others in the next.
            known = _Known.of(response, recorded)
            _check_promised(what, response, outputs, known, batched=batched, complete=not kind.decoupled)
    if reference.source == "none":
        return ()
    comparisons: list[OutputComparison] = []
    for number, (exchange, responses) in enumerate(zip(golden.exchanges, answers, strict=True), start=1):
        of_request = f"request {number}" if len(golden.exchanges) > 1 else ""
        if len(responses) != len(exchange.responses):
            raise SmokeFailedError(
                f"{what} answers {of_request or 'the request'} with {len(responses)} responses, "
                f"recorded were {len(exchange.responses)}"
            )
        for place, (served, expected) in enumerate(zip(responses, exchange.responses, strict=True), start=1):
            of_response = f"response {place}" if len(responses) > 1 else ""
            where = ", ".join(filter(None, (of_request, of_response)))
            expected = {
                key: as_served(array, dims_of(outputs[key], batched), batched)
                if key in outputs and getattr(served.get(key), "shape", None) != array.shape
                else array
                for key, array in expected.items()
            }
            comparisons += compare_outputs(served, expected, reference.tolerance, where)
    failed = [each for each in comparisons if not each.passed]
    if failed:
        details = "; ".join(f"{e.output} is off by {e.error:.3g}, allowed {e.tolerance:.3g}" for e in failed[:5])
        more = f" (and {len(failed) - 5} more)" if len(failed) > 5 else ""
        by = "as ONNX Runtime does" if reference.source == "onnxruntime" else "as recorded"
        raise SmokeFailedError(
            f"{what} answers, but not {by} ({reference.source} reference): {details}{more}",
            hint="The served files, the server's backend or its execution provider differ from the recorded ones.",
        )
    return tuple(comparisons)


@dataclasses.dataclass(frozen=True)
class _Known:
    """Outputs of a response that are as the recorded ones, whatever was promised: in type, and in shape."""

    types: Collection[str]
    shapes: Collection[str]

    @classmethod
    def of(cls, response: Mapping[str, Array], recorded: Sequence[tuple[str, Array]]) -> _Known:
        types = {(key, array.dtype) for key, array in recorded}
        shapes = {(key, array.shape) for key, array in recorded}
        present = [(key, array) for key, array in response.items() if array is not None]
        return cls(
            {key for key, array in present if (key, array.dtype) in types},
            {key for key, array in present if (key, array.shape) in shapes},
        )


def _check_promised(
    what: str,
    response: Mapping[str, Array],
    outputs: Mapping[str, Any],
    known: _Known,
    *,
    batched: bool,
    complete: bool,
) -> None:
    """Check that a response has the outputs that the version was published with, of their types and shapes.

    Args:
        what: the version.
        response: its outputs.
        outputs: those promised.
        known: outputs that are as recorded.
        batched: whether the model takes batches.
        complete: whether all outputs must be there.

    Raises:
        SmokeFailedError: it has not.
    """
    missing = sorted(name for name in outputs if response.get(name) is None)
    if missing and (complete or not response):
        raise SmokeFailedError(f"{what} answered without its outputs {', '.join(missing)}")
    for name, array in response.items():
        if name not in outputs or array is None:
            continue
        promised = _type_name(outputs[name])
        if not _is_of_type(array, promised) and name not in known.types:
            raise SmokeFailedError(f"{what} answered output {name} as {array.dtype}, promised was {promised}")
        dims = dims_of(outputs[name], batched)
        if not _is_of_shape(array, dims) and name not in known.shapes:
            raise SmokeFailedError(
                f"{what} answered output {name} with the shape {list(array.shape)}, promised was {dims}",
                hint="Correct config.pbtxt or the model. If clients rely on it: record the answers (add --sample).",
            )


def _type_name(output: Any) -> str:
    return str(DATA_TYPE.values_by_number[output.data_type].name)


def _is_of_type(array: Array, promised: str) -> bool:
    wanted = [numpy_type(promised) or array.dtype]
    if promised == "TYPE_BF16":
        wanted.append(np.dtype(np.float32))  # as clients give it
    return array.dtype in wanted


def _is_of_shape(array: Array, dims: list[int]) -> bool:
    return len(dims) == array.ndim and all(size in (-1, have) for size, have in zip(dims, array.shape, strict=True))


def unlike_promised(config: ModelConfig, responses: Iterable[Mapping[str, Array]]) -> list[str]:
    """Say which outputs come in another type or shape than config.pbtxt promises, which Triton does not check.

    Args:
        config: configuration of the model (config.pbtxt).
        responses: outputs of each response.
    """
    outputs = {entry.name: entry for entry in config.message().output}
    batched = config.max_batch_size > 0
    found: dict[str, tuple[str, str]] = {}
    for response in responses:
        for name, array in response.items():
            if array is None or name not in outputs:
                continue
            promised, dims = _type_name(outputs[name]), dims_of(outputs[name], batched)
            if not _is_of_type(array, promised):
                found[f"output {name} comes as"] = str(array.dtype), promised
            if not _is_of_shape(array, dims):
                found[f"output {name} comes with the shape"] = str(list(array.shape)), str(dims)
    return [
        f"{what} {came}, and config.pbtxt promises {promised}: correct one of them"
        for what, (came, promised) in found.items()
    ]


def compare_outputs(
    served: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float, where: str = ""
) -> tuple[OutputComparison, ...]:
    """Compare a response's outputs with the reference. An output that is missing is infinitely far off.

    Args:
        served: output name -> array.
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
