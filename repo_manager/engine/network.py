"""An ONNX model as a TensorRT network, with errors that name the node."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import onnx

from repo_manager.engine.build_log import BuildLog
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.errors import EngineError
from repo_manager.onnx_model.model import Model

__all__ = ["create_builder", "parse_network"]

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
