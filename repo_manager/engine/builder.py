"""From an ONNX file to an engine, for every TensorRT: one builder, whose differences are looked-up capabilities."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from repo_manager.engine.build_log import BuildLog, BuildProgress, build_error, logger_for, monitor_for
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.evidence import BuilderEvidence, read_evidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.layers import (
    EngineLayer,
    LayerPrecision,
    compare_precision,
    layers_from_inspector,
    layers_from_log,
)
from repo_manager.engine.network import (
    add_profile,
    create_builder,
    create_config,
    hold_wide_layers,
    parse_network,
    wide_nodes,
)
from repo_manager.engine.options import EngineOptions, check_options
from repo_manager.engine.profiles import ShapeRange
from repo_manager.errors import EngineError, InputError, ModelError
from repo_manager.files import file_lock, fsync_directory, write_atomic
from repo_manager.onnx_model.model import Model, graph_as_stored
from repo_manager.onnx_model.walk import nodes_of
from repo_manager.types import Backend, Precision

__all__ = [
    "EngineBuild",
    "build_engine",
    "default_cache_path",
    "load_timing_cache",
    "merge_timing_cache",
    "named_graph",
]


# Give every node and tensor a name, so that parser results can be told apart.


def named_graph(model: Model) -> onnx.ModelProto | None:
    """Give every node a name of its own and every unnamed dynamic input dimension another symbol. Sort the nodes.

    The builder's log and its errors speak of nodes by name, and TensorRT takes two unnamed
    dimensions for the same one. A node without a name gets its first output's, as in the sparsity report.

    Returns:
        A changed copy. It still refers to external files by name. `None` when nothing must change, so the file itself
        can be parsed.
    """
    if not model.reordered and not _unnamed_dims(model.graph_only) and not _needs_names(model.graph_only):
        return None
    proto = graph_as_stored(model)
    for name, axis, dim in _unnamed_dims(proto):
        dim.Clear()
        dim.dim_param = f"{name}_axis_{axis}"
    taken = {node.name for node in nodes_of(proto) if node.name}
    seen: set[str] = set()
    for index, node in enumerate(nodes_of(proto)):
        if not node.name or node.name in seen:
            base = node.name or next((name for name in node.output if name), node.op_type)
            node.name = base if base not in taken else f"{base}_{index}"
        taken.add(node.name)
        seen.add(node.name)
    return proto


def _unnamed_dims(proto: onnx.ModelProto) -> list[tuple[str, int, onnx.TensorShapeProto.Dimension]]:
    initialised = {tensor.name for tensor in proto.graph.initializer}
    return [
        (value.name, axis, dim)
        for value in proto.graph.input
        if value.name not in initialised
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_param in ("", "?", "-1", "None") and dim.dim_value <= 0
    ]


def _needs_names(proto: onnx.ModelProto) -> bool:
    names = [node.name for node in nodes_of(proto)]
    return "" in names or len(set(names)) != len(names)


# Timing cache: measured kernel times, kept between builds. One file per library version and GPU. Parallel builds merge
# their results.


def default_cache_path(able: Capabilities, gpu: str) -> Path:
    """Return the timing cache's place in the user's cache folder.

    TensorRT combines caches of one version only, and times belong to one kind of GPU.

    Args:
        able: capabilities of the TensorRT library.
        gpu: the GPU's name and compute capability.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") or "unknown-gpu"
    return root / "repo-manager" / "timing" / f"{able.backend}-{able.version}" / f"{kind}.cache"


def load_timing_cache(config: Any, path: Path, *, required: bool = False) -> Any:
    """Make the configuration use the times in a file. An empty cache when there is none.

    Args:
        config: an `IBuilderConfig` of the library.
        path: file with the timing cache. It may not exist yet.
        required: fail when the file is missing or empty (`--deterministic`).

    Returns:
        The library's cache object, filled by the build.

    Raises:
        InputError: the file is not a timing cache of this TensorRT version and GPU, or is missing though
            required.
    """
    data = path.read_bytes() if path.is_file() else b""
    if required and not data:
        raise InputError(
            f"--deterministic: there is no timing cache at {path}",
            hint="Build once without --deterministic on this GPU; its times are then kept there.",
        )
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(
            f"{path}: not a timing cache of this TensorRT version and GPU",
            hint="Delete the file, or give another one by --timing-cache.",
        )
    return cache


