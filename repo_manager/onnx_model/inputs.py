"""Seeded, sensible inputs for a model without data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature, resolve_shape, signature_of, spec_of
from repo_manager.optional import deferred
from repo_manager.types import TensorSpec

if TYPE_CHECKING:
    import ml_dtypes
    import onnx
else:
    ml_dtypes = deferred("ml_dtypes")
    onnx = deferred("onnx")

__all__ = ["find_sizes", "given_sizes", "index_limits", "natural_answers", "natural_inputs", "usual_shapes"]


# Upper limits of integer inputs that index rows of a table: tokens, categories.

_SAME_VALUES = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Slice"})


def index_limits(model: Model) -> dict[str, int]:
    """Return, per input used unchanged as a Gather's indices, the size of the smallest table it picks from.

    Inputs not used as indices are left out. Only the main graph is looked at.
    """
    graph = model.graph_only.graph
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    tables |= {
        node.output[0]: tuple(attribute.t.dims)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    }
    origin = {value.name: value.name for value in graph.input if value.name not in tables}
    limits: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _SAME_VALUES and node.input and node.input[0] in origin:
            origin.update(dict.fromkeys(node.output, origin[node.input[0]]))
        elif node.op_type == "Gather" and len(node.input) == 2 and node.input[1] in origin:
            size = _rows(node, tables.get(node.input[0]))
            if size is not None:
                name = origin[node.input[1]]
                limits[name] = min(size, limits.get(name, size))
    return limits


def _rows(node: onnx.NodeProto, shape: tuple[int, ...] | None) -> int | None:
    axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)
    if not shape or not -len(shape) <= axis < len(shape) or shape[axis] < 1:
        return None
    return shape[axis]


_DEFAULT_SIZE = 16  # elements of a dynamic axis, unless it is the batch or part of an image
_IMAGE_SIZE = 64
_IMAGE_SIZE_AT_MOST = 512  # with two free axes, larger squares only cost time
# Sizes tried in turn for dynamic axes other than the batch: images, sequences, then unusual ones.
_TRIED_SIZES = (64, 16, 224, 1, 32, 256, 512, 128, 8, 320, 48, 2048, 4, 2, 3, 1024)

_INDEX_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def natural_inputs(
    signature: Signature,
    *,
    batch: int | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    limits: Mapping[str, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """Make one array per input: floats standard normal, integers 0 or 1, strings words.

    Integers stay so small to work as indices, masks and token numbers. A scalar or one-element integer is
    1. The same symbol gets the same size everywhere.

    Args:
        signature: the model's inputs and outputs.
        batch: size of a dynamic first dimension. `None` is 1.
        seed: seed of NumPy's generator. The same seed and sizes give the same values.
        sizes: size per symbol or per `input:axis`, as in `resolve_shape`. `None`: usual sizes.
        limits: input name -> exclusive upper limit of its integers (`index_limits`). `None`: no limits.

    Raises:
        ModelError: an input of a type beyond NumPy, or too large.
    """
    generator = np.random.default_rng(seed)
    known = {**_first_axes(signature, 1 if batch is None else batch), **_guessed_sizes(signature), **(sizes or {})}
    arrays = {}
    for spec in signature.inputs:
        shape = resolve_shape(spec, batch=1 if batch is None else batch, sizes=known, default=_DEFAULT_SIZE)
        limit = (limits or {}).get(spec.name)
        if limit is not None and spec.dtype in _INDEX_TYPES:
            largest = min(limit, int(np.iinfo(spec.dtype).max))
            arrays[spec.name] = np.asarray(generator.integers(0, max(1, largest), shape), spec.dtype)
        else:
            arrays[spec.name] = _values(spec, shape, generator)
    return arrays


def natural_answers(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Make one request for a model and have ONNX Runtime answer it.

    Args:
        path: the .onnx file, with its external files beside it.
        shapes: input name -> shape, batch axis included. `None`: the model's own shapes.

    Returns:
        The inputs, batch 1, and the outputs.

    Raises:
        ModelError: it does not run on made-up inputs.
    """
    signature = signature_of(load_model(path))
    sizes = {
        dim if isinstance(dim, str) else f"{spec.name}:{axis}": wanted
        for spec in signature.inputs
        for axis, (dim, wanted) in enumerate(zip(spec.shape or (), (shapes or {}).get(spec.name, ()), strict=False))
        if not isinstance(dim, int) and wanted > 0
    }
    inputs = natural_inputs(signature, batch=1, sizes=sizes)
    return inputs, Session(path).run(inputs)


