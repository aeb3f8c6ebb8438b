"""From an ONNX file to an engine, for every TensorRT: one builder, whose differences are looked-up capabilities."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from repo_manager.engine.build_errors import build_error
from repo_manager.engine.build_log import BuildLog, logger_for
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.configure import add_profile, create_config, hold_wide_layers
from repo_manager.engine.evidence import BuilderEvidence, read_evidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.layer_precision import LayerPrecision, compare_precision
from repo_manager.engine.layers import EngineLayer, layers_from_inspector, layers_from_log
from repo_manager.engine.network import create_builder, parse_network
from repo_manager.engine.options import EngineOptions, check_options
from repo_manager.engine.prepare import named_graph
from repo_manager.engine.profiles import ShapeRange
from repo_manager.engine.progress import BuildProgress, monitor_for
from repo_manager.engine.timing_cache import default_cache_path, load_timing_cache, merge_timing_cache
from repo_manager.errors import EngineError, ModelError
from repo_manager.files import fsync_directory
from repo_manager.onnx_model.model import Model
from repo_manager.types import Backend, Precision

__all__ = ["EngineBuild", "build_engine"]


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """A built engine and what its builder told.

    Attributes:
        path: the engine's file.
        size_bytes: of that file.
        backend: which Triton backend loads it.
        version: of the library that built it, and that has to load it.
        gpu: the GPU it was built on; `None` without one (TensorRT-RTX).
        profile: input -> range of shapes.
        options: what was asked.
        seconds: how long parsing and building took.
        layers: what the engine executes; empty when the builder did not list it.
        precision: asked against found, for every weighted node.
        evidence: what the builder said about sparse kernels.
        warnings: the builder's.
        log: everything it said.
    """

    path: Path = dataclasses.field(metadata={"json": False})
    size_bytes: int
    backend: Backend
    version: str
    gpu: str | None
    profile: Mapping[str, ShapeRange]
    options: EngineOptions
    seconds: float
    layers: tuple[EngineLayer, ...] = dataclasses.field(repr=False, metadata={"json": False})
    precision: tuple[LayerPrecision, ...] = dataclasses.field(repr=False)
    evidence: BuilderEvidence
    warnings: tuple[str, ...] = dataclasses.field(repr=False)
    log: str = dataclasses.field(repr=False, metadata={"json": False})


def build_engine(
    model: Model,
    library: ModuleType,
    output: Path,
    profile: Mapping[str, ShapeRange],
    *,
    precision: Precision = Precision.FP32,
    options: EngineOptions | None = None,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> EngineBuild:
    """Build an engine; on any error, and on cancellation, `output` is not there.

    Args:
        model: precision is in its graph: float16 tensors, Quantize/DequantizeLinear.
        library: the module `tensorrt` or `tensorrt_rtx`.
        output: the file to write; its folder exists.
        profile: input -> range of shapes, see `derive_profile`.
        precision: what the graph was converted to; only TensorRT 8 has to be told.
        options: `None` takes the defaults.
        progress: told about every step of every phase, in the building thread.
        cancelled: set it from another thread to stop the build. Ctrl-C does.

    Raises:
        UsageError: the options contradict each other or this library.
        EngineError: the model cannot be parsed or built, with the node or the reason; or it was cancelled.
        OSError: the file cannot be written.
    """
    options = options or EngineOptions()
    able = capabilities_of(library)
    check_options(options, able)
    started = time.monotonic()
    renamed = named_graph(model)
    work = _Work(model, renamed, library, options, precision, BuildLog(), cancelled or threading.Event())
    try:
        _in_thread(lambda: _build(work, output, profile, progress or _quiet), work.cancelled)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            output.unlink()
        raise
    seconds = time.monotonic() - started
    messages = work.log.messages
    layers = layers_from_log(messages) or _inspected(library, able, output)
    gpus = find_gpus()
    return EngineBuild(
        path=output,
        size_bytes=output.stat().st_size,
        backend=able.backend,
        version=able.version,
        gpu=_gpu_kind(able) if gpus else None,
        profile=dict(profile),
        options=options,
        seconds=seconds,
        layers=layers,
        precision=compare_precision(renamed or model.graph_only, layers),
        evidence=read_evidence(messages),
        warnings=work.log.warnings,
        log=work.log.text(),
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    model: Model
    renamed: onnx.ModelProto | None
    library: ModuleType
    options: EngineOptions
    precision: Precision
    log: BuildLog
    cancelled: threading.Event


def _quiet(_: str, __: int, ___: int) -> None:
    """Progress that nobody watches."""


def _in_thread(build: Callable[[], None], cancelled: threading.Event) -> None:
    """Run the build in a thread of its own, so that Ctrl-C arrives here and is turned into a cancellation."""
    with ThreadPoolExecutor(1, thread_name_prefix="engine-build") as executor:
        try:
            executor.submit(build).result()
        except KeyboardInterrupt:
            cancelled.set()  # leaving the block waits for the build's next step
            raise


def _build(work: _Work, output: Path, profile: Mapping[str, ShapeRange], progress: BuildProgress) -> None:
    library, options = work.library, work.options
    able = capabilities_of(library)
    logger = logger_for(library, work.log)
    builder = create_builder(library, logger, work.log, able)
    network, parser = parse_network(library, builder, work.model, work.renamed, logger)
    config = create_config(library, builder, options, able, work.precision)
    add_profile(builder, config, network, profile)
    if able.strong_typing is StrongTyping.ABSENT and work.precision in (Precision.FP16, Precision.INT8_FP16):
        hold_wide_layers(library, network, config)
    if able.progress_monitor:
        config.progress_monitor = monitor_for(library, progress, work.cancelled)
    cache_path = options.timing_cache or default_cache_path(able, _gpu_kind(able))
    if able.timing_cache:
        load_timing_cache(config, cache_path, required=options.deterministic)
    plan = builder.build_serialized_network(network, config)
    del parser  # it owned the weights until here
    if plan is None:
        if work.cancelled.is_set():
            raise EngineError(f"{work.model.path}: the build was cancelled; nothing was written")
        raise build_error(work.model.path, work.log, able)
    if able.timing_cache and not options.deterministic:
        merge_timing_cache(config, cache_path)
    _write(plan, output)


def _write(plan: Any, output: Path) -> None:
    """Write a plan of any size without a copy of it; the name appears when the content is whole."""
    temporary = output.with_name(f".{output.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(memoryview(plan))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(output.parent)


def _inspected(library: ModuleType, able: Capabilities, plan: Path) -> tuple[EngineLayer, ...]:
    """Ask the engine inspector where the log listed nothing; it loads the plan, so it needs the GPU."""
    if not able.needs_gpu:
        return ()
    log = BuildLog()
    logger = logger_for(library, log)
    runtime = library.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(
            f"{plan}: the plan that was just built does not load: {'; '.join(log.errors) or 'no reason given'}",
            hint="Check that the driver fits this TensorRT (nvidia-smi), and that the GPU has memory left.",
        )
    try:
        text = engine.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
        return layers_from_inspector(text)
    except ModelError:  # a plan of less detail than `detailed` has names only: nothing can be read back
        return ()


def _gpu_kind(able: Capabilities) -> str:
    """Name the GPU at hand; times and plans belong to one kind."""
    gpus = find_gpus()
    return f"{gpus[0].name} sm{gpus[0].compute_capability}" if gpus else f"no-gpu-{able.backend}"
