"""`infer`: send requests to a served model as its kind needs them, and keep the answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from repo_manager.errors import InputError, RepositoryError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.files import work_folder
from repo_manager.loadtest.inputs.images import is_images, read_images
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts, connect
from repo_manager.pipeline.connection import connection_of
from repo_manager.pipeline.inference import Answer, Array, Inference, Label
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import resolve_version
from repo_manager.request_data.read import holds_tensors, read_streams
from repo_manager.request_data.tensors import with_batch_axis
from repo_manager.rollout.comparison import OutputComparison, compare_recorded, unlike_counts
from repo_manager.rollout.reference import Reference, recorded_reference
from repo_manager.rollout.smoke import requests_of
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind, Response, SequencePart, ask, kind_of, new_sequence_id
from repo_manager.server.records import running_server
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import load_settings
from repo_manager.triton_config.config import ModelConfig
from repo_manager.validation import check_fields

__all__ = ["InferOptions", "infer", "server_of"]

_LIMIT_BYTES = 256 << 20
_TOP = 5
_STDIN = "-"


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """The requests, and the way to send them.

    Attributes:
        data: .npz, .npy, .json, .jsonl, an image or a folder of images; `-` reads JSON from standard input, and text
            with `{` at its beginning is JSON itself; `None` sends the version's golden sample.
        golden: send the golden sample, and compare the answers with it.
        image: how images become inputs, as in a load test.
        shapes: input -> shape without the batch axis, for images.
        sequence: correlation ID. Digits are a number. `None`: a new one where the model needs one.
        resume: the sequence was started by earlier requests.
        keep_open: later requests go on with the sequence.
        parameters: custom parameters of each request.
        top: number of labels shown per answer.
        timeout_s: of each request, and the most each question about the model takes.
    """

    data: str | None = None
    golden: bool = False
    image: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    sequence: str | None = None
    resume: bool = False
    keep_open: bool = False
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    top: int = _TOP
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.golden and self.data is not None:
            raise UsageError("--golden sends the recorded sample, so --input has no use")
        if (self.resume or self.keep_open) and self.sequence is None:
            raise UsageError("--resume and --keep-open need the sequence's ID: --sequence ID")


def server_of(repository: LocationLike, url: str | None) -> str:
    """Return the server to ask: the one given, else the running `serve` of the repository.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        url: address of the server. `None`: the running `serve`.

    Raises:
        ServerUnreachableError: none runs.
    """
    repository = as_location(repository)
    if url is not None:
        return url
    running = running_server(repository)
    if running is None:
        raise ServerUnreachableError(
            f"No server runs on {repository}",
            hint="Deploy the model (repo-manager deploy NAME starts one), or name a server: --to URL.",
        )
    return running.control_url


def infer(
    repository: LocationLike,
    name: str,
    version: int | str | None = None,
    to: str | None = None,
    options: InferOptions | None = None,
    *,
    connection: ClientOptions | None = None,
    on_answer: Callable[[Answer], None] = lambda _: None,
) -> Inference:
    """Send requests to a served model.

    Args:
        repository: where labels and the golden sample are looked up. The server may serve another one.
        name: name of the model on the server. The repository need not have it.
        version: its number, even one missing in the repository, or a tag. `None` leaves the choice to the server.
        to: the server, gRPC for a decoupled model. `None` takes the server of the settings, else the running `serve`
            of the repository.
        options: the requests, and the way to send them. `None` sends the golden sample.
        connection: how to connect. `None` takes the settings.
        on_answer: given each response as it comes.

    Raises:
        InputError: the data cannot be read, or does not fit the model.
        UsageError: there is nothing to send, or the model streams and the URL is HTTP.
        RepositoryError: there is no such tag.
        ServerRefusedError: unknown model, or the inference failed on the server.
        ServerUnreachableError: no answer.
    """
    repository, options = as_location(repository), InferOptions() if options is None else options
    if isinstance(version, str):
        version = resolve_version(repository, f"{name}:{version}")[1]
    url, connection = _reach(repository, to, connection, options)
    facts = _facts(url, name, version, connection, options)
    labels = _labels(repository, name)
    answers: list[Answer] = []
    with TritonClient.connect(url, connection) as client:
        config = client.model_config(name, version)
        served = ModelConfig.from_message(config)
        reference = _recorded(repository, name, version, facts, served) if options.data is None else None
        requests, source = _sent(options, facts, reference, served)
        kind = kind_of(client, name, version, config=config)
        part = _part(options, new_sequence_id(kind) if kind.sequence else None)
        parameters, timeout_s = options.parameters, options.timeout_s
        asked = ask(client, name, version, requests, kind, sequence=part, parameters=parameters, timeout_s=timeout_s)
        with _says_which(source, len(requests), answers, kind):
            for response in asked:
                answers.append(_answer(response, labels, facts.max_batch_size > 0, options.top))
                on_answer(answers[-1])
    return Inference(
        model=name,
        version=version,
        url=url,
        source=source,
        requests=len(requests),
        sequence=None if part is None else part.id,
        answers=tuple(answers),
        comparisons=() if reference is None else _comparisons(reference, answers, served),
    )


@contextlib.contextmanager
def _says_which(source: str, count: int, answers: Sequence[Answer], kind: ModelKind) -> Iterator[None]:
    """Let a refusal name the request's source. Responses of a decoupled model do not tell which request failed."""
    try:
        yield
    except ServerRefusedError as exc:
        place = "" if kind.decoupled or count == 1 else f", request {len(answers) + 1} of {count}"
        exc.message = f"{source}{place}: {exc.message}"
        raise


