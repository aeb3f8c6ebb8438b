"""`add`: from an ONNX file to a new, numbered version in a repository."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

import repo_manager
from repo_manager.accuracy import AccuracyGate
from repo_manager.declared.request import request_record
from repo_manager.engine.build_log import BuildProgress
from repo_manager.engine.fit import HEADER_BYTES, FitProblem, FitTarget
from repo_manager.engine.fit_check import check_version_fit
from repo_manager.engine.gpu import choose_backend, find_gpus
from repo_manager.errors import GateError, RepoManagerError, UsageError
from repo_manager.files import document, work_folder
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.runtime import start_runtime
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.pipeline.add_types import Added, AddOptions, AddTask, Control, SparsityMode
from repo_manager.pipeline.controls import PreparedControl, build_controls, with_layer_times
from repo_manager.pipeline.prepare import BuildWatch, PreparedVersion, convert_and_build
from repo_manager.pipeline.serving_config import check_backend_options
from repo_manager.precision import load_calibration
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.report.progress import transfer_progress
from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.repository.publish import plan_publish, publish
from repo_manager.sources import Source, open_source
from repo_manager.sparsity import PruneReport, prune, sparsity_report
from repo_manager.triton_config.config import format_config
from repo_manager.types import StrPath, as_json

__all__ = ["AddOptions", "Added", "SparsityMode", "add"]

Report = Callable[[str], None]


def add(
    path: StrPath | Source,
    name: str,
    repository: LocationLike,
    options: AddOptions | None = None,
    *,
    report: Report = lambda _: None,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> Added:
    """Convert a model, check the result, and publish it as the next version of `name`.

    The version is not served until `deploy`. On any error the repository is as it was. Controls are published before
    the model itself, each in one step.

    Args:
        path: an ONNX file: a path, a URL of `open_source`, or its result.
        name: the model's name in Triton.
        repository: the model repository's root. Created when missing.
        options: precision, backend, batch size, gates and the like. `None` takes the defaults.
        report: called with a line of text for each step.
        progress: called with each step of an engine build, in the building thread. `None`: nothing is reported.
        cancelled: set it from another thread to stop the build. `None`: the build cannot be stopped.

    Raises:
        InputError: the model, the calibration data or the repository is bad.
        GateError: weights are not 2:4 with `SparsityMode.REQUIRE`, the conversion failed a check, or the engine will
            not load on `AddOptions.target`.
    """
    repository = as_location(repository)
    options, watch = options or AddOptions(), BuildWatch(report, progress, cancelled)
    validate_model_name(name)
    choice = choose_backend(options.backend)
    check_backend_options(options, choice.backend)
    with open_source(path, report) as source, work_folder("repo-manager-add-") as folder:
        report(f"Reading {source}")
        start_runtime()
        model = load_model(source.path)
        gate = None if options.accuracy is None else AccuracyGate.of(options.accuracy, model)
        task = AddTask(name, repository, choice, Path(folder), gate)
        with _speaking_of(source.path, task.work):
            return _add(_Origin(model, source.record()), task, options, watch)


@contextlib.contextmanager
def _speaking_of(path: Path, work: Path) -> Iterator[None]:
    """Let errors name the file given: the real one is in a folder gone by then."""
    made = re.compile(re.escape(str(work)) + r"/(?:[^\s:]*/)?(?P<stage>pruned|converted|dense)/model\.onnx")

    def said(text: str) -> str:
        return made.sub(lambda match: f"{path} ({match['stage']})", text)

    try:
        yield
    except RepoManagerError as exc:
        if made.search(f"{exc.message} {exc.hint}") is None:
            raise
        hint = None if exc.hint is None else said(exc.hint)
        raise type(exc)(said(exc.message), hint=hint) from exc


def _add(origin: _Origin, task: AddTask, options: AddOptions, watch: BuildWatch) -> Added:
    report = watch.report
    model, pruned = _sparse(origin.source, options, task.work, watch)
    version, found = convert_and_build(model, task, options, watch)
    fit = _check_fit(version, options.target)
    controls = build_controls(version, found, watch) if options.control else ()
    version = with_layer_times(version, controls)
    return _publish(dataclasses.replace(origin, pruned=pruned), version, controls, fit, options, report)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """The file given, its origin, and the result of pruning it."""

    source: Model
    record: Mapping[str, Any]
    pruned: PruneReport | None = None


def _sparse(model: Model, options: AddOptions, work: Path, watch: BuildWatch) -> tuple[Model, PruneReport | None]:
    """Apply `--sparsity`: return the model to convert."""
    on_data = options.prune_drift is not None or options.permute or options.distill
    if on_data and (options.sparsity is not SparsityMode.PRUNE or options.calibration is None):
        raise UsageError(
            "--prune-drift, --permute and --distill need --sparsity prune and --calibration DATA: the layers are "
            "solved and judged on it"
        )
    if options.sparsity is SparsityMode.REPORT:
        return model, None
    if options.sparsity is SparsityMode.PRUNE:
        proto, pruned = _pruned(model, options, watch)
        path = work / "pruned" / "model.onnx"
        path.parent.mkdir()
        save_model(proto, path)
        return load_model(path), pruned
    failing = sparsity_report(model).not_valid
    if failing:
        rows = "\n".join(f"  {layer.node} ({layer.op_type} {layer.weight}): {layer.reason}" for layer in failing)
        raise GateError(
            f"{model.path}: {len(failing)} layer(s) could be 2:4 sparse and are not:\n{rows}",
            hint=f"Prune and retrain ({document('sparsity.md')}), or pass --sparsity report, or --sparsity prune.",
        )
    return model, None


def _pruned(model: Model, options: AddOptions, watch: BuildWatch) -> tuple[onnx.ModelProto, PruneReport]:
    """Prune on calibration data where there is some, else by magnitude."""
    if options.calibration is None:
        watch.report("Pruning to 2:4 by magnitude; without calibration data expect a loss of accuracy")
        return prune(model)
    watch.report("Pruning to 2:4 on the calibration data")
    data = load_calibration(options.calibration, signature_of(model))
    step = watch.progress

    def told(share: float, _: str) -> None:
        if step is not None:
            step("Pruning", round(100 * share), 100)

    pruning = PruneOptions(max_drift=options.prune_drift, permute=options.permute, distill=options.distill)
    return prune_with_data(model, data, pruning, told)


def _check_fit(version: PreparedVersion, target: FitTarget | None) -> tuple[FitProblem, ...]:
    """Compare the engines with the server they are for.

    Raises:
        GateError: an engine would not load there.
    """
    if target is None:
        return ()
    heads = {}
    for name, path in version.artifact.files.items():
        with path.open("rb") as file:
            heads[name] = file.read(HEADER_BYTES)
    problems = check_version_fit(heads, {"engine": as_json(version.artifact.facts)}, target)
    blocking = [problem for problem in problems if problem.blocks]
    if blocking:
        rows = "\n".join(f"  {problem.message}" for problem in blocking)
        raise GateError(f"{version.task.name}: this engine will not load there:\n{rows}", hint=blocking[0].hint)
    return problems


def _publish(
    origin: _Origin,
    version: PreparedVersion,
    controls: tuple[PreparedControl, ...],
    fit: tuple[FitProblem, ...],
    options: AddOptions,
    report: Report,
) -> Added:
    """Publish the controls, then the model: where the model is, its controls are."""
    beside = tuple(_publish_control(origin, version, control, options, report) for control in controls)
    details = _details(origin, version)
    details["request"] = request_record(
        backend=version.task.choice.backend,
        sparsity=options.sparsity.value,
        calibration=options.calibration,
        convert=options.convert,
        engine=options.engine,
    )
    if beside:
        details["controls"] = {control.name: control.version for control in beside}
    number = _publish_one(version, details, options, report)
    return Added(
        name=version.task.name,
        version=number,
        path=version.task.repository / version.task.name / str(number),
        published=not options.dry_run,
        backend=version.task.choice,
        batch_axis=version.converted.axis,
        sparsity=version.converted.conversion.sparsity,
        pruned=origin.pruned,
        conversion=dataclasses.replace(version.converted.conversion, files=_names(version)),
        golden=version.golden,
        config=format_config(version.config),
        config_kept=version.config_kept,
        engine=version.artifact.facts,
        fit=fit,
        controls=beside,
        files=tuple(version.files),
    )


def _publish_control(
    origin: _Origin,
    version: PreparedVersion,
    control: PreparedControl,
    options: AddOptions,
    report: Report,
) -> Control:
    details = _details(origin, control.version)
    details["control"] = {
        "of": version.task.name,
        "dense": control.twin.dense,
        "sparse_kernels_offered": control.twin.sparse_flag,
        "filled_weights": control.filled,
        "purpose": control.twin.purpose,
    }
    return control.published_as(_publish_one(control.version, details, options, report))


def _publish_one(version: PreparedVersion, details: Mapping[str, Any], options: AddOptions, report: Report) -> int:
    """Return the number the version got, or would get."""
    task = version.task
    if options.dry_run:
        return plan_publish(task.repository, task.name, version.files, version.config).version
    report(f"Publishing {task.name}")
    progress = transfer_progress(report, sum(path.stat().st_size for path in version.files.values()))
    return publish(task.repository, task.name, version.files, version.config, details, progress=progress).version


def _names(version: PreparedVersion) -> tuple[Path, ...]:
    """Return the names of the converted files: their folder was temporary."""
    return tuple(Path(path.name) for path in version.converted.conversion.files)


def _details(origin: _Origin, version: PreparedVersion) -> dict[str, Any]:
    """Collect the manifest's records beyond the files."""
    conversion, source = version.converted.conversion, origin.source
    converted = as_json(conversion)
    sparsity = converted.pop("sparsity")
    converted["files"] = list(map(str, _names(version)))
    return {
        "source": {
            "path": source.path.name,
            "digest": source.digest,
            "size_bytes": source.size_bytes,
            "external": [file.relative_to(source.path.parent.absolute()).as_posix() for file in source.external_files],
            **origin.record,
        },
        "precision": conversion.precision,
        "batch_axis": version.converted.axis,
        "pruned": origin.pruned,
        "sparsity": sparsity,
        "conversion": converted,
        "engine": version.artifact.facts,
        "golden": version.golden,
        "tools": {
            "repo-manager": repo_manager.__version__,
            "python": platform.python_version(),
            "onnx": onnx.__version__,
            **conversion.tools,
        },
        "machine": {"system": f"{platform.system()} {platform.machine()}", "gpus": find_gpus()},
    }
