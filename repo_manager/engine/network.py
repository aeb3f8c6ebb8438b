"""The input of a TensorRT build: an ONNX model as its network, and our options as its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.engine.build_log import BuildLog
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.profiles import ShapeRange
from repo_manager.errors import EngineError
from repo_manager.onnx_model.model import Model, graph_as_stored
from repo_manager.onnx_model.shape_inference import infer_shapes
from repo_manager.types import Precision

__all__ = [
    "add_profile",
    "create_builder",
    "create_config",
    "hold_wide_layers",
    "parse_network",
    "quantised_in_the_graph",
    "wide_nodes",
]


_SHOWN_PROBLEMS = 8
_NO_PLUGIN = "Plugin not found"


def create_builder(library: ModuleType, logger: Any, log: BuildLog, able: Capabilities) -> Any:
    """Make an `IBuilder`.

    Args:
        library: module `tensorrt` or `tensorrt_rtx`. Its `Builder` is made.
        logger: an `ILogger` of the library.
        log: messages of the build so far.
        able: capabilities of the TensorRT library.

    Raises:
        EngineError: the library finds no GPU it can use.
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

    Models with external data are parsed from their file, so weights above 2 GB work.

    Args:
        library: module `tensorrt` or `tensorrt_rtx`: the one of `builder` and `logger`.
        builder: an `IBuilder` of the library.
        model: the ONNX model. It is not changed.
        renamed: the model with named nodes, from `named_graph`. `None`: all its nodes have names.
        logger: an `ILogger` of the library.

    Returns:
        (network, parser). The parser holds the weights and must outlive the build.

    Raises:
        EngineError: naming each node the parser refuses, its operator and the reason.
    """
    able = capabilities_of(library)
    network = builder.create_network(_network_flags(library, able))
    parser = library.OnnxParser(network, logger)
    path = str(model.path.absolute())
    if able.strong_typing is StrongTyping.ABSENT:
        renamed = quantised_in_the_graph(model, renamed)
    parsed = parser.parse_from_file(path) if renamed is None else parser.parse(renamed.SerializeToString(), path=path)
    if not parsed:
        raise _parse_error(parser, model, able)
    return network, parser


def quantised_in_the_graph(model: Model, renamed: onnx.ModelProto | None) -> onnx.ModelProto | None:
    """Store INT8 weights as float32 with a QuantizeLinear behind them: TensorRT 8 takes no INT8 constants.

    A DequantizeLinear over a stored INT8 weight makes its parser refuse the convolution ("The input tensor shape
    misaligns with the input kernel shape"). The values stay: each float is a multiple of its scale.

    Args:
        model: the ONNX model. It is not changed.
        renamed: the graph to be parsed. `None`: the file itself.

    Returns:
        A changed graph (`renamed` itself, or a copy of the file), or `renamed` where no weight is stored in INT8.
    """
    stored = {t.name: t for t in model.graph_only.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    if not any(n.op_type == "DequantizeLinear" and n.input[0] in stored for n in model.graph_only.graph.node):
        return renamed
    proto = graph_as_stored(model) if renamed is None else renamed
    arrays = {t.name: t for t in model.graph_only.graph.initializer}
    added, floats = [], {}
    for node in proto.graph.node:
        name = node.input[0] if node.op_type == "DequantizeLinear" else ""
        if name not in stored or name in floats:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        operands = [model.array(arrays[key]) for key in node.input[1:] if key in arrays]
        if len(operands) != len(node.input) - 1:
            continue  # a computed scale: the parser judges it
        floats[name] = f"{name}_as_float"
        values = _dequantised(model.array(stored[name]), axis, *operands)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, floats[name]))
        quantise = onnx.helper.make_node(
            "QuantizeLinear", [floats[name], *node.input[1:]], [name], name=f"{name}_quantised", axis=axis
        )
        added.append(quantise)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in floats]
    nodes = [*added, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes)
    return proto


def _dequantised(
    values: NDArray[Any], axis: int, scale: NDArray[Any], zero: NDArray[Any] | None = None
) -> NDArray[Any]:
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    shift = 0 if zero is None else zero.reshape(shape if zero.size > 1 else [1] * values.ndim).astype(np.int32)
    return np.asarray((values.astype(np.int32) - shift) * scale.reshape(shape), dtype=np.float32)


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
    """`node 'foo' (FooBar): reason`, from the report of this version's parser."""
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
        reason = "no such operator, and no plugin of the name"
    elif reason in ("", "false"):
        reason = f"not supported ({error.code().name.lower()})"
    return f"node '{name}' ({operator}): {reason}"


# Translate builder options into a TensorRT builder configuration.

_FLAGS_OF_LOW = {None: (), "float16": ("FP16",), "bfloat16": ("BF16",)}


def create_config(
    library: ModuleType, builder: Any, options: EngineOptions, able: Capabilities, precision: Precision
) -> Any:
    """Make an `IBuilderConfig`. `options` have passed `check_options`.

    Args:
        library: module `tensorrt` or `tensorrt_rtx`: the one of `builder`.
        builder: an `IBuilder` of the library.
        options: become flags, the workspace limit and the targets. Shapes follow by `add_profile`.
        able: capabilities of the TensorRT library.
        precision: precision the graph was converted to.

    Raises:
        EngineError: this version has no flag the precision needs.
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
    """Builder flags by name: only those asked for and those this version needs."""
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


_OWN_TYPE = ("Cast", "Constant", "QuantizeLinear", "DequantizeLinear")


def wide_nodes(proto: onnx.ModelProto) -> dict[str, bool]:
    """Say for every node whether the graph computes it in float32.

    Args:
        proto: the graph parsed. Weights are not read.

    Returns:
        Node -> whether its first output is float32. A cast and a (de)quantisation never count. Where the types cannot
        be inferred, no node counts.
    """
    inferred = infer_shapes(proto)
    if inferred is None:
        return {node.name: False for node in proto.graph.node}
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return {
        node.name: node.op_type not in _OWN_TYPE and types.get(node.output[0]) == onnx.TensorProto.FLOAT
        for node in graph.node
        if node.output
    }


def hold_wide_layers(library: ModuleType, network: Any, config: Any, wide: Mapping[str, bool]) -> int:
    """Keep the layers the graph keeps in float32 out of FP16, where types are only a wish (TensorRT 8).

    With the FP16 flag, TensorRT 8 may run any float32 layer in half precision. Layers the conversion kept (they
    overflow, or cost accuracy) are pinned, and the builder must obey. These nodes are read from the ONNX graph:
    TensorRT 8's parser calls the output of a convolution with half weights FLOAT as well.

    Args:
        library: module `tensorrt` of version 8. Later versions take all types from the graph.
        network: parsed network, an `INetworkDefinition`. The precision of its layers is changed.
        config: an `IBuilderConfig` of the library.
        wide: node -> whether it is computed in float32, see `wide_nodes`. The parser names a node's layers after it,
            the second and later ones with a number behind the name.

    Returns:
        How many layers were pinned.
    """
    pinned = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name = layer.name if layer.name in wide else layer.name.rpartition("_")[0]
        # Shape arithmetic and quantisation have fixed types. Pinning them is an error.
        plain = layer.type not in (library.LayerType.SHAPE, library.LayerType.QUANTIZE, library.LayerType.DEQUANTIZE)
        if wide.get(name) and plain and layer.num_outputs and layer.get_output(0).dtype == library.float32:
            layer.precision = library.float32
            pinned += 1
    if pinned:
        config.set_flag(library.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return pinned


def add_profile(builder: Any, config: Any, network: Any, profile: Mapping[str, ShapeRange]) -> None:
    """Add one optimization profile when an input is dynamic.

    Args:
        builder: an `IBuilder` of the library.
        config: an `IBuilderConfig` of the library.
        network: parsed network, an `INetworkDefinition`. Each input with -1 in its shape needs a range.
        profile: input name -> smallest, usual and largest shape.

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
