"""From a loaded model to everything a version holds, ready to be published."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.engine.artifact import Artifact, EngineSource, build_artifact
from repo_manager.engine.build_log import BuildProgress
from repo_manager.engine.capabilities import FLOAT_OPERATORS
from repo_manager.errors import WiderPrecisionError
from repo_manager.onnx_model.batch_axis import BatchAxis, find_batch_axis
from repo_manager.onnx_model.inputs import find_sizes, given_sizes, index_limits, natural_inputs
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.runtime import end_runtime
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.onnx_model.walk import nodes_of
from repo_manager.pipeline.add_types import AddOptions, AddTask
from repo_manager.pipeline.golden import GoldenFacts, golden_sample
from repo_manager.pipeline.serving_config import config_options, existing_config, fields_kept, serving_config
from repo_manager.precision import CalibrationData, Conversion, convert, load_calibration
from repo_manager.repository.golden import GOLDEN_FILE_NAME, Golden, write_golden
from repo_manager.triton_config.config import DEFAULT_FILENAMES, ModelConfig
from repo_manager.triton_config.served_signature import served_signature
from repo_manager.types import Backend

__all__ = ["BuildWatch", "Converted", "PreparedVersion", "build_version", "convert_and_build", "convert_model"]

Report = Callable[[str], None]
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


@dataclasses.dataclass(frozen=True)
class BuildWatch:
    """Receives reports of the work: a line per stage, the builder's steps, and the way to stop a build."""

    report: Report = lambda _: None
    progress: BuildProgress | None = None
    cancelled: threading.Event | None = None


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model in the wanted precision, and the findings on the way.

    Attributes:
        model: the ONNX model given to the conversion, already pruned if `AddOptions.sparsity` asks for it.
        signature: inputs and outputs of `model`, with the batch axis found.
        axis: whether the first axis is a batch axis.
        sample: one value of each input, for the golden sample.
        conversion: the conversion's checks, drift and kept layers.
        output: the converted ONNX file, in the task's scratch folder.
    """

    model: Model
    signature: Signature
    axis: BatchAxis
    sample: Mapping[str, NDArray[Any]]
    conversion: Conversion
    output: Path


@dataclasses.dataclass(frozen=True)
class PreparedVersion:
    """A version, except for its number.

    Attributes:
        task: name, repository and backend it is made for, and a scratch folder.
        converted: the model in the wanted precision.
        config: the derived configuration. An existing config.pbtxt of the model stays in its place.
        config_kept: fields with other values in the model's existing config.pbtxt. They stay as they are there.
        artifact: the file for its backend.
        files: name in its folder -> file now.
        golden: the golden sample's entry for the manifest.
    """

    task: AddTask
    converted: Converted
    config: ModelConfig
    config_kept: tuple[str, ...]
    artifact: Artifact
    files: Mapping[str, Path]
    golden: GoldenFacts


def convert_and_build(
    model: Model, task: AddTask, options: AddOptions, watch: BuildWatch
) -> tuple[PreparedVersion, AddOptions]:
    """Convert the model and build its backend's file.

    Layers made INT8 by the conversion, but computed in floating point by the builder, are left out of a second
    conversion: the first engine would be slower than an honest one.

    Args:
        model: the ONNX model. It is not changed.
        task: name, repository and backend of the version.
        options: settings of the conversion and of the version.
        watch: receives progress, and can stop the build.

    Returns:
        The version, and the options with the findings, for its controls.

    Raises:
        InputError, GateError: as `convert_model` and `build_version`.
    """
    converted = convert_model(model, task, options, watch)
    watch.report(f"Building for the {task.choice.backend} backend ({task.choice.reason})")
    try:
        return build_version(converted, task, options, watch), options
    except WiderPrecisionError as exc:
        if not exc.not_in_int8:
            raise
        left_out = exc.not_in_int8
    watch.report(f"The builder computes {len(left_out)} INT8 layer(s) in floating point: leaving them out")
    convert_options = dataclasses.replace(options.convert, not_in_int8=left_out)
    options = dataclasses.replace(options, convert=convert_options)
    shutil.rmtree(converted.output.parent)
    return build_version(convert_model(model, task, options, watch), task, options, watch), options


def convert_model(model: Model, task: AddTask, options: AddOptions, watch: BuildWatch) -> Converted:
    """Find out how the model is fed, check the options against it, and convert it.

    Args:
        model: the ONNX model. It is not changed.
        task: name, repository and backend of the version.
        options: settings of the conversion and of the version.
        watch: receives progress, and can stop the build.

    Raises:
        InputError: the model, the calibration data or the options are bad.
        GateError: the conversion failed a check.
    """
    signature = signature_of(model)
    calibration = None if options.calibration is None else load_calibration(options.calibration, signature)
    given = given_sizes(signature, options.convert.shapes)
    rows = _made_rows(signature, given) if calibration is None and given else _two_rows(calibration)
    signature, axis = _batch_axis(model, signature, options, task, rows)
    sample = _sample(model, signature, calibration, given)
    # Derived before the long work to find errors early. It is derived again for the served shapes.
    early = _with_config(options, task, sample, axis)
    fields_kept(task, serving_config(task, signature, axis, early, model=model, sample=sample), options)
    watch.report(f"Converting to {options.precision}")
    output = task.work / "converted" / "model.onnx"
    output.parent.mkdir(parents=True)
    # Only the onnxruntime backend serves with this machine's CPU kernels.
    judged = dataclasses.replace(
        options.convert,
        judge_served=task.choice.backend is Backend.ONNXRUNTIME,
        not_in_int8=(*options.convert.not_in_int8, *FLOAT_OPERATORS.get(task.choice.backend, ())),
    )
    judge = None if task.gate is None else task.gate.judge
    conversion = convert(model, options.precision, output, calibration=calibration, options=judged, judge=judge)
    return Converted(model, signature, axis, sample, conversion, output)


def build_version(converted: Converted, task: AddTask, options: AddOptions, watch: BuildWatch) -> PreparedVersion:
    """Make the backend's file, and the golden sample. The sample runs on the processor while an engine is built.

    Args:
        converted: the converted model and its checks.
        task: name, repository and backend of the version.
        options: settings of the conversion and of the version.
        watch: receives progress, and can stop the build.

    Raises:
        InputError: the engine cannot be built, or the options do not fit.
        WiderPrecisionError: a layer of the engine runs in a wider type than was asked.
    """
    backend, axis = task.choice.backend, converted.axis
    options = _with_config(options, task, converted.sample, axis)
    config = serving_config(task, converted.signature, axis, options, model=converted.model, sample=converted.sample)
    if backend is Backend.ONNXRUNTIME:
        with_settings = existing_config(task) or config  # all versions share an existing configuration
        served = served_signature(converted.signature, converted.output, with_settings)
        config = serving_config(task, served, axis, options, model=converted.model, sample=converted.sample)
    kept = fields_kept(task, config, options)
    shapes = {name: array.shape for name, array in converted.sample.items()}
    folder = task.work / "engine"
    report = converted.conversion.sparsity
    left_out = frozenset(node.node for node in converted.conversion.kept)
    source = EngineSource(options.precision, axis.batched, config.max_batch_size, report, shapes, folder, left_out)
    with ThreadPoolExecutor(1, thread_name_prefix="golden") as beside:
        golden = beside.submit(
            _golden, converted, options, task.work / GOLDEN_FILE_NAME, is_only=backend is Backend.ONNXRUNTIME
        )
        try:
            artifact = build_artifact(
                converted.conversion.files,
                backend,
                source=source,
                options=options.engine,
                progress=watch.progress,
                cancelled=watch.cancelled,
            )
            path, facts = golden.result()
        except BaseException:
            end_runtime()  # the pool would wait for the end of the run
            raise
    files = {_file_name(name, backend, config): file for name, file in artifact.files.items()}
    return PreparedVersion(task, converted, config, kept, artifact, {**files, GOLDEN_FILE_NAME: path}, facts)


def _file_name(name: str, backend: Backend, config: ModelConfig) -> str:
    """Return a file's name in the version's folder: the configuration may name the model's."""
    return config.model_filename if name == DEFAULT_FILENAMES[str(backend)] else name