def _recorded(
    repository: Location, name: str, version: int | None, facts: ServedModelFacts, config: ModelConfig
) -> Reference | None:
    """Return the recorded sample of the answering version, or `None` without one here."""
    number = int(facts.version) if version is None and facts.version.isdecimal() else version
    try:
        entry = find_model(repository, name).version(number or 0)
        reference = recorded_reference(entry.path, config)
    except RepositoryError:
        return None  # the server may serve another repository
    return reference if reference.tries else None


def _reach(
    repository: Location, to: str | None, connection: ClientOptions | None, options: InferOptions
) -> tuple[str, ClientOptions]:
    """Return the server's URL and how to connect to it, with the deadline of the questions before the requests."""
    settings = load_settings()
    connection = connection_of(settings) if connection is None else connection
    limited = dataclasses.replace(connection, timeout_s=min(connection.timeout_s, options.timeout_s))
    return server_of(repository, to or settings.server), limited


def _facts(
    url: str, name: str, version: int | None, connection: ClientOptions, options: InferOptions
) -> ServedModelFacts:
    asked = LoadTestOptions(
        url=url, model=name, version=version, concurrency=(1,), access=connection, timeout_s=options.timeout_s
    )
    with connect(asked) as target:
        return target.facts()


def _sent(
    options: InferOptions, facts: ServedModelFacts, reference: Reference | None, config: ModelConfig
) -> tuple[Sequence[Mapping[str, Array]], str]:
    """Return the requests, and where they are from.

    Raises:
        UsageError: there is nothing to send.
    """
    if options.data is not None:
        return _requests(options, facts)
    if reference is not None:
        return requests_of(reference.tries[0], config), "golden sample"
    raise UsageError(f"{facts.model} has no recorded sample here: give the inputs with --input", hint=_wanted(facts))


def _requests(options: InferOptions, facts: ServedModelFacts) -> tuple[list[dict[str, Array]], str]:
    """Read the requests. One request each, batch axis included."""
    text = str(options.data)
    if text == _STDIN or text.lstrip().startswith("{"):
        with work_folder("repo-manager-infer-") as folder:
            source = "standard input" if text == _STDIN else "--input"
            path = _written(_standard_input() if text == _STDIN else text, Path(folder))
            try:
                rows = _one_sequence(path, facts)
            except InputError as exc:
                raise InputError(exc.message.replace(str(path), source), hint=exc.hint) from exc
    else:
        path, source = Path(text), text
        if not path.exists():
            raise InputError(f"{path} does not exist", hint=_wanted(facts))
        if is_images(path) and not holds_tensors(path, facts.inputs):
            item = facts.inputs[0] if facts.inputs else None
            shape = () if item is None else options.shapes.get(item.name, item.shape)
            rows = read_images(path, facts, shape, options.image, _LIMIT_BYTES)
        else:
            rows = _one_sequence(path, facts)
    if facts.max_batch_size == 0:
        return rows, source
    return [with_batch_axis(row, facts.inputs) for row in rows], source


