"""What TensorRT builds from: an ONNX model as its network, and our options as its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import onnx

from repo_manager.engine.build_log import BuildLog
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.profiles import ShapeRange
from repo_manager.errors import EngineError
from repo_manager.onnx_model.model import Model
from repo_manager.types import Precision

__all__ = ["add_profile", "create_builder", "create_config", "hold_wide_layers", "parse_network"]


_SHOWN_PROBLEMS = 8
_NO_PLUGIN = "Plugin not found"


def create_builder(library: ModuleType, logger: Any, log: BuildLog, able: Capabilities) -> Any:
    """Make an `IBuilder`.

    Raises:
        EngineError: the library finds no GPU that it can use.
    """
    try:
        return library.Builder(logger)
    except (TypeError, RuntimeError) as exc:  # pybind11: the factory returned nullptr
        said = "; ".join([*log.warnings, *log.errors]) or str(exc)
        raise EngineError(
            f"{able.backend} {able.version} cannot build on this machine: {said}",
            hint="TensorRT builds on the kind of GPU that will serve: run add there, or use --backend tensorrt_rtx "
            "(builds anywhere, for RTX GPUs) or --backend onnxruntime.",
        ) from exc


def parse_network(
    library: ModuleType, builder: Any, model: Model, renamed: onnx.ModelProto | None, logger: Any
) -> tuple[Any, Any]:
    """Parse a model into a network of the right kind.

    Models with external data are parsed from their file, so that weights above 2 GB work.

    Args:
        library: the module.
        builder: of that library.
        model: the model.
        renamed: see `named_graph`.
        logger: of that library.

    Returns:
        (network, parser); the parser holds the weights and has to outlive the build.

    Raises:
        EngineError: naming each node that the parser refuses, its operator and the reason.
    """
    able = capabilities_of(library)
    network = builder.create_network(_network_flags(library, able))
    parser = library.OnnxParser(network, logger)
    path = str(model.path.absolute())
    parsed = parser.parse_from_file(path) if renamed is None else parser.parse(renamed.SerializeToString(), path=path)
    if not parsed:
        raise _parse_error(parser, model, able)
    return network, parser


def _network_flags(library: ModuleType, able: Capabilities) -> int:
    flags = library.NetworkDefinitionCreationFlag
    value = 0
    if able.explicit_batch:
        value |= 1 << int(flags.EXPLICIT_BATCH)
    if able.strong_typing is not StrongTyping.ABSENT:
        value |= 1 << int(flags.STRONGLY_TYPED)
    return value


def _parse_error(parser: Any, model: Model, able: Capabilities) -> EngineError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    rows = [_problem(error, model, able) for error in errors]
    shown = "\n".join(f"  {row}" for row in rows[:_SHOWN_PROBLEMS])
    more = f"\n  and {len(rows) - _SHOWN_PROBLEMS} more" if len(rows) > _SHOWN_PROBLEMS else ""
    plugin = any(_NO_PLUGIN in error.desc() for error in errors)
    return EngineError(
        f"{model.path}: {able.backend} {able.version} cannot take {len(rows)} node(s):\n{shown}{more}",
        hint=(
            "An operator outside ONNX's own needs a TensorRT plugin; export the model without it, or "
            if plugin
            else "Export the model with other operators (a newer opset, constant shapes), or "
        )
        + "use --backend onnxruntime.",
    )


def _problem(error: Any, model: Model, able: Capabilities) -> str:
    """`node 'foo' (FooBar): reason`, from what this version's parser tells."""
    index = error.node()
    if able.parser_names_nodes and error.node_name():
        name, operator = error.node_name(), error.node_operator()
    elif 0 <= index < len(model.graph_only.graph.node):
        node = model.graph_only.graph.node[index]
        name, operator = node.name or f"number {index}", node.op_type
    else:
        name, operator = f"number {index}", "unknown operator"
    reason = error.desc().strip()
    if _NO_PLUGIN in reason:
        reason = "no such operator, and no plugin of that name"
    elif reason in ("", "false"):
        reason = f"not supported ({error.code().name.lower()})"
    return f"node '{name}' ({operator}): {reason}"


# Builder options as a TensorRT builder configuration.