def merge_timing_cache(config: Any, path: Path) -> int:
    """Add a build's times to the file, so of two builds at once both leave theirs.

    Under a lock: the file's present content is read again, combined with ours, and replaces the file in one step.

    Args:
        config: the configuration of a finished build.
        path: the file. Its folder is created.

    Returns:
        The file's new size in bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = config.get_timing_cache()
    with file_lock(path.with_name(path.name + ".lock")):
        if path.is_file():
            theirs = config.create_timing_cache(path.read_bytes())
            if theirs is not None:
                ours.combine(theirs, ignore_mismatch=False)
        data = bytes(ours.serialize())
        write_atomic(path, data)
    return len(data)


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """A built engine and its builder's report.

    Attributes:
        path: the engine's file: the `output` of `build_engine`.
        size_bytes: size of the engine's file in bytes.
        backend: which Triton backend loads it.
        version: of the library behind it, the only one to load it.
        gpu: the GPU it was built on. `None` without one (TensorRT-RTX).
        profile: input -> range of shapes.
        options: the options of the build, or the defaults where none were given.
        seconds: how long parsing and building took.
        layers: the layers the engine executes. Empty when the builder did not list it.
        precision: asked against found, for every weighted node.
        evidence: the builder's word on sparse kernels.
        warnings: the library's messages of severity `WARNING`, each once, in order.
        log: all messages of the library, of every severity, each as `[SEVERITY] message`.
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
    """Build an engine. On any error, and on cancellation, `output` is not there.

    Args:
        model: precision is in its graph: float16 tensors, Quantize/DequantizeLinear.
        library: the module `tensorrt` or `tensorrt_rtx`.
        output: the file to write. Its folder exists.
        profile: input -> range of shapes, see `derive_profile`.
        precision: precision of the converted graph. Only TensorRT 8 must be told.
        options: settings of the build, first checked against the library. `None` takes the defaults.
        progress: called with each step of an engine build, in the building thread. `None`: nothing is reported.
        cancelled: set it from another thread to stop the build. `None`: the build cannot be stopped.

    Raises:
        UsageError: the options contradict each other or this library.
        EngineError: the model cannot be parsed or built, with the node or the reason, or it was cancelled.
        OSError: the file cannot be written.
    """
    options = options or EngineOptions()
    able = capabilities_of(library)
    check_options(options, able)
    started = time.monotonic()
    renamed = named_graph(model)
    work = _Work(model, renamed, library, options, precision, BuildLog(), cancelled or threading.Event())
    try:
        with _without_collection():
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
    """Progress nobody watches."""


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collector while TensorRT makes a builder or a runtime, or builds.

    TensorRT logs while it holds a lock, and the end of a builder takes the same lock. If the logger's callback starts
    a collection with an old builder in a cycle, the thread waits for itself and keeps the GIL for ever (seen with
    TensorRT-RTX 1.7, createInferBuilder).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _in_thread(build: Callable[[], None], cancelled: threading.Event) -> None:
    """Run the build in a thread of its own, so Ctrl-C arrives here and is turned into a cancellation."""
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
    if able.strong_typing is StrongTyping.ABSENT and work.precision.facts.low == "float16":
        hold_wide_layers(library, network, config, wide_nodes(work.renamed or work.model.graph_only))
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
    """Write a plan of any size without a copy of it. The name appears when the content is whole."""
    temporary = output.with_name(f".{output.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(memoryview(plan))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(output.parent)


def _inspected(library: ModuleType, able: Capabilities, plan: Path) -> tuple[EngineLayer, ...]:
    """Ask the engine inspector where the log listed nothing. It loads the plan, so it needs the GPU."""
    if not able.needs_gpu:
        return ()
    log = BuildLog()
    logger = logger_for(library, log)
    with _without_collection():
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
    except ModelError:  # without `detailed` detail a plan has only names: there is nothing to parse
        return ()


def _gpu_kind(able: Capabilities) -> str:
    """Name the GPU at hand. Times and plans belong to one kind."""
    gpus = find_gpus()
    return f"{gpus[0].name} sm{gpus[0].compute_capability}" if gpus else f"no-gpu-{able.backend}"
