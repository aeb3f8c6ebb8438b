"""A golden sample recorded by running a version on the embedded server, before it is published."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import GateError, InputError, MissingDependencyError, ServerError, ServerRefusedError
from repo_manager.files import link_files, reason_of, work_folder
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.ensembles import ensembles_in
from repo_manager.repository.golden import Exchange, Golden, read_golden
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.scan import find_model
from repo_manager.repository.sealing import seal_as
from repo_manager.repository.stores import open_store
from repo_manager.request_data.read import read_streams
from repo_manager.request_data.tensors import InputFacts, with_batch_axis
from repo_manager.rollout.comparison import compare_outputs
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.exchange import ModelKind, ask, kind_of
from repo_manager.settings import load_settings
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.ensembles import models_needed_by, models_of, pinned_versions
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.triton_messages import model_config_pb2

__all__ = ["EmbeddedRun", "Recording", "RunOptions", "embedded_run", "exchanges_of", "needs_of", "record"]

Array = NDArray[Any]
Report = Callable[[str], None]
_MOST_ROWS = 16
_MOST_STEPS = 256
# triton-inference-server/core: errors about missing parts of this machine, not about the model.
_NOT_HERE = re.compile(
    r"unable to find .*backend|backend .*not found|unable to load backend|invalid or unsupported gpu|no GPUs? (is|are)|"
    r"failed to load .*\.so|unexpected platform type|unable to find backend library|cuda",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Recording:
    """The facts of a version's answers before its publication.

    Attributes:
        golden: the sample. `None` when none was given, or a decoupled model cannot run here.
        by: `embedded server`, `given` (the outputs are in the sample), or `nobody`: the inputs alone are kept.
        note: why nobody has run it here. Empty when it ran.
        unreproducible: outputs with differences from run to run. They are not compared.
        parts: model it needs -> the version the answers come from.
    """

    golden: Golden | None = None
    by: str = "nobody"
    note: str = ""
    unreproducible: tuple[str, ...] = ()
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Settings of a version's run on an embedded server before its publication, beyond its sample.

    Attributes:
        requests: requests to send where no sample is given. Their responses, where they have some, are the reference.
        parts: model it needs -> the version to run it with, whatever the other model's config.pbtxt serves.
        check: given the running version, after the sample. It raises where something is wrong.
    """

    requests: Sequence[Exchange] = ()
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    check: Callable[[EmbeddedRun], None] | None = None


