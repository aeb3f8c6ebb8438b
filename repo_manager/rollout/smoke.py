"""Real requests to a served version, in the way that its model is asked, and the answers compared with a reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repo_manager.errors import ConfigError, ModelError, ServerError, ServerRefusedError, UsageError
from repo_manager.optional import deferred
from repo_manager.repository import Location, read_manifest, version_files
from repo_manager.repository.golden import GOLDEN_FILE_NAME, Exchange, Golden, read_golden
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.manifest import Manifest
from repo_manager.server import TritonClient
from repo_manager.server.exchange import ModelKind, ask, kind_of
from repo_manager.triton_config import ModelConfig, parse_config
from repo_manager.triton_messages import model_config_pb2

if TYPE_CHECKING:
    import ml_dtypes

    from repo_manager.onnx_model import inputs as onnx_inputs
else:
    ml_dtypes = deferred("ml_dtypes")
    onnx_inputs = deferred("repo_manager.onnx_model.inputs")

__all__ = ["OutputComparison", "SmokeFailedError", "SmokeResult", "compare_outputs", "smoke_test"]

Array = np.ndarray[Any, Any]
# For a version that came without a recorded tolerance: served and reference are the same file on the same engine.
DEFAULT_TOLERANCE = 1e-2

_DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR
_DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    **{f"TYPE_INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"TYPE_UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_BFLOAT16 = "TYPE_BF16"
_DEAD = "not healthy"  # triton-inference-server/python_backend: the process of the model has ended
_MADE_UP_HINT = (
    "The inputs were made up, because the version has no recorded sample. Record one (repo-manager add --sample), or "
    "deploy it on its readiness alone: --proof readiness."
)


class SmokeFailedError(ServerError):
    """The version is READY and does not answer as it has to."""


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output against its reference.

    Attributes:
        output: its name; in a sequence with the request's number, of several responses with the response's.
        error: largest `|served - reference|`, divided by the largest `|reference|`; for other than floats
            the share of elements that differ.
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
        requests: how many were sent; more than one for a sequence.
        responses: how many came.
        note: why nothing was asked, for `readiness`, or why answers were not compared; else empty.
    """

    version: int
    reference: str
    outputs: tuple[OutputComparison, ...]
    latency_ns: int
    requests: int = 1
    responses: int = 1
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Reference:
    """What is sent, and what has to come back.

    Attributes:
        tries: samples; the next is sent where the server refuses one that was made up.
        source: see `SmokeResult.reference`.
        tolerance: of each output.
        promised: the configuration that the version was published with; `None`: it has none.
        parts: model that the version needs -> the version of it that the answers come from.
    """

    tries: tuple[Golden, ...]
    source: str
    tolerance: float
    promised: ModelConfig | None = None
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def changed_parts(self, client: TritonClient) -> str:
        """Return the models that answer with another version than when the sample was recorded; empty for none."""
        if not self.parts:
            return ""
        ready: dict[str, int] = {}
        for entry in client.repository_index():
            if entry.state == "READY" and entry.version is not None:
                ready[entry.name] = max(entry.version, ready.get(entry.name, 0))
        changed = {name: ready[name] for name, version in self.parts.items() if ready.get(name, version) != version}
        return ", ".join(f"{name} is {number} instead of {self.parts[name]}" for name, number in changed.items())


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

    A sequence is sent with one correlation ID from start to end; from a decoupled model every response is taken until
    the final one, and compared in order.

    Args:
        client: of the server.
        folder: the version's folder in the repository.
        name: the model.
        version: the version.
        config: what the server runs it with.
        timeout_s: deadline of each request.
        readiness_only: made-up requests that the server refuses say nothing of the version: its readiness is enough.
        compare: hold the answers against the recorded ones; else only what is promised of them has to be there.

    Raises:
        SmokeFailedError: an output is wrong; with the numbers.
        ServerRefusedError: the inference failed on the server; with its reason.
        ServerUnreachableError: no answer.
    """
    kind = kind_of(client, name, version)
    reference = _reference(folder, config, kind)
    changed = reference.changed_parts(client)
    if reference.source != "none" and (changed or not compare):
        reference = dataclasses.replace(reference, source="none")
    if not reference.tries:
        return _ready(client, name, version, f"no request can be made up for {_unknown_types(config)}")
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
        note = f"not compared with the recorded answers: {changed}" if changed else ""
        return SmokeResult(version, reference.source, outputs, latency_ns, len(golden.exchanges), responses, note)
    assert refusal is not None
    if readiness_only:
        return _ready(client, name, version, f"made-up requests were refused: {refusal.reason or refusal.message}")
    refused = ServerRefusedError(refusal.message, hint=_MADE_UP_HINT)
    refused.reason = refusal.reason
    raise refused


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
    """Send every request; return the responses of each."""
    batched = config.max_batch_size > 0
    entries = {entry.name: entry for entry in config.message().input}
    requests = [
        {
            key: _as_served(_typed(array, entries[key]), _dims(entries[key], batched), batched)
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
    reference: _Reference,
    kind: ModelKind,
) -> tuple[OutputComparison, ...]:
    """Compare every response with its reference.

    Raises:
        SmokeFailedError: outputs are missing or wrong, or there are more or fewer responses.
    """
    outputs = {entry.name: entry for entry in (reference.promised or config).message().output}
    batched = config.max_batch_size > 0
    for responses in answers:
        if not responses and not kind.decoupled:
            raise SmokeFailedError(f"{what} gave no answer to a request")
        for response in responses:
            # A decoupled model may send some outputs in one response, others in the next.
            _check_promised(what, response, outputs, batched=batched, complete=not kind.decoupled)
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
                key: _as_served(array, _dims(outputs[key], batched), batched) if key in outputs else array
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


def _check_promised(
    what: str, response: Mapping[str, Array], outputs: Mapping[str, Any], *, batched: bool, complete: bool
) -> None:
    """See that a response has the outputs that the version was published with, of their types and shapes.

    Raises:
        SmokeFailedError: it has not.
    """
    missing = sorted(name for name in outputs if response.get(name) is None)
    if missing and (complete or not response):
        raise SmokeFailedError(f"{what} answered without its outputs {', '.join(missing)}")
    for name, array in response.items():
        if name not in outputs or array is None:
            continue
        kind = _DATA_TYPE.values_by_number[outputs[name].data_type].name
        wanted = [_dtype(kind) or array.dtype]
        if kind == "TYPE_BF16":
            wanted.append(np.dtype(np.float32))  # as clients give it
        if array.dtype not in wanted:
            raise SmokeFailedError(f"{what} answered output {name} as {array.dtype}, promised was {kind}")
        dims = _dims(outputs[name], batched)
        if len(dims) != array.ndim or any(size not in (-1, have) for size, have in zip(dims, array.shape, strict=True)):
            raise SmokeFailedError(
                f"{what} answered output {name} with the shape {list(array.shape)}, promised was {dims}"
            )


def compare_outputs(
    served: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float, where: str = ""
) -> tuple[OutputComparison, ...]:
    """Compare a response's outputs with the reference; an output that is missing is infinitely far off.

    Args:
        served: output name -> array.
        expected: output name -> the reference; other outputs are not compared.
        tolerance: of each output.
        where: the request and the response, where there are several.
    """
    suffix = f" ({where})" if where else ""
    return tuple(
        _compare(f"{key}{suffix}", served[key], array, tolerance)
        if served.get(key) is not None
        else OutputComparison(f"{key}{suffix}", float("inf"), tolerance)
        for key, array in expected.items()
    )


def _reference(version: Location, config: ModelConfig, kind: ModelKind) -> _Reference:
    """Return requests with their right answers, where the answers come from, and the tolerance."""
    tolerance, parts = DEFAULT_TOLERANCE, {}
    promised = None
    with version_files(version, [GOLDEN_FILE_NAME]) as folder:
        if (folder / MANIFEST_FILENAME).is_file():
            manifest = read_manifest(folder)
            recorded, promised = manifest.golden, _promised(manifest)
            if isinstance(recorded, Mapping) and isinstance(recorded.get("tolerance"), int | float):
                tolerance = float(recorded["tolerance"])
            if isinstance(recorded, Mapping) and isinstance(recorded.get("parts"), Mapping):
                parts = {str(name): int(number) for name, number in recorded["parts"].items()}
        if (folder / GOLDEN_FILE_NAME).is_file():
            return _Reference((read_golden(folder / GOLDEN_FILE_NAME),), "golden", tolerance, promised, parts)
    if config.backend == "onnxruntime" and not kind.sequence:
        with version_files(version) as folder:
            path = folder / (config.message().default_model_filename or "model.onnx")
            try:
                made_up = Golden(*onnx_inputs.natural_answers(path))
                return _Reference((made_up,), "onnxruntime", tolerance, promised)
            except ModelError:
                pass  # made-up inputs do not suit every model: fall back to the shapes
    return _Reference(_made_up(config, kind), "none", tolerance, promised)


def _promised(manifest: Manifest) -> ModelConfig | None:
    """Return the configuration that a version was published with, where it names outputs."""
    try:
        config = parse_config(manifest.config, where=MANIFEST_FILENAME)
    except ConfigError:
        return None
    return config if config.message().output else None


def _made_up(config: ModelConfig, kind: ModelKind) -> tuple[Golden, ...]:
    """Make requests from a configuration alone: zeros without the optional inputs, then ones with all of them.

    Sizes of dynamic dimensions are those of a warm-up sample, else 1. A sequence has two requests.
    """
    entries = list(config.message().input)
    if _unknown_types(config):
        return ()
    required = [entry for entry in entries if not entry.optional] or entries
    times = 2 if kind.sequence else 1
    return tuple(
        Golden.of([Exchange({entry.name: _filled(entry, config, fill) for entry in chosen}, ())] * times)
        for chosen, fill in ((required, 0), (entries, 1))
    )


def _dtype(kind: str) -> np.dtype[Any] | None:
    """Return how NumPy holds one of Triton's data types; `None` where it has no such type."""
    if kind == _BFLOAT16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_DTYPES[kind]) if kind in _DTYPES else None