def _golden(converted: Converted, options: AddOptions, path: Path, *, is_only: bool) -> tuple[Path, GoldenFacts]:
    golden: Golden
    golden, facts = golden_sample(
        converted.output,
        converted.sample,
        options.precision,
        repeatable=_repeats_itself(converted.model),
        # Building an engine keeps one processor busy at the same time.
        threads=None if is_only else max(1, len(os.sched_getaffinity(0)) - 1),
    )
    write_golden(path, golden)
    return path, dataclasses.replace(facts, index_limits=index_limits(converted.model))


def _repeats_itself(model: Model) -> bool:
    """Return whether the graph is of ONNX's own operators, without any for random numbers."""
    return all(
        node.domain in ("", "ai.onnx", "ai.onnx.ml") and not node.op_type.startswith(_RANDOM)
        for node in nodes_of(model.graph_only)
    )


def _with_config(options: AddOptions, task: AddTask, sample: Mapping[str, NDArray[Any]], axis: BatchAxis) -> AddOptions:
    config = config_options(options.config, task, sample, batched=axis.batched)
    return dataclasses.replace(options, config=config)


def _batch_axis(
    model: Model, signature: Signature, options: AddOptions, task: AddTask, samples: Mapping[str, NDArray[Any]] | None
) -> tuple[Signature, BatchAxis]:
    """Find out whether requests may be joined. Outputs without a shape get the one the server will see."""
    axis = find_batch_axis(model, signature, samples)
    if any(spec.shape is None for spec in signature.outputs) and task.choice.backend is Backend.ONNXRUNTIME:
        served = served_signature(signature, model.path, existing_config(task))
        signature = dataclasses.replace(signature, outputs=served.outputs)
    bare = next((spec.name for spec in signature.outputs if not spec.shape), None)
    if axis.batched and bare is not None:
        return signature, BatchAxis("unbatched", f"output '{bare}' has no shape in the file, and Triton needs its rank")
    return signature, axis.asked_for(options.config.max_batch_size)