_FLAGS_OF_LOW = {None: (), "float16": ("FP16",), "bfloat16": ("BF16",)}


def create_config(
    library: ModuleType, builder: Any, options: EngineOptions, able: Capabilities, precision: Precision
) -> Any:
    """Make an `IBuilderConfig`; `options` have passed `check_options`.

    Raises:
        EngineError: this version has no flag that the precision needs.
    """
    config = builder.create_builder_config()
    for name in _flag_names(options, able, precision):
        config.set_flag(getattr(library.BuilderFlag, name))
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility is not None:
        levels = library.HardwareCompatibilityLevel
        config.hardware_compatibility_level = getattr(levels, options.hardware_compatibility.upper())
    config.profiling_verbosity = getattr(library.ProfilingVerbosity, options.plan_detail.upper())
    if options.without_tactics:
        left_out = (int(getattr(library.TacticSource, name.upper())) for name in options.without_tactics)
        config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << bit for bit in set(left_out)))
    targets = tuple(dict.fromkeys(options.compute_capabilities))
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            member = getattr(library.ComputeCapability, "SM" + target.replace(".", ""))
            config.set_compute_capability(member, index)
    return config


def _flag_names(options: EngineOptions, able: Capabilities, precision: Precision) -> list[str]:
    """Builder flags by name: only what was asked for and what this version needs."""
    names = []
    if options.sparse:
        names.append("SPARSE_WEIGHTS")
    if able.strong_typing is StrongTyping.ABSENT:
        names.extend(("INT8",) if precision.facts.quantizes else ())
        names.extend(_FLAGS_OF_LOW[precision.facts.low])
    if options.version_compatible:
        names.append("VERSION_COMPATIBLE")
        if not able.lean_runtime:
            names.append("EXCLUDE_LEAN_RUNTIME")
    if options.refit:
        names.append("REFIT")
    if options.strip:
        names.append(able.strip_flag or "STRIP_PLAN")
        if options.sparse:
            names.append("REFIT_IDENTICAL")
    if options.deterministic:
        names.append("ERROR_ON_TIMING_CACHE_MISS")
    missing = [name for name in names if name not in able.builder_flags]
    if missing:
        raise EngineError(
            f"{able.backend} {able.version} has no {', '.join(missing)}",
            hint="Use a newer TensorRT, or leave the option out.",
        )
    return names


def hold_wide_layers(library: ModuleType, network: Any, config: Any) -> int:
    """Keep the layers that the graph keeps in float32 out of FP16, where types are only a wish (TensorRT 8).

    With the FP16 flag, TensorRT 8 may run any float32 layer in half precision. Layers that the conversion kept
    (they overflow, or cost accuracy) are pinned, and the builder is told to obey.

    Returns:
        How many layers were pinned.
    """
    pinned = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # Shape arithmetic and quantisation have types of their own; a pin there is an error.
        plain = layer.type not in (library.LayerType.SHAPE, library.LayerType.QUANTIZE, library.LayerType.DEQUANTIZE)
        if plain and layer.num_outputs and layer.get_output(0).dtype == library.float32:
            layer.precision = library.float32
            pinned += 1
    if pinned:
        config.set_flag(library.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return pinned


def add_profile(builder: Any, config: Any, network: Any, profile: Mapping[str, ShapeRange]) -> None:
    """Add one optimization profile when an input is dynamic.

    Raises:
        EngineError: an input's values are a shape, or the builder refuses the ranges.
    """
    built = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise EngineError(
                f"the values of input '{tensor.name}' are a shape or a size, which an engine has to know ranges for",
                hint="Export the model with that value as a constant, or use --backend onnxruntime.",
            )
        if -1 not in tuple(tensor.shape):
            continue
        dynamic = True
        given = profile[tensor.name]
        built.set_shape(tensor.name, given.min, given.opt, given.max)
    if dynamic and config.add_optimization_profile(built) < 0:
        ranges = ", ".join(f"{name}: {r.min} to {r.max}, tuned for {r.opt}" for name, r in profile.items())
        raise EngineError(f"the builder refuses the ranges of shapes {ranges}", hint="Give others with --shape-range.")
