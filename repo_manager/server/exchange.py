"""Requests as a model's kind needs them: in a sequence, as a stream of responses, or plainly one by one."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import RequestOptions, StreamRequest
from repo_manager.triton_config.config import takes_sequences

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ModelKind", "Response", "SequencePart", "ask", "kind_of", "new_sequence_id", "own_kind"]

_LARGEST_ID = 2**31 - 1  # a model may declare the correlation ID as INT32
_DEEPEST = 16


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """The needs of a model's requests.

    Attributes:
        sequence: each belongs to a sequence, so it carries a correlation ID.
        decoupled: a request may have any number of responses, so it is sent on a stream.
        text_id: the model takes the correlation ID as a string.
    """

    sequence: bool = False
    decoupled: bool = False
    text_id: bool = False


@dataclasses.dataclass(frozen=True)
class SequencePart:
    """The part of a sequence some requests are.

    Attributes:
        id: the correlation ID: a text where `ModelKind.text_id`, else a number above 0.
        start: whether the first request starts the sequence.
        end: whether the last one ends it.
    """

    id: int | str
    start: bool = True
    end: bool = True


@dataclasses.dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        request: number of the request it answers, from 0.
        number: number among the request's responses, from 0.
        outputs: output name -> array, as `TritonClient.infer` returns it.
        elapsed_ns: since its request was sent, the client's work included.
    """

    request: int
    number: int
    outputs: Mapping[str, np.ndarray[Any, Any]]
    elapsed_ns: int


def kind_of(client: TritonClient, name: str, version: int | None = None, *, config: Any = None) -> ModelKind:
    """Ask a server how a model wants to be asked. An ensemble has the needs of all its models.

    Args:
        client: connected client of the server.
        name: name of the loaded model or ensemble. Not read where `config` is given.
        version: `None` leaves the choice to the server.
        config: the model's `ModelConfig` where it is known already.

    Raises:
        ServerRefusedError: the server does not show the configuration.
        ServerUnreachableError: no answer.
    """
    return _kind(client, client.model_config(name, version) if config is None else config, _DEEPEST)


def _kind(client: TritonClient, config: Any, depth: int) -> ModelKind:
    kind = own_kind(config)
    for step in config.ensemble_scheduling.step if depth else ():
        try:
            inner = client.model_config(step.model_name, step.model_version if step.model_version > 0 else None)
        except ServerRefusedError:
            continue  # it may be restricted: the request itself will show
        part = _kind(client, inner, depth - 1)
        kind = ModelKind(kind.sequence or part.sequence, kind.decoupled or part.decoupled, kind.text_id or part.text_id)
    return kind


def own_kind(config: Any) -> ModelKind:
    """Return the needs of a model's requests by its own `ModelConfig`, whatever the models of an ensemble need."""
    text = any(
        control.kind == control.CONTROL_SEQUENCE_CORRID and control.data_type == _string_type(control)
        for entry in config.sequence_batching.control_input
        for control in entry.control
    )
    decoupled = bool(config.model_transaction_policy.decoupled)
    return ModelKind(takes_sequences(config), decoupled, text)


def _string_type(control: Any) -> int:
    kinds = control.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    return int(kinds["TYPE_STRING"].number)


def new_sequence_id(kind: ModelKind) -> int | str:
    """Return a correlation ID no other client uses, of the type the model takes."""
    if kind.text_id:
        return f"repo-manager-{secrets.token_hex(8)}"
    return 1 + secrets.randbelow(_LARGEST_ID)


def ask(
    client: TritonClient,
    name: str,
    version: int | None,
    requests: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    kind: ModelKind,
    *,
    sequence: SequencePart | None = None,
    parameters: Mapping[str, str | int | bool] | None = None,
    timeout_s: float | None = None,
) -> Iterator[Response]:
    """Send requests one after another and yield every response as it comes.

    Args:
        client: of the server. gRPC for a decoupled model.
        name: name of the loaded model. It gets all `requests`.
        version: `None` leaves the choice to the server.
        requests: the inputs of each, batch axis included.
        kind: how the model is asked: batched, stateful, decoupled.
        sequence: the sequence they are a part of. `None`: one of their own from start to end, where the model needs
            one.
        parameters: custom parameters of every request. `None`: none.
        timeout_s: of each request, up to its final response. `None` takes the client's.

    Raises:
        UsageError: the model is decoupled and the connection is HTTP.
        ServerRefusedError: a request failed on the server.
        ServerUnreachableError: no answer within the deadline.
    """
    if sequence is None and kind.sequence:
        sequence = SequencePart(new_sequence_id(kind))
    sent = _Sent(_stream_requests(requests, sequence, dict(parameters or {})))
    if kind.decoupled:
        answers = client.stream(name, version, sent, timeout_s=timeout_s)
    else:
        answers = (client.infer(name, version, one.inputs, options=one.options, timeout_s=timeout_s) for one in sent)
    for outputs in answers:
        yield sent.response(outputs)


def _stream_requests(
    requests: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    sequence: SequencePart | None,
    parameters: Mapping[str, str | int | bool],
) -> Iterator[StreamRequest]:
    for number, inputs in enumerate(requests):
        options = RequestOptions(parameters=parameters)
        if sequence is not None:
            options = dataclasses.replace(
                options,
                sequence_id=sequence.id,
                sequence_start=sequence.start and number == 0,
                sequence_end=sequence.end and number == len(requests) - 1,
            )
        yield StreamRequest(inputs, options)


class _Sent:
    """Hands out requests for sending, and turns each answer into responses before the next one is taken."""

    def __init__(self, requests: Iterator[StreamRequest]) -> None:
        self._requests = requests
        self._request, self._responses, self._began_ns = -1, 0, 0

    def __iter__(self) -> Iterator[StreamRequest]:
        for request in self._requests:
            self._request, self._responses = self._request + 1, 0
            self._began_ns = time.perf_counter_ns()
            yield request

    def response(self, outputs: Mapping[str, np.ndarray[Any, Any]]) -> Response:
        number, self._responses = self._responses, self._responses + 1
        return Response(self._request, number, outputs, time.perf_counter_ns() - self._began_ns)