@dataclasses.dataclass(frozen=True)
class EmbeddedRun:
    """A version running on a server of its own.

    Attributes:
        client: connected to that server by gRPC, until the block of `embedded_run` ends.
        config: the configuration the server runs it with, completed.
        kind: batched, stateful or decoupled, which decides the form of its calls.
        parts: model it needs -> the version behind its answers.
    """

    client: TritonClient
    config: ModelConfig
    kind: ModelKind
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def embedded_run(
    name: str,
    files: Mapping[str, Path],
    config: ModelConfig,
    *,
    repository: Location,
    needs: Mapping[str, ModelConfig | None] = MappingProxyType({}),
    timeout_s: float = 300.0,
) -> Iterator[EmbeddedRun | str]:
    """Run a version on an embedded server of its own, in a repository of its own.

    Args:
        name: name the server loads the version by. The repository need not have such a model.
        files: path in the version's folder -> file.
        config: its configuration. The backend may complete it.
        repository: repository with the models it needs.
        needs: those models, the inner ones first: the parts of an ensemble, or the models its code asks, each with the
            configuration it runs with. `None`: its own.
        timeout_s: for the start and the load.

    Yields:
        The running version, or why it cannot run on this machine.

    Raises:
        GateError: the model does not load, for a reason of its own.
        InputError: a model it needs is not there.
        RepositoryError: under the policy `signed_by`, no key vouches for one.
    """
    local = local_folder(repository)
    if needs and local is None:
        are = "are" if len(needs) > 1 else "is"
        yield f"it needs {', '.join(needs)}, which {are} in object storage. On a local copy (repo-manager copy) it runs"
        return
    places = {} if local is None else _places_of(local, name, needs)
    keys = load_settings().signed_by
    with work_folder("repo-manager-run-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        _lay_out(root, name, files, config)
        for needed, place in places.items():
            source, wanted = place.resolve(), needs[needed]
            if keys:
                source, wanted = seal_as(source, wanted, stack.enter_context(work_folder("repo-manager-sealed-")), keys)
            _link(root / needed, source, wanted)
        server = EmbeddedServer(ServerOptions(repository=str(root), record=False, log_path=root / "server.log"))
        stack.callback(server.stop, deadline_s=5.0)
        try:
            server.start(timeout_s=timeout_s)
            server.wait_ready(timeout_s)
            client = stack.enter_context(TritonClient.connect(server.grpc_url))
            run: EmbeddedRun | str = _loaded(client, (*needs, name), timeout_s)
        except MissingDependencyError as exc:
            run = exc.message
        except ServerRefusedError as exc:
            if not _NOT_HERE.search(exc.message):
                raise GateError(
                    f"{name}: it does not load on the embedded server: {exc.reason or exc.message}",
                    hint="Correct the model or its configuration. Without --sample it is published untried.",
                ) from exc
            run = exc.reason or exc.message
        yield run


def _places_of(repository: Path, name: str, needs: Iterable[str]) -> dict[str, Path]:
    """Return the folders of the models a model needs.

    Raises:
        InputError: a needed model is missing.
    """
    places = {needed: repository / needed for needed in needs}
    absent = [needed for needed, place in places.items() if not place.is_dir()]
    if absent:
        raise InputError(
            f"{name} needs {', '.join(absent)}, which is not in {repository}, so it cannot be run",
            hint="Add what it needs first, or publish it without --sample.",
        )
    return places


def _loaded(client: TritonClient, models: Sequence[str], timeout_s: float) -> EmbeddedRun:
    """Load models in this order. The last one is the version to run."""
    for each in models:
        client.load(each, timeout_s=timeout_s)
    name = models[-1]
    completed = ModelConfig.from_message(client.model_config(name))
    ready = [entry for entry in client.repository_index() if entry.state == "READY" and entry.name != name]
    parts = {entry.name: max(each.version or 0 for each in ready if each.name == entry.name) for entry in ready}
    return EmbeddedRun(client, completed, kind_of(client, name), parts)


def needs_of(
    repository: Location, name: str, config: ModelConfig, parts: Mapping[str, int]
) -> dict[str, ModelConfig | None]:
    """Return a model's needed models, direct or through others, in the order of loading.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model. The repository need not have it: `config` counts in any case.
        config: configuration of the model (config.pbtxt).
        parts: model -> version, as in `RunOptions`.

    Returns:
        Name -> configuration to serve the versions in `parts`, else those of the model's own, and every version asked
        for by number. `None`: as the model has it.
    """
    if not models_of(config):
        return {}
    folder = local_folder(repository)
    is_there = folder is None or folder.exists()
    known = {**(ensembles_in(open_store(repository)) if is_there else {}), name: config}
    found: dict[str, ModelConfig | None] = {}
    for needed in models_needed_by(known, name):
        found[needed] = None
        pinned = pinned_versions(known, needed).keys()
        content = read_config_bytes(repository, needed) if pinned or needed in parts else None
        if content is not None:
            inner = parse_config(content.decode(errors="replace"), where=f"{needed}/{CONFIG_FILENAME}")
            served = served_versions(inner, [each.version for each in find_model(repository, needed).versions])
            wanted = {*([parts[needed]] if needed in parts else served), *pinned}
            if wanted != set(served):
                message = inner.message()
                message.version_policy.specific.versions[:] = sorted(wanted)
                found[needed] = ModelConfig.from_message(message)
    return found


def _link(place: Path, model: Path, config: ModelConfig | None) -> None:
    """Let a model of the repository appear in another one, perhaps with another configuration."""
    if config is None:
        place.symlink_to(model)
        return
    place.mkdir()
    for entry in model.iterdir():
        if entry.name != CONFIG_FILENAME:
            (place / entry.name).symlink_to(entry)
    (place / CONFIG_FILENAME).write_text(format_config(config), encoding="utf-8")


def _lay_out(root: Path, name: str, files: Mapping[str, Path], config: ModelConfig) -> None:
    """Write a repository of one version, as it will be published."""
    version = root / name / "1"
    version.mkdir(parents=True)
    link_files(files, version)
    message = config.message()
    message.ClearField("version_policy")
    if not message.name:
        message.name = name
    (root / name / CONFIG_FILENAME).write_text(format_config(ModelConfig.from_message(message)), encoding="utf-8")
    for file, labels in config.labels.items():
        (root / name / file).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def exchanges_of(path: Path, config: ModelConfig, kind: ModelKind) -> tuple[Exchange, ...]:
    """Read a sample: requests, with the responses where the file has them.

    A file in the form of a golden sample (`input:NAME`, `output:NAME`) is taken as it is. In any other file the first
    axis counts the requests. A sequence model gets its steps (of several streams, those of the first). Another model
    gets the first request alone, and then, if it takes batches, as many as fit.

    Args:
        path: file of the sample: .npz, .npy, .json or .jsonl.
        config: configuration of the model (config.pbtxt).
        kind: how the model is asked: batched, stateful, decoupled.

    Raises:
        InputError: it cannot be read, or does not fit the model's inputs.
    """
    if path.suffix.lower() == ".npz" and _is_golden(path):
        return read_golden(path).exchanges
    message = config.message()
    inputs = [
        InputFacts(entry.name, _datatype(entry.data_type), tuple(entry.dims), bool(entry.optional))
        for entry in message.input
    ]
    if not inputs:
        raise InputError(f"{path}: the configuration names no inputs, so nothing can be sent", hint="Give --config.")
    streams = read_streams(path, inputs)
    rows = streams[0][:_MOST_STEPS] if kind.sequence else [row for stream in streams for row in stream][:_MOST_ROWS]
    batch = config.max_batch_size
    if batch == 0:
        return tuple(Exchange(row, ()) for row in rows)
    single = [with_batch_axis(row, inputs) for row in rows]
    if kind.sequence:
        return tuple(Exchange(row, ()) for row in single)
    requests = single[:1]
    shapes = {name: array.shape for name, array in single[0].items()}
    alike = [row for row in single if {name: array.shape for name, array in row.items()} == shapes]
    if len(alike) > 1 and batch > 1:
        requests.append({name: np.concatenate([row[name] for row in alike[:batch]])[:batch] for name in shapes})
    return tuple(Exchange(row, ()) for row in requests)


def _is_golden(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return any(key.startswith("input:") for key in archive.files)
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise InputError(f"{path}: the sample cannot be read: {reason_of(exc)}") from exc


def _datatype(number: int) -> str:
    kind = str(model_config_pb2.DataType.Name(number)).removeprefix("TYPE_")
    return "BYTES" if kind == "STRING" else kind


def record(
    name: str, exchanges: Sequence[Exchange], run: EmbeddedRun | str, tolerance: float, *, timeout_s: float = 60.0
) -> Recording:
    """Record a version's answers to a sample.

    Args:
        name: name of the model on the server of `run`.
        exchanges: requests to send. Where there are responses, those are the reference, and the run is compared with
            them.
        run: the running version, or why there is none.
        tolerance: largest accepted error of each output.
        timeout_s: deadline of the call in seconds.

    Raises:
        GateError: it refuses the sample, or answers otherwise than the sample says.
    """
    given = any(exchange.responses for exchange in exchanges)
    if isinstance(run, str):
        if given:
            return Recording(Golden.of(exchanges), "given", run)
        return Recording(Golden.of(Exchange(each.inputs, ({},)) for each in exchanges), "nobody", run)
    requests = [exchange.inputs for exchange in exchanges]
    try:
        first, second = (_answers(run, name, requests, timeout_s) for _ in range(2))
    except ServerError as exc:
        reason = getattr(exc, "reason", "") or exc.message
        raise GateError(f"{name}: it refuses the sample on the embedded server: {reason}") from exc
    if given:
        _require_alike(name, exchanges, first, tolerance)
        return Recording(Golden.of(exchanges), "given", parts=run.parts)
    counts = [(len(one), len(other)) for one, other in zip(first, second, strict=True)]
    if any(one != other for one, other in counts):
        raise GateError(
            f"{name}: it answers the same request with {counts[0][0]}, then with {counts[0][1]} responses, so no "
            "sample can be recorded",
            hint="Publish it without --sample.",
        )
    unlike = {
        comparison.output
        for one, other in zip(_flat(first), _flat(second), strict=True)
        for comparison in compare_outputs(one, other, tolerance)
        if not comparison.passed
    }
    kept = [
        Exchange(inputs, tuple({key: a for key, a in outputs.items() if key not in unlike} for outputs in responses))
        for inputs, responses in zip(requests, first, strict=True)
    ]
    return Recording(Golden.of(kept), "embedded server", unreproducible=tuple(sorted(unlike)), parts=run.parts)


def _answers(
    run: EmbeddedRun, name: str, requests: Sequence[Mapping[str, Array]], timeout_s: float
) -> list[list[Mapping[str, Array]]]:
    answers: list[list[Mapping[str, Array]]] = [[] for _ in requests]
    for response in ask(run.client, name, None, requests, run.kind, timeout_s=timeout_s):
        answers[response.request].append(response.outputs)
    return answers


def _flat(answers: Sequence[Sequence[Mapping[str, Array]]]) -> list[Mapping[str, Array]]:
    return [outputs for responses in answers for outputs in responses]


def _require_alike(
    name: str,
    exchanges: Sequence[Exchange],
    answers: Sequence[Sequence[Mapping[str, Array]]],
    tolerance: float,
) -> None:
    """Compare a run with the responses of the given sample.

    Raises:
        GateError: an output is wrong, or there are more or fewer responses.
    """
    wrong = []
    for number, (exchange, responses) in enumerate(zip(exchanges, answers, strict=True), start=1):
        where = f"request {number}" if len(exchanges) > 1 else ""
        if len(responses) != len(exchange.responses):
            wrong.append(f"{len(responses)} responses instead of {len(exchange.responses)} {where}")
            continue
        for served, expected in zip(responses, exchange.responses, strict=True):
            failed = [each for each in compare_outputs(served, expected, tolerance, where) if not each.passed]
            wrong += [f"{each.output} is off by {each.error:.3g}, allowed {each.tolerance:.3g}" for each in failed]
    if wrong:
        raise GateError(
            f"{name}: on the embedded server it does not answer as the sample says: {'; '.join(wrong[:5])}",
            hint="Correct the sample, or leave its outputs out: then they are recorded.",
        )