def given_sizes(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Turn shapes a person gave for inputs into sizes for `natural_inputs` and `find_sizes`.

    Args:
        signature: the model's inputs and outputs.
        shapes: input -> every size, the batch included.

    Raises:
        UsageError: there is no such input, it has another rank, a size contradicts the model, or two shapes give one
            symbol different sizes.
    """
    sizes: dict[str, int] = {}
    by_name = {spec.name: spec for spec in signature.inputs}
    for name, shape in shapes.items():
        spec = by_name.get(name)
        if spec is None:
            raise UsageError(f"--shape {name}: the model has no such input; it has {', '.join(by_name) or 'none'}")
        declared = spec.shape if spec.shape is not None else (None,) * len(shape)
        fits = len(declared) == len(shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(declared, shape, strict=True)
        )
        if not fits:
            text = ",".join(map(str, shape))
            sizes_of = [dim if isinstance(dim, int) else "N" for dim in declared]
            example = ",".join(map(str, sizes_of))
            raise UsageError(
                f"--shape {name}:{text} does not fit the model's input {spec}",
                hint=f"Give {len(declared)} sizes, the batch included, as in {name}:{example}.",
            )
        for axis, (dim, size) in enumerate(zip(declared, shape, strict=True)):
            key = dim if isinstance(dim, str) else f"{name}:{axis}"
            if not isinstance(dim, int) and sizes.setdefault(key, size) != size:
                raise UsageError(f"--shape gives {key!r} the sizes {sizes[key]} and {size}; it has one in a request")
    return sizes


def usual_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return a shape per tensor input: batch 1, 64 along dynamic image axes, 16 along others.

    Inputs other than tensors, or absurdly large ones, are left out.
    """
    initialised = {tensor.name for tensor in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name not in initialised:
            with contextlib.suppress(ModelError):
                specs.append(spec_of(value, f"input '{value.name}'"))
    signature = Signature(tuple(specs), (), 0, 0, {})
    known = {**_first_axes(signature, 1), **_guessed_sizes(signature)}
    shapes = {}
    for spec in specs:
        if spec.shape is not None:
            with contextlib.suppress(ModelError):
                shapes[spec.name] = resolve_shape(spec, sizes=known, default=_DEFAULT_SIZE)
    return shapes


def _first_axes(signature: Signature, batch: int) -> dict[str, int]:
    """Give the symbol of some input's first axis the batch's size on every axis, as in a recurrent state."""
    return {spec.shape[0]: batch for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}


def _guessed_sizes(signature: Signature) -> dict[str, int]:
    """Give image-like axes (the last two of a rank-4 float) a size large enough for convolutions."""
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        if spec.shape is None or len(spec.shape) < 4 or not spec.dtype.startswith(("float", "uint8")):
            continue
        for axis, dim in enumerate(spec.shape):
            if axis > 0 and not isinstance(dim, int):
                sizes[f"{spec.name}:{axis}" if dim is None else dim] = _IMAGE_SIZE
    for spec in signature.inputs:  # a symbol used for any input's first axis is the batch
        if spec.shape and isinstance(spec.shape[0], str):
            sizes.pop(spec.shape[0], None)
    return sizes


def _values(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    dtype = spec.dtype
    if dtype == "string":
        words = np.array(["a", "bc", "def", "ghij"], dtype=object)
        return np.asarray(words[generator.integers(0, 4, shape)], dtype=object).reshape(shape)
    if dtype == "bool":
        return np.asarray(generator.integers(0, 2, shape), dtype=bool)
    if (dtype.startswith(("int", "uint")) and dtype[-1] != "4") or dtype in ("int64", "uint64"):
        if int(np.prod(shape, dtype=np.int64)) == 1:
            return np.ones(shape, dtype)
        if dtype == "uint8":  # usually raw images
            return np.asarray(generator.integers(0, 256, shape), np.uint8)
        return np.asarray(generator.integers(0, 2, shape), dtype)
    normal = generator.standard_normal(shape, np.float64 if dtype == "float64" else np.float32)
    if dtype.startswith("complex"):
        return np.asarray(normal, dtype)
    if dtype.startswith(("float", "bfloat")) and (hasattr(np, dtype) or hasattr(ml_dtypes, dtype)):
        return np.asarray(normal).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    raise ModelError(f"input '{spec.name}' has type {dtype}, for which no values can be made", hint="Give sample data.")


def find_sizes(
    session: Session,
    signature: Signature,
    *,
    seed: int = 0,
    budget_s: float = 10.0,
    given: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Find sizes for the dynamic axes the model runs with, trying a few usual ones.

    Args:
        session: session that runs the model.
        signature: names, types and dynamic axes of the model's inputs.
        seed: seed of the made inputs, the same for each size tried.
        budget_s: no further size is tried after so many seconds.
        given: known sizes (`given_sizes`). Only the others are tried. `None`: none is known.

    Returns:
        Sizes for `natural_inputs` and `resolve_shape`.

    Raises:
        ModelError: it ran with none of them. The message has the first failure.
    """
    first: ModelError | None = None
    started = time.monotonic()
    for candidate in _candidates(signature):
        sizes = {**candidate, **(given or {})}
        if first is not None and time.monotonic() - started > budget_s:
            break
        try:
            session.run(natural_inputs(signature, seed=seed, sizes=sizes))
        except ModelError as exc:
            first = first or exc
            continue
        return {**_guessed_sizes(signature), **sizes}
    assert first is not None
    raise first


def _candidates(signature: Signature) -> Iterator[dict[str, int]]:
    yield {}
    free = {
        f"{spec.name}:{axis}" if dim is None else dim
        for spec in signature.inputs
        for axis, dim in enumerate(spec.shape or ())
        if not isinstance(dim, int) and axis > 0
    }
    free = {symbol for symbol in free if "+" not in symbol and "*" not in symbol}
    firsts = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}
    free -= firsts
    limit = max(_TRIED_SIZES) if len(free) < 2 else _IMAGE_SIZE_AT_MOST
    for size in _TRIED_SIZES if free else ():
        if size <= limit:
            yield dict.fromkeys(free, size)
    if len(free) > 1:  # one axis is time or pixels, the others repeat the batch (of a state)
        for size in _TRIED_SIZES:
            for long in sorted(free):
                yield {**dict.fromkeys(free, 1), long: size}
