"""`add`: from an ONNX file to a new, numbered version in a repository."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import repo_manager
from repo_manager.engine import BackendChoice, EngineOptions, EngineSource, build_artifact, choose_backend, find_gpus
from repo_manager.errors import GateError
from repo_manager.onnx_model import (
    BatchAxis,
    Model,
    Session,
    Signature,
    find_batch_axis,
    find_sizes,
    index_limits,
    load_model,
    natural_inputs,
    save_model,
    signature_of,
)
from repo_manager.pipeline.golden import GoldenFacts, golden_sample
from repo_manager.precision import CalibrationData, Conversion, ConvertOptions, convert, load_calibration
from repo_manager.repository import Location, plan_publish, publish, read_config_bytes, validate_model_name
from repo_manager.repository.golden import GOLDEN_FILE_NAME, write_golden
from repo_manager.sparsity import PruneReport, SparsityReport, prune, sparsity_report
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    ConfigOptions,
    derive_config,
    format_config,
    parse_config,
    served_signature,
)
from repo_manager.types import Backend, Precision, as_json

__all__ = ["AddOptions", "Added", "SparsityMode", "add"]

Report = Callable[[str], None]


class SparsityMode(str, enum.Enum):
    """What `add` does about weights that are not 2:4."""

    REQUIRE = "require"
    REPORT = "report"
    PRUNE = "prune"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class AddOptions:
    """Options of `add`.

    Attributes:
        precision: what the published version computes in.
        backend: `auto` or a `Backend`'s name.
        sparsity: whether weights that are not 2:4 stop the command, are reported, or are pruned.
        calibration: .npz file, folder of .npy, ...; INT8 needs it. The other precisions measure
            their drift on it, instead of on made-up inputs, when it is given.
        config: what config.pbtxt says beyond what the model decides.
        engine: how an engine is built; the onnxruntime backend has none.
        convert: gates and exceptions of the conversion.
        dry_run: do everything except publishing.
    """

    precision: Precision = Precision.FP32
    backend: str = "auto"
    sparsity: SparsityMode = SparsityMode.REPORT
    calibration: str | None = None
    config: ConfigOptions = dataclasses.field(default_factory=ConfigOptions)
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    convert: ConvertOptions = dataclasses.field(default_factory=ConvertOptions)
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Added:
    """What `add` did.

    Attributes:
        name: the model's name.
        version: the new version's number; with `dry_run` the one it would get.
        path: the version's folder; with `dry_run` where it would be.
        published: false with `dry_run`.
        backend: and why it was chosen.
        batch_axis: whether the model has one, and how that was found out.
        sparsity: of the published weights.
        pruned: what pruning did, when it was asked for.
        conversion: its checks and its drift against the source.
        golden: how a server's answer is compared.
        config: the config.pbtxt of the model.
        engine: what is known of the engine: library, per-layer precision and sparsity evidence.
        files: names in the version's folder.
    """

    name: str
    version: int
    path: Location
    published: bool
    backend: BackendChoice
    batch_axis: BatchAxis
    sparsity: SparsityReport
    pruned: PruneReport | None
    conversion: Conversion
    golden: GoldenFacts
    config: str
    engine: Mapping[str, Any]
    files: tuple[str, ...]


def add(
    path: Path, name: str, repository: Location, options: AddOptions | None = None, *, report: Report = lambda _: None
) -> Added:
    """Convert a model, check the result, and publish it as the next version of `name`.

    The version is not served until `deploy`. On any error the repository is as it was.

    Args:
        path: an ONNX file.
        name: the model's name in Triton.
        repository: the model repository's root; created when missing.
        options: `None` takes the defaults.
        report: told what is being done.

    Raises:
        InputError: the model, the calibration data or the repository is bad.
        GateError: weights are not 2:4 with `SparsityMode.REQUIRE`, or the conversion failed a check.
    """
    options = options or AddOptions()
    validate_model_name(name)
    choice = choose_backend(options.backend)
    report(f"Reading {path}")
    source = load_model(path)
    with tempfile.TemporaryDirectory(prefix="repo-manager-add-") as folder:
        work = Path(folder)
        model, pruned = _sparse(source, options.sparsity, work, report)
        return _add_model(source, model, pruned, _Target(name, repository, choice, work), options, report)


@dataclasses.dataclass(frozen=True)
class _Target:
    name: str
    repository: Location
    choice: BackendChoice
    work: Path


def _sparse(model: Model, mode: SparsityMode, work: Path, report: Report) -> tuple[Model, PruneReport | None]:
    """Apply `--sparsity`: return the model to convert."""
    if mode is SparsityMode.REPORT:
        return model, None
    if mode is SparsityMode.PRUNE:
        report("Pruning to 2:4 by magnitude; without retraining expect a loss of accuracy")
        proto, pruned = prune(model)
        path = work / "pruned" / "model.onnx"
        path.parent.mkdir()
        save_model(proto, path)
        return load_model(path), pruned
    failing = sparsity_report(model).not_valid
    if failing:
        rows = "\n".join(f"  {layer.node} ({layer.op_type} {layer.weight}): {layer.reason}" for layer in failing)
        raise GateError(
            f"{model.path}: {len(failing)} layer(s) could be 2:4 sparse and are not:\n{rows}",
            hint="Prune and retrain (examples/README.md), or pass --sparsity report, or --sparsity prune.",
        )
    return model, None


def _add_model(
    source: Model, model: Model, pruned: PruneReport | None, target: _Target, options: AddOptions, report: Report
) -> Added:
    signature = signature_of(model)
    calibration = None if options.calibration is None else load_calibration(options.calibration, signature)
    axis = find_batch_axis(model, signature, _two_rows(calibration))
    sample = _sample(model, signature, calibration)
    chosen = _config_options(options.config, target, sample, batched=axis.batched)
    # Before the long work, for what is wrong by then; and after it, for the shapes of what is served.
    derive_config(target.name, signature, axis, target.choice.backend, chosen)
    report(f"Converting to {options.precision}")
    output = target.work / "converted" / "model.onnx"
    output.parent.mkdir()
    conversion = convert(model, options.precision, output, calibration=calibration, options=options.convert)
    report(f"Building for the {target.choice.backend} backend ({target.choice.reason})")
    served = served_signature(signature, output) if target.choice.backend is Backend.ONNXRUNTIME else signature
    config = derive_config(target.name, served, axis, target.choice.backend, chosen)
    shapes = {name: array.shape for name, array in sample.items()}
    artifact = build_artifact(
        conversion.files,
        target.choice.backend,
        source=EngineSource(options.precision, axis.batched, config.max_batch_size, conversion.sparsity, shapes),
        options=options.engine,
    )
    golden, golden_facts = golden_sample(output, sample, options.precision)
    golden_path = target.work / GOLDEN_FILE_NAME
    write_golden(golden_path, golden)
    files: dict[str, Path] = {**artifact.files, GOLDEN_FILE_NAME: golden_path}
    if options.dry_run:
        version = plan_publish(target.repository, target.name, files, config).version
    else:
        report(f"Publishing {target.name}")
        details = _details(source, conversion, pruned, golden_facts, artifact.facts)
        version = publish(target.repository, target.name, files, config, details).version
    return Added(
        name=target.name,
        version=version,
        path=target.repository / target.name / str(version),
        published=not options.dry_run,
        backend=target.choice,
        batch_axis=axis,
        sparsity=conversion.sparsity,
        pruned=pruned,
        conversion=conversion,
        golden=golden_facts,
        config=format_config(config),
        engine=artifact.facts,
        files=tuple(files),
    )


def _config_options(
    options: ConfigOptions, target: _Target, sample: Mapping[str, NDArray[Any]], *, batched: bool
) -> ConfigOptions:
    """Fill in what was not asked for: the existing model's largest batch, and the sample's sizes for warm-up."""
    size = options.max_batch_size
    existing = read_config_bytes(target.repository, target.name) if size is None and batched else None
    if existing is not None:
        where = str(target.repository / target.name / CONFIG_FILENAME)
        size = parse_config(existing.decode(errors="replace"), where=where).max_batch_size
    skip = 1 if batched and size != 0 else 0
    shapes = {name: tuple(array.shape[skip:]) for name, array in sample.items()}
    return dataclasses.replace(options, max_batch_size=size, warmup_shapes={**shapes, **options.warmup_shapes})


def _two_rows(calibration: CalibrationData | None) -> dict[str, NDArray[Any]] | None:
    """Return two real samples stacked, to try a batch on; `None` where there are none of one shape."""
    rows = [] if calibration is None else list(itertools.islice(calibration.batches(), 2))
    shapes = {tuple((name, array.shape) for name, array in row.items()) for row in rows}
    if len(rows) < 2 or len(shapes) > 1 or any(array.ndim == 0 for array in rows[0].values()):
        return None
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _sample(model: Model, signature: Signature, calibration: CalibrationData | None) -> Mapping[str, NDArray[Any]]:
    """Return one input of each kind: real data where there is some."""
    if calibration is not None:
        return next(calibration.batches())
    sizes = find_sizes(Session(model), signature) if _has_free_sizes(signature) else {}
    return natural_inputs(signature, batch=1, sizes=sizes, limits=index_limits(model))


def _has_free_sizes(signature: Signature) -> bool:
    """Say whether any axis behind the first one is dynamic, so that its size has to be found."""
    return any(not isinstance(dim, int) for spec in signature.inputs for dim in (spec.shape or ())[1:])


def _details(
    source: Model, conversion: Conversion, pruned: PruneReport | None, golden: GoldenFacts, engine: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect what the manifest records beyond the files."""
    converted = as_json(conversion)
    sparsity = converted.pop("sparsity")
    converted["files"] = [path.name for path in conversion.files]  # where they lay meanwhile is nobody's business
    return {
        "source": {"path": source.path.name, "digest": source.digest, "size_bytes": source.size_bytes},
        "precision": conversion.precision,
        "pruned": pruned,
        "sparsity": sparsity,
        "conversion": converted,
        "engine": engine,
        "golden": golden,
        "tools": {
            "repo-manager": repo_manager.__version__,
            "python": platform.python_version(),
            "onnx": onnx.__version__,
            **conversion.tools,
        },
        "machine": {"system": f"{platform.system()} {platform.machine()}", "gpus": find_gpus()},
    }