def _two_rows(calibration: CalibrationData | None) -> dict[str, NDArray[Any]] | None:
    """Return two real samples stacked, to try a batch on, or `None` where there are none of one shape."""
    rows = [] if calibration is None else list(itertools.islice(calibration.batches(), 2))
    shapes = {tuple((name, array.shape) for name, array in row.items()) for row in rows}
    if len(rows) < 2 or len(shapes) > 1 or any(array.ndim == 0 for array in rows[0].values()):
        return None
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _made_rows(signature: Signature, given: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Return two made-up samples of the sizes given, to try a batch on."""
    firsts = {
        spec.shape[0] if spec.shape[0] is not None else f"{spec.name}:0" for spec in signature.inputs if spec.shape
    }
    return natural_inputs(signature, batch=2, sizes={key: size for key, size in given.items() if key not in firsts})


def _sample(
    model: Model, signature: Signature, calibration: CalibrationData | None, given: Mapping[str, int]
) -> Mapping[str, NDArray[Any]]:
    """Return one input of each kind: real data where there is some."""
    if calibration is not None:
        return next(calibration.batches())
    free = _has_free_sizes(signature)
    sizes = find_sizes(Session(model), signature, given=given) if free else dict(given)
    return natural_inputs(signature, batch=1, sizes=sizes, limits=index_limits(model))


def _has_free_sizes(signature: Signature) -> bool:
    """Return whether any axis behind the first one is dynamic, so its size must be found."""
    return any(not isinstance(dim, int) for spec in signature.inputs for dim in (spec.shape or ())[1:])