def _unknown_types(config: ModelConfig) -> str:
    """Return the inputs whose type has no values to make up."""
    kinds = {entry.name: _DATA_TYPE.values_by_number[entry.data_type].name for entry in config.message().input}
    return ", ".join(f"input {name} ({kind})" for name, kind in kinds.items() if _dtype(kind) is None)


def _filled(entry: Any, config: ModelConfig, fill: int) -> Array:
    """Return an input full of one value."""
    dtype = _dtype(_DATA_TYPE.values_by_number[entry.data_type].name)
    warm = [
        dict(sample.inputs)[entry.name].dims for sample in config.message().model_warmup if entry.name in sample.inputs
    ]
    dims = warm[0] if warm and len(warm[0]) == len(entry.dims) else entry.dims
    shape = [1] * bool(config.max_batch_size) + [max(1, size) for size in dims]
    if dtype == np.dtype(object):
        return np.full(shape, str(fill).encode(), dtype)
    return np.full(shape, fill).astype(dtype)


def _typed(array: Array, entry: Any) -> Array:
    """Give a recorded input the type that the file cannot hold."""
    if _DATA_TYPE.values_by_number[entry.data_type].name == _BFLOAT16:
        return array.astype(ml_dtypes.bfloat16)
    return array


def _dims(entry: Any, batched: bool) -> list[int]:
    return [-1] * batched + list(entry.dims)


def _as_served(array: Array, dims: list[int] | None, batched: bool) -> Array:
    """Give an array the shape that clients send where the configuration reshapes (scalars have one axis there)."""
    if dims is None or array.ndim == len(dims):
        return array
    shape = [array.shape[0], *dims[1:]] if batched and array.ndim else dims
    if any(size < 0 for size in shape) or int(np.prod(shape)) != array.size:
        return array
    return array.reshape(shape)


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
