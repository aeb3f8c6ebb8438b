"""Real requests to a served version, in the way its model is asked, and the answers compared with a reference."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from repo_manager.errors import ServerError, ServerRefusedError, UsageError
from repo_manager.onnx_model.runtime import runtime_within
from repo_manager.repository.golden import Golden
from repo_manager.repository.location import Location
from repo_manager.rollout.comparison import (
    OutputComparison,
    compare_recorded,
    is_of_shape,
    is_of_type,
    type_name,
    unlike_counts,
    unlike_promised,
)
from repo_manager.rollout.reference import Array, Reference, as_served, dims_of, reference_of, typed, unknown_types
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind, ask, kind_of
from repo_manager.triton_config.config import ModelConfig

__all__ = ["SmokeFailedError", "SmokeResult", "requests_of", "smoke_test"]


_DEAD = "not healthy"  # triton-inference-server/python_backend: the model's process has ended
_MADE_UP_HINT = (
    "The inputs were made up, because the version has no recorded sample. Record one (repo-manager add --sample), or "
    "deploy it on its readiness alone: --proof readiness."
)


class SmokeFailedError(ServerError):
    """The version is READY and does not answer as it must."""


@dataclasses.dataclass(frozen=True)
class SmokeResult:
    """The result of a smoke inference.

    Attributes:
        version: the version the requests named.
        reference: `golden` (recorded with the version), `onnxruntime` (run now on the version's ONNX file), `none` (an
            answer came and has the shapes and types the configuration promises), or `readiness` (no request
            could be made: the server says the version is ready, and nothing else is known).
        outputs: one comparison per output with a reference.
        latency_ns: of all requests together, the client's work included.
        requests: how many were sent. More than one for a sequence.
        responses: number of responses to all requests together. 0 for `readiness`.
        note: why nothing was asked, for `readiness`, or why answers were not compared, else empty.
    """

    version: int
    reference: str
    outputs: tuple[OutputComparison, ...]
    latency_ns: int
    requests: int = 1
    responses: int = 1
    note: str = ""

    def describe_reference(self) -> str:
        """Return what the answers were compared with, in words."""
        return "no reference" if self.reference == "none" else f"{self.reference} reference"


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
        name: name of the model on the server, for the requests and the messages.
        version: the version the requests name. It is not waited for.
        config: the configuration the server runs it with.
        timeout_s: deadline of each request, and of the local run that answers it where no answer was recorded.
        readiness_only: made-up requests the server refuses say nothing of the version: its readiness is enough.
        compare: hold the answers against the recorded ones, else only against the promised names, types and shapes.

    Raises:
        SmokeFailedError: an output is wrong. With the numbers.
        ServerRefusedError: the inference failed on the server. With its reason.
        ServerUnreachableError: the server gives no answer in time.
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
    """Take the server's word for the readiness of a version.

    Raises:
        SmokeFailedError: the server does not call the version ready.
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
    requests = requests_of(golden, config)
    answers: list[list[Mapping[str, Array]]] = [[] for _ in requests]
    for response in ask(client, name, version, requests, kind, timeout_s=timeout_s):
        answers[response.request].append(response.outputs)
    return answers


def requests_of(golden: Golden, config: ModelConfig) -> list[dict[str, Array]]:
    """Return a sample's requests as the configuration wants them. Inputs it does not have are left out.

    Args:
        golden: the sample recorded with the version.
        config: configuration the server runs the model with.
    """
    batched = config.max_batch_size > 0
    entries = {entry.name: entry for entry in config.message().input}
    return [
        {
            key: as_served(typed(array, entries[key]), dims_of(entries[key], batched), batched)
            for key, array in exchange.inputs.items()
            if key in entries
        }
        for exchange in golden.exchanges
    ]


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
            # A recorded type or shape may differ from the promised one: this is noted, not an error. A decoupled model
            # may send some outputs in one response and others in the next.
            known = _Known.of(response, recorded)
            _check_promised(what, response, outputs, known, batched=batched, complete=not kind.decoupled)
    if reference.source == "none":
        return ()
    unlike = unlike_counts(golden, answers)
    if unlike:
        raise SmokeFailedError(f"{what} answers {unlike[0]}")
    comparisons = compare_recorded(golden, answers, reference.promised or config, reference.tolerance)
    failed = [each for each in comparisons if not each.passed]
    if failed:
        details = "; ".join(f"{e.output} is off by {e.error:.3g}, allowed {e.tolerance:.3g}" for e in failed[:5])
        more = f" (and {len(failed) - 5} more)" if len(failed) > 5 else ""
        by = "as ONNX Runtime does" if reference.source == "onnxruntime" else "as recorded"
        raise SmokeFailedError(
            f"{what} answers, but not {by} ({reference.source} reference): {details}{more}",
            hint="The served files, the server's backend or its execution provider differ from the recorded ones.",
        )
    return comparisons


@dataclasses.dataclass(frozen=True)
class _Known:
    """Outputs of a response equal to the recorded ones in type and shape, whatever was promised."""

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
    """Check that a response has the outputs the version was published with, of their types and shapes.

    Args:
        what: subject of the message: the version.
        response: output name -> array of one response. `None` counts as missing.
        outputs: outputs promised by the configuration or the manifest.
        known: outputs equal to the recorded ones, exempt from the check.
        batched: whether the model takes batches.
        complete: whether all outputs must be there.

    Raises:
        SmokeFailedError: an output is missing, or has another type or shape.
    """
    missing = sorted(name for name in outputs if response.get(name) is None)
    if missing and (complete or not response):
        raise SmokeFailedError(f"{what} answered without its outputs {', '.join(missing)}")
    for name, array in response.items():
        if name not in outputs or array is None:
            continue
        promised = type_name(outputs[name])
        if not is_of_type(array, promised) and name not in known.types:
            raise SmokeFailedError(f"{what} answered output {name} as {array.dtype}, promised was {promised}")
        dims = dims_of(outputs[name], batched)
        if not is_of_shape(array, dims) and name not in known.shapes:
            raise SmokeFailedError(
                f"{what} answered output {name} with the shape {list(array.shape)}, promised was {dims}",
                hint="Correct config.pbtxt or the model. If clients rely on it: record the answers (add --sample).",
            )