def _one_sequence(path: Path, facts: ServedModelFacts) -> list[dict[str, Array]]:
    """Read a file's requests.

    Raises:
        InputError: it cannot be read, or holds several sequences.
    """
    streams = read_streams(path, facts.inputs)
    if facts.sequence and len(streams) > 1:
        raise InputError(
            f"{path} holds {len(streams)} streams, and one sequence is sent at a time",
            hint="Give a file with one of them.",
        )
    return [row for stream in streams for row in stream]


def _standard_input() -> str:
    with open(0, encoding="utf-8", closefd=False) as stdin:
        return stdin.read()


def _written(text: str, folder: Path) -> Path:
    """Write requests to a file of the kind that they are: lines, one document on one line, or perf_analyzer's."""
    path = folder / "request.jsonl"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None  # several lines, or invalid: the reader reports the error
    else:
        text = text.replace("\r", " ").replace("\n", " ")
    if isinstance(document, dict) and any(isinstance(document.get(key), list) for key in ("data", "instances")):
        path = folder / "request.json"
    path.write_text(text, "utf-8")
    return path


def _wanted(facts: ServedModelFacts) -> str:
    """Describe the model's inputs, with a request to begin from."""
    listed = ", ".join(
        f"{item.name} ({item.datatype}, {list(item.shape)}{', optional' if item.optional else ''})"
        for item in facts.inputs
    )
    return f"{facts.model} takes {listed or 'no inputs'}; files: .npz, .npy, .json, .jsonl or an image."


def _part(options: InferOptions, new_id: int | str | None) -> SequencePart | None:
    """Return the sequence the requests are a part of, or `None` for none."""
    if options.sequence is None:
        return None if new_id is None else SequencePart(new_id)
    number = int(options.sequence) if options.sequence.isdecimal() and not isinstance(new_id, str) else options.sequence
    return SequencePart(number, start=not options.resume, end=not options.keep_open)


def _labels(repository: Location, name: str) -> dict[str, Sequence[str]]:
    try:
        return dict(read_labels(repository, name))
    except RepositoryError:
        return {}


def _answer(response: Response, labels: Mapping[str, Sequence[str]], batched: bool, top: int) -> Answer:
    named = {
        name: tuple(_best(array if batched else array[None], labels[name], top))
        for name, array in response.outputs.items()
        if labels.get(name) and array.dtype.kind in "fiu"
    }
    return Answer(response.request + 1, response.number + 1, response.outputs, response.elapsed_ns, named)


def _best(samples: Array, labels: Sequence[str], top: int) -> Iterator[tuple[Label, ...]]:
    """Yield the highest values of each sample, with their labels."""
    for sample in samples:
        values = np.asarray(sample, np.float64).reshape(-1)
        order = np.argsort(-values, kind="stable")[:top]
        yield tuple(
            Label(labels[place] if place < len(labels) else f"class {place}", int(place), float(values[place]))
            for place in order.tolist()
        )


def _comparisons(reference: Reference, answers: Sequence[Answer], config: ModelConfig) -> tuple[OutputComparison, ...]:
    """Compare the answers with the recorded ones; a response too many or too few is infinitely far off."""
    golden = reference.tries[0]
    came: list[list[Mapping[str, Array]]] = [[] for _ in golden.exchanges]
    for answer in answers:
        came[answer.request - 1].append(answer.outputs)
    unlike = unlike_counts(golden, came)
    if unlike:
        return tuple(OutputComparison(f"responses: {each}", float("inf"), 0.0) for each in unlike)
    return compare_recorded(golden, came, reference.promised or config, reference.tolerance)
