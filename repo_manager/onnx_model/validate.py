"""Reject a broken model with one clear message, before native code meets it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.errors import ModelError
from repo_manager.onnx_model.walk import graphs_of, node_graphs, nodes_of, tensors_of
from repo_manager.onnx_model.weights import WeightStore, element_count, external_data, is_external, payload_bytes
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["check_external_files", "check_functions", "check_names", "check_opsets", "check_spec", "check_tensors"]

_STANDARD_DOMAINS = ("", "ai.onnx")
_CHECKER_ERRORS = (RuntimeError, ValueError, TypeError, MemoryError)
_MESSAGE_CHARACTERS = 300
MAX_NODES = 200_000
"""After expanding local functions. Far above any real model, far below a machine's memory."""


def check_opsets(proto: onnx.ModelProto) -> None:
    """Check whether the installed onnx knows the model's version of the standard operators.

    Raises:
        ModelError: none imported though standard operators are used, below 1, or newer than known.
    """
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in _STANDARD_DOMAINS and not 1 <= entry.version <= newest:
            raise ModelError(
                f"opset {entry.version} is not known; onnx {onnx.__version__} knows 1 to {newest}",
                hint="Upgrade onnx and onnxruntime, or export the model for an older opset.",
            )


def check_names(proto: onnx.ModelProto) -> None:
    """Check whether names are UTF-8: protobuf hands others out as bytes, and no runtime finds them.

    Raises:
        ModelError: with the bytes found.
    """
    for name in _names(proto):
        if isinstance(name, bytes):
            raise ModelError(f"a name in the graph is not UTF-8 text: {name[:40]!r}")


def _names(proto: onnx.ModelProto) -> Iterator[object]:
    for opset in proto.opset_import:
        yield opset.domain
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from (entry.domain for entry in function.opset_import)
        yield from (attribute.name for attribute in function.attribute_proto)
    for node in nodes_of(proto):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield attribute.ref_attr_name
    for tensor in tensors_of(proto):
        yield tensor.name
        for entry in tensor.external_data:
            yield entry.key
            yield entry.value
    roots = [proto.graph, *(g for t in proto.training_info for g in (t.initialization, t.algorithm))]
    for root in roots:
        for graph in graphs_of(root):
            yield graph.name
            yield from _value_names(graph.input)
            yield from _value_names(graph.output)
            yield from _value_names(graph.value_info)


def _value_names(values: Iterable[onnx.ValueInfoProto]) -> Iterator[object]:
    for value in values:
        yield value.name
        if value.type.WhichOneof("value") == "tensor_type":
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    yield dim.dim_param


def check_external_files(proto: onnx.ModelProto, folder: Path) -> tuple[Path, ...]:
    """Return the external files of a model, each proven to be inside its folder and to be long enough.

    Raises:
        ModelError: a path that leaves the folder (also through a link), a missing or short file, or
            lengths that contradict a tensor's shape.
    """
    sizes: dict[Path, int] = {}
    home = folder.resolve()
    for tensor in tensors_of(proto):
        if not is_external(tensor):
            continue
        place = external_data(tensor)
        path = folder / place.location
        if path not in sizes:
            sizes[path] = _external_size(path, place.location, home, tensor.name)
        needed = payload_bytes(tensor)
        if place.length_bytes is not None and place.length_bytes != needed:
            raise ModelError(
                f"tensor '{tensor.name}' declares {place.length_bytes} bytes of external data; its shape needs {needed}"
            )
        if place.offset_bytes + needed > sizes[path]:
            raise ModelError(
                f"external file '{place.location}' has {sizes[path]} bytes; tensor '{tensor.name}' "
                f"needs {needed} from byte {place.offset_bytes}",
                hint="The file is incomplete: copy or download it again.",
            )
    return tuple(sorted(sizes))


