"""`add` without a conversion: a model's files for any backend, published as they are with their configuration."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import repo_manager
from repo_manager.engine.fit import HEADER_BYTES, FitProblem, FitTarget
from repo_manager.engine.fit_check import PLAN_SUFFIXES, check_version_fit
from repo_manager.errors import ConfigError, GateError, UsageError
from repo_manager.files import reason_of, sha256_file, work_folder
from repo_manager.pipeline.given_files import GivenFiles
from repo_manager.pipeline.recording import (
    EmbeddedRun,
    Recording,
    RunOptions,
    embedded_run,
    exchanges_of,
    needs_of,
    record,
)
from repo_manager.report.progress import transfer_progress
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.golden import GOLDEN_FILE_NAME, write_golden
from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.publish import PublishTerms, plan_publish, publish
from repo_manager.rollout.comparison import unlike_promised
from repo_manager.server.exchange import ModelKind, own_kind
from repo_manager.sources import Source, open_source
from repo_manager.summary import Summarized
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.ensembles import USES, steps_of, uses_of
from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.types import StrPath
from repo_manager.validation import check_fields

__all__ = ["AddedFiles", "FilesOptions", "add_files"]

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FilesOptions:
    """Options of `add` for a folder, or a file published as it is.

    Attributes:
        backend: Triton's name of the backend. `None` takes the configuration's, else the one the files suggest.
        config: its config.pbtxt. `None` takes the folder's, else the model's existing one, else the backend's own
            completion.
        sample: requests, and if known their responses, the source of the golden sample: .npz, .npy, .json or .jsonl.
            `None` runs nothing.
        uses: models its code asks (BLS). They are kept as long as it is there.
        tolerance: largest allowed `max|served - reference| / max|reference|` of an output.
        target: the server an engine is for. `None`: not checked.
        origin: more about the source, for the manifest.
        dry_run: make all checks and files, and publish nothing.
    """

    backend: str | None = None
    config: Path | None = None
    sample: Path | None = None
    uses: tuple[str, ...] = ()
    tolerance: float = 1e-2
    target: FitTarget | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, repr=False)
class AddedFiles(Summarized):
    """The result of `add` for a folder or a file.

    Attributes:
        name: the name it has in the repository, as given to `add_files`.
        version: the new version's number. With `dry_run` the one it would get.
        path: the version's folder. With `dry_run` where it would be.
        published: whether the repository has the version now. False with `dry_run`.
        backend: name of the Triton backend for it.
        config: the config.pbtxt of the model.
        golden: who recorded the sample: `embedded server`, `given`, `nobody` (inputs alone), or empty: there is none.
        requests: how many requests the sample has.
        unreproducible: outputs left out of comparisons, as two runs differ.
        notes: remarks: not run here, config.pbtxt incomplete or left unchanged, answers unlike the configuration.
        fit: objections to a load on `FilesOptions.target`, as warnings.
        files: names in the version's folder.
    """

    name: str
    version: int
    path: Location
    published: bool
    backend: str
    config: str
    golden: str
    requests: int
    unreproducible: tuple[str, ...]
    notes: tuple[str, ...]
    fit: tuple[FitProblem, ...]
    files: tuple[str, ...]

    def _summary(self) -> Mapping[str, Any]:
        return {
            "model": f"{self.name}:{self.version}" + ("" if self.published else " (dry run)"),
            "backend": self.backend,
            "requests recorded": self.requests or None,
            "path": self.path,
        }


def add_files(
    path: StrPath | Source,
    name: str,
    repository: LocationLike,
    options: FilesOptions | None = None,
    *,
    run_options: RunOptions | None = None,
    report: Report = lambda _: None,
) -> AddedFiles:
    """Publish a model's files as the next version of `name`, as they are.

    With a sample, the version first runs on an embedded server, if this machine can run it. It must load and answer.
    Its answers become the golden sample, the proof of every later deploy. On any error the repository stays unchanged.

    Args:
        path: a file (a plan, TorchScript, OpenVINO's .xml, ...), a folder, or a URL of `open_source`. A folder holds a
            version's files (model.py, a SavedModel, ...), perhaps with a config.pbtxt. Of a model's folder in Triton's
            layout, the newest version is taken.
        name: the model's name in Triton.
        repository: the model repository's root. Created when missing.
        options: backend, configuration, sample and the like. `None` takes the defaults.
        run_options: what to run beyond the sample, and the versions it needs. `None`: nothing.
        report: called with a line of text for each step.

    Raises:
        InputError: the files or the sample cannot be read.
        UsageError: no backend or configuration is known.
        ConfigError: the configuration is broken, or breaks a rule of Triton's.
        GateError: the version does not load or answer, or an engine does not fit the target.
        RepositoryError: as `publish`.
    """
    repository, options = as_location(repository), options or FilesOptions()
    validate_model_name(name)
    with open_source(path, report) as opened:
        if opened.origin:
            options = dataclasses.replace(options, origin={**options.origin, **opened.record()})
        return _add_files(GivenFiles.find(opened.path), name, repository, options, run_options or RunOptions(), report)


def _add_files(
    source: GivenFiles, name: str, repository: Location, options: FilesOptions, asked: RunOptions, report: Report
) -> AddedFiles:
    config, text, notes = _config_of(source, name, repository, options)
    _check(config, name)
    fit = _check_fit(source.files_for(config), name, options.target)
    needs = needs_of(repository, name, config, asked.parts)
    what = _Publication(config, text, Recording(), tuple(notes), fit)
    has_sample = options.sample is not None or bool(asked.requests)
    if has_sample or not _is_complete(config):
        report("Starting an embedded server to run it" if has_sample else "Asking the backend for the configuration")
        with embedded_run(name, source.files_for(config), config, repository=repository, needs=needs) as run:
            what = _tried(name, what, run, options, asked, report)
    if not _is_complete(what.config):
        note = "config.pbtxt is not complete: the server has to be one that lets the backend complete it"
        what = dataclasses.replace(what, notes=(*what.notes, note))
    return _publish(source, name, repository, options, what, report)


@dataclasses.dataclass(frozen=True)
class _Publication:
    """The parts of a new version, except for its files."""

    config: ModelConfig
    text: str | None
    recording: Recording
    notes: tuple[str, ...]
    fit: tuple[FitProblem, ...]


def _tried(
    name: str, what: _Publication, run: EmbeddedRun | str, options: FilesOptions, asked: RunOptions, report: Report
) -> _Publication:
    """Complete the configuration by the server's findings, record the sample, and run what `asked` asks for."""
    has_sample = options.sample is not None or bool(asked.requests)
    if isinstance(run, EmbeddedRun) and not _is_complete(what.config):
        what = dataclasses.replace(what, config=_completed(what.config, run.config), text=None)
    if has_sample:
        exchanges = tuple(asked.requests)
        if options.sample is not None:
            kind_config = run.config if isinstance(run, EmbeddedRun) else what.config
            exchanges = exchanges_of(options.sample, kind_config, _kind(run, what.config))
        report(f"Recording {len(exchanges)} request(s)")
        recording = record(name, exchanges, run, options.tolerance)
        recorded = () if recording.golden is None else recording.golden.exchanges
        unlike = unlike_promised(what.config, (each for exchange in recorded for each in exchange.responses))
        what = dataclasses.replace(what, recording=recording, notes=(*what.notes, *unlike))
    if isinstance(run, EmbeddedRun) and asked.check is not None:
        asked.check(run)
    if isinstance(run, str):
        note = f"it was not run here{', so no answers were recorded' if has_sample else ''}: {run}"
        what = dataclasses.replace(what, notes=(*what.notes, note))
    return what


def _config_of(
    source: GivenFiles, name: str, repository: Location, options: FilesOptions
) -> tuple[ModelConfig, str | None, list[str]]:
    """Return the configuration, a person's own text of it, and notes.

    Raises:
        UsageError: no backend is named or evident.
        ConfigError: it is broken.
    """
    path = options.config or source.config
    existing = read_config_bytes(repository, name)
    notes: list[str] = []
    if path is not None:
        text: str | None = _read(path)
        config = parse_config(text or "", where=str(path))
        if existing is not None:
            notes.append("config.pbtxt of the repository stays as it is; the one given is compared with it")
    elif existing is not None:
        text, config = None, parse_config(existing.decode(errors="replace"), where=f"{name}/{CONFIG_FILENAME}")
    else:
        text, config = None, parse_config("")
    message = config.message()
    if message.name not in ("", name):
        message.name, text = name, None
    backend = options.backend or config.backend or source.backend
    if steps_of(config):
        backend = ""
    elif not backend:
        raise UsageError(
            f"{source.path}: nothing says which backend serves it", hint="Give --backend NAME, or --config FILE."
        )
    if backend and not message.backend and not message.platform:
        message.backend, text = backend, None
        if "saved_model.pb" in source.files:
            message.platform = "tensorflow_savedmodel"
    if options.backend and config.backend not in ("", options.backend):
        raise UsageError(f"--backend {options.backend}: the configuration says {config.backend!r}")
    if options.uses:
        if existing is not None and uses_of(config) != options.uses:
            notes.append(f"config.pbtxt stays as it is: declare --uses there, as the parameter {USES!r}")
        message.parameters[USES].string_value, text = ",".join(options.uses), None
    labels = {file: _labels(path, file) for file in config.label_filenames} if path is not None else {}
    return ModelConfig.from_message(message, labels=labels), text, notes


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {reason_of(exc)}") from exc


def _labels(config: Path, file: str) -> tuple[str, ...]:
    """Read a label file beside the configuration.

    Raises:
        ConfigError: the label file is missing.
    """
    place = config.parent / file
    if not place.is_file():
        raise ConfigError(f"{config} names the label file {file}, which is not beside it")
    return tuple(place.read_text(encoding="utf-8").splitlines())


def _check(config: ModelConfig, name: str) -> None:
    """Check the configuration by Triton's own rules.

    Raises:
        ConfigError: one is broken, except for fields the backend completes.
    """
    broken = [
        problem
        for problem in check_rules(config, where=f"{name}/{CONFIG_FILENAME}")
        if problem.severity is Severity.ERROR
    ]
    if broken:
        hints = " ".join(dict.fromkeys(problem.hint for problem in broken if problem.hint))
        raise ConfigError("; ".join(map(str, broken)), hint=hints or None)


def _is_complete(config: ModelConfig) -> bool:
    message = config.message()
    return bool(message.input and message.output)


def _completed(config: ModelConfig, served: ModelConfig) -> ModelConfig:
    """Return the configuration with the inputs and outputs the server found out."""
    message, found = config.message(), served.message()
    if not message.input:
        message.input.extend(found.input)
    if not message.output:
        message.output.extend(found.output)
    if not message.max_batch_size:
        message.max_batch_size = found.max_batch_size
    if found.model_transaction_policy.decoupled:
        message.model_transaction_policy.decoupled = True
    return ModelConfig.from_message(message, labels=config.labels)


def _kind(run: EmbeddedRun | str, config: ModelConfig) -> ModelKind:
    if isinstance(run, EmbeddedRun):
        return run.kind
    return own_kind(config.message())


def _check_fit(files: Mapping[str, Path], name: str, target: FitTarget | None) -> tuple[FitProblem, ...]:
    """Compare the engines among the files with the server they are for.

    Raises:
        GateError: an engine would not load there.
    """
    plans = {place: file for place, file in files.items() if place.endswith(PLAN_SUFFIXES)}
    if target is None or not plans:
        return ()
    heads = {}
    for place, file in plans.items():
        with file.open("rb") as opened:
            heads[place] = opened.read(HEADER_BYTES)
    problems = check_version_fit(heads, None, target)
    blocking = [problem for problem in problems if problem.blocks]
    if blocking:
        rows = "\n".join(f"  {problem.message}" for problem in blocking)
        raise GateError(f"{name}: this engine will not load there:\n{rows}", hint=blocking[0].hint)
    return tuple(problems)


def _publish(
    source: GivenFiles,
    name: str,
    repository: Location,
    options: FilesOptions,
    what: _Publication,
    report: Report,
) -> AddedFiles:
    files, config, golden = source.files_for(what.config), what.config, what.recording.golden
    with work_folder("repo-manager-add-") as folder:
        if golden is not None:
            files[GOLDEN_FILE_NAME] = Path(folder) / GOLDEN_FILE_NAME
            write_golden(files[GOLDEN_FILE_NAME], golden)
        if options.dry_run:
            number = plan_publish(repository, name, files, config).version
        else:
            report(f"Publishing {name}")
            size = sum(path.stat().st_size for path in files.values())
            progress = transfer_progress(report, size)
            details = _details(source, options, what.recording)
            terms = PublishTerms(config_text=what.text)
            number = publish(repository, name, files, config, details, terms, progress=progress).version
    return AddedFiles(
        name=name,
        version=number,
        path=repository / name / str(number),
        published=not options.dry_run,
        backend=config.backend or ("ensemble" if steps_of(config) else ""),
        config=what.text or format_config(config),
        golden="" if golden is None else what.recording.by,
        requests=0 if golden is None else len(golden.exchanges),
        unreproducible=what.recording.unreproducible,
        notes=what.notes,
        fit=what.fit,
        files=tuple(files),
    )


def _details(source: GivenFiles, options: FilesOptions, recording: Recording) -> dict[str, Any]:
    """Collect the manifest's records beyond the files."""
    origin: dict[str, Any] = {"path": source.path.name, **options.origin}
    if source.path.is_file():
        origin |= {"digest": sha256_file(source.path), "size_bytes": source.path.stat().st_size}
    golden = None
    if recording.golden is not None:
        golden = {
            "tolerance": options.tolerance,
            "recorded_by": recording.by,
            "unreproducible": recording.unreproducible,
            "parts": dict(recording.parts),
        }
    return {
        "source": origin,
        "golden": golden,
        "tools": {"repo-manager": repo_manager.__version__, "python": platform.python_version()},
        "machine": {"system": f"{platform.system()} {platform.machine()}"},
    }
