"""`ensemble`: published models become one, run and recorded before its publication."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.files import work_folder, write_atomic
from repo_manager.pipeline.adding_files import AddedFiles, FilesOptions, add_files
from repo_manager.pipeline.recording import RunOptions
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.golden import GOLDEN_FILE_NAME, Exchange, read_golden
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import resolve_version
from repo_manager.repository.transfer import version_files
from repo_manager.summary import Summarized
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.joining import Edge, EnsemblePart, Joined, TensorMap, join_models
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.types import StrPath
from repo_manager.validation import check_fields

__all__ = ["EnsembleOptions", "MadeEnsemble", "make_ensemble"]

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class EnsembleOptions:
    """How an ensemble is made of models.

    Attributes:
        maps: `SOURCE=TARGET` decisions about inputs: see `triton_config.joining.TensorMap`.
        outputs: the tensors it returns. None: every output no later model takes.
        pin: ask for each model's version by number: the one named, else the newest its config.pbtxt serves. Without it
            only named versions are pinned.
        sample: requests for the golden sample, as for `FilesOptions`. `None` takes those of the golden sample, where a
            single model takes all inputs.
        tolerance: largest allowed `max|served - reference| / max|reference|` of an output.
        dry_run: make all checks and files, and publish nothing.
    """

    maps: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    pin: bool = False
    sample: StrPath | None = None
    tolerance: float = FilesOptions.tolerance
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, repr=False)
class MadeEnsemble(Summarized):
    """The result of `make_ensemble`.

    Attributes:
        added: result of publishing the ensemble as a model. Not published with `dry_run`.
        models: its models, with the version where one is pinned.
        edges: each input with its source.
        left_out: optional inputs without a source, as `MODEL.INPUT`.
    """

    added: AddedFiles
    models: tuple[str, ...]
    edges: tuple[Edge, ...]
    left_out: tuple[str, ...]

    def _summary(self) -> Mapping[str, Any]:
        return {"ensemble": f"{self.added.name}:{self.added.version}", "models": " -> ".join(self.models)}


def make_ensemble(
    repository: LocationLike,
    name: str,
    models: Sequence[str],
    options: EnsembleOptions | None = None,
    *,
    run_options: RunOptions | None = None,
    report: Report = lambda _: None,
) -> MadeEnsemble:
    """Publish an ensemble of models of the repository.

    Args:
        repository: repository with the models, and for the ensemble.
        name: the ensemble's name. If there is such a model, it is the same ensemble: it gets another version, with its
            models' present answers.
        models: `NAME`, `NAME:VERSION` or `NAME:TAG`, in the order of the data flow.
        options: inputs, outputs, pins and the like. `None` takes the defaults.
        run_options: settings of its run on an embedded server before its publication. `None`: the sample alone.
        report: called with a line of text for each step.

    Raises:
        UsageError: the tensors can be matched in more than one way, or an option does not fit.
        RepositoryError: a model or version does not exist, or another one has the ensemble's name.
        ConfigError: a model's configuration is broken or lists no tensors.
        GateError: the ensemble does not load or answer on the embedded server.
        InputError: the sample cannot be read.
    """
    repository, options = as_location(repository), options or EnsembleOptions()
    run_options = run_options or RunOptions()
    if not models:
        raise UsageError(f"{name}: an ensemble needs at least one model")
    parts = [_part(repository, each, options.pin) for each in models]
    if name in {part.model for part in parts}:
        raise UsageError(f"{name} cannot contain itself")
    joined = join_models(name, parts, [TensorMap.parse(each) for each in options.maps], options.outputs)
    _require_same(repository, name, joined.config)
    sample = () if options.sample is not None else _first_requests(repository, joined)
    described = tuple(part.model if part.version is None else f"{part.model}:{part.version}" for part in parts)
    with work_folder("repo-manager-ensemble-") as folder:
        _write(Path(folder), joined.config)
        files = FilesOptions(
            sample=None if options.sample is None else Path(options.sample),
            tolerance=options.tolerance,
            origin={"path": "repo-manager ensemble", "models": described},
            dry_run=options.dry_run,
        )
        added = add_files(
            folder,
            name,
            repository,
            files,
            run_options=dataclasses.replace(run_options, requests=run_options.requests or sample),
            report=report,
        )
    if not added.golden:
        why = "no sample was recorded: its inputs are not those of one model that has one. Give --sample."
        added = dataclasses.replace(added, notes=(*added.notes, why))
    return MadeEnsemble(added, described, joined.edges, joined.left_out)


def _require_same(repository: Location, name: str, config: ModelConfig) -> None:
    """Check an existing model of the name: it must be this very ensemble.

    Raises:
        RepositoryError: the name belongs to another model.
    """
    content = read_config_bytes(repository, name)
    if content is None:
        return
    existing = parse_config(content.decode(errors="replace"), where=f"{name}/{CONFIG_FILENAME}")
    if set(changed_fields(existing, config)) - {"name", "version_policy"}:
        raise RepositoryError(
            f"the model {name!r} exists and is another one: an ensemble is its config.pbtxt, which all versions share",
            hint=f"Choose another name, or change it with repo-manager config {name}, or remove it first.",
        )


def _part(repository: Location, text: str, pin: bool) -> EnsemblePart:
    """Look a model up.

    Raises:
        RepositoryError: there is no such model or version.
        UsageError: it will be pinned and serves nothing.
    """
    name, number = resolve_version(repository, text)
    content = read_config_bytes(repository, name)
    config = parse_config((content or b"").decode(errors="replace"), where=f"{name}/{CONFIG_FILENAME}")
    version: int | None = number if ":" in text else None
    if pin and version is None:
        served = served_versions(config, [entry.version for entry in find_model(repository, name).versions])
        if not served:
            raise UsageError(f"--pin: {name} serves no version", hint=f"Name one: {name}:{number}")
        version = max(served)
    by_output = read_labels(repository, name)
    labels = {
        str(output.label_filename): by_output[output.name]
        for output in config.message().output
        if output.name in by_output
    }
    return EnsemblePart(name, version, dataclasses.replace(config, labels=labels))


def _first_requests(repository: Location, joined: Joined) -> tuple[Exchange, ...]:
    """Return the recorded requests of the one model with all inputs. None where there is no such."""
    own = [edge for edge in joined.edges if edge.source.startswith("input:")]
    takers = {edge.model for edge in own}
    if len(takers) != 1:
        return ()
    model = takers.pop().partition("#")[0]
    names = {edge.input: edge.source.removeprefix("input:") for edge in own}
    with contextlib.suppress(RepositoryError):
        path = find_model(repository, model).versions[-1].path
        with version_files(path, [GOLDEN_FILE_NAME]) as folder:
            file = folder / GOLDEN_FILE_NAME
            recorded = read_golden(file).exchanges if file.is_file() else ()
        return tuple(
            Exchange({names[key]: array for key, array in each.inputs.items()}, ())
            for each in recorded
            if each.inputs.keys() <= names.keys()
        )
    return ()


def _write(folder: Path, config: ModelConfig) -> None:
    """Write the ensemble as Triton has it: its config.pbtxt and label files, and a version without files."""
    (folder / "1").mkdir()
    write_atomic(folder / CONFIG_FILENAME, format_config(config).encode())
    for file, labels in config.labels.items():
        write_atomic(folder / file, "".join(f"{label}\n" for label in labels).encode())