def _external_size(path: Path, location: str, home: Path, tensor: str) -> int:
    shown = location if len(location) <= 120 else location[:120] + "..."
    escape = ModelError(
        f"tensor '{tensor}' has its data in '{shown}', outside the model's folder",
        hint="External data must lie beside or below the model's file. Save the model again with its data there.",
    )
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise escape
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as exc:
        raise ModelError(
            f"external file '{shown}' of tensor '{tensor}' is missing",
            hint="A model with external data is several files: keep them together.",
        ) from exc
    if not target.is_relative_to(home):
        raise escape
    if not target.is_file():
        raise ModelError(f"external file '{shown}' of tensor '{tensor}' is not a file")
    return target.stat().st_size


def check_tensors(proto: onnx.ModelProto, store: WeightStore) -> None:
    """Check whether every tensor's stored bytes fill its declared shape.

    Raises:
        ModelError: the tensor's name, its size in the file and the size needed.
    """
    for tensor in tensors_of(proto):
        count = element_count(tensor)
        if tensor.data_type == onnx.TensorProto.STRING:
            if len(tensor.string_data) != count:
                raise ModelError(f"tensor '{tensor.name}' holds {len(tensor.string_data)} strings, not {count}")
            continue
        needed = payload_bytes(tensor)
        if is_external(tensor):
            continue
        blob = store.blob_of(tensor)
        if blob is not None or tensor.HasField("raw_data"):
            held = blob.length_bytes if blob is not None else len(tensor.raw_data)
            if held != needed:
                raise ModelError(f"tensor '{tensor.name}' holds {held} bytes; its shape needs {needed}")
        elif count and not any(
            (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        ):
            raise ModelError(f"tensor '{tensor.name}' has no values; its shape needs {count}")


def check_functions(proto: onnx.ModelProto) -> None:
    """Check local functions: none may call itself, and expanding all calls must stay within reason.

    The checker and the runtime expand functions: a cycle would not end, and a chain of functions each call the next
    one twice would fill the memory.

    Raises:
        ModelError: the function's name.
    """
    calls = {(f.domain, f.name): _calls_among(f.node) for f in proto.functions}
    expanded: dict[tuple[str, str], int] = {}
    for start in calls:
        path = [start]
        while path:
            name = path[-1]
            waiting = [callee for callee in calls[name] if callee in calls and callee not in expanded]
            if not waiting:
                path.pop()
                expanded[name] = sum(expanded.get(callee, 1) * times for callee, times in calls[name].items())
            elif waiting[0] in path:
                raise ModelError(f"local function '{'.'.join(waiting[0])}' calls itself: the graph is cyclic")
            else:
                path.append(waiting[0])
    total = sum(
        expanded.get(callee, 1) * times
        for graph in graphs_of(proto.graph)
        for callee, times in Counter((node.domain, node.op_type) for node in graph.node).items()
    )
    if max(total, max(expanded.values(), default=0)) > MAX_NODES:
        raise ModelError(f"with its local functions expanded the graph has more than {MAX_NODES} nodes")


def _calls_among(nodes: Iterable[onnx.NodeProto]) -> Counter[tuple[str, str]]:
    """Count the calls of nodes and the bodies in them."""
    calls: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        calls[(node.domain, node.op_type)] += 1
        for body in node_graphs(node):
            for graph in graphs_of(body):
                calls.update((inner.domain, inner.op_type) for inner in graph.node)
    return calls


def check_spec(proto: onnx.ModelProto, store: WeightStore) -> None:
    """Run ONNX's own checker on the graph. Weights cut out or outside are left aside.

    Raises:
        ModelError: with the first line of the checker's message.
    """
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    for tensor in tensors_of(light):
        if store.is_elsewhere(tensor):
            # The checker accepts a tensor without its bytes only if it has no elements.
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0]
    for graph in graphs_of(light.graph):
        for value in (*graph.input, *graph.output):
            # The checker requires a shape, although the standard allows an unknown rank and runtimes accept it.
            if value.type.WhichOneof("value") == "tensor_type" and not value.type.tensor_type.HasField("shape"):
                value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(light.SerializeToString())
    except (onnx.checker.ValidationError, *_CHECKER_ERRORS) as exc:
        raise ModelError(f"not a valid ONNX model: {one_line(exc)}") from exc


def one_line(exc: BaseException) -> str:
    """Return a vendor's message on one line, bounded."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "..."
