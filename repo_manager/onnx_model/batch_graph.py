"""Find out from the graph alone whether the samples of a batch depend on each other, and name the operator behind it.

The model is followed with a few samples. Each element of each value carries the samples it depends on
(`batch_values`), through reshapes, transposes and index arithmetic as through computations. In the end each row of
each output must depend on its own sample and on no other. Numbers the graph decides, shapes and indices, are computed
on the way. The model is followed twice, with different numbers of samples: an axis whose length differs follows the
number of samples, and a count along it depends on the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.batch_compute import COMPUTE_RULES
from repo_manager.onnx_model.batch_control import CONTROL_RULES, SEQUENCE_RULES, name_of
from repo_manager.onnx_model.batch_index import INDEX_RULES
from repo_manager.onnx_model.batch_layout import LAYOUT_RULES
from repo_manager.onnx_model.batch_values import (
    MAYBE,
    SAMPLES,
    SIZE,
    BatchCall,
    Blame,
    Marks,
    Rule,
    UnknownError,
    Value,
    common,
    constant,
    is_mixed,
    loose,
    total,
)
from repo_manager.onnx_model.inputs import usual_shapes
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.shape_inference import infer_at, static_shape
from repo_manager.onnx_model.weights import is_external
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
    from onnx import helper, inliner, numpy_helper
else:
    onnx, helper = deferred("onnx"), deferred("onnx.helper")
    inliner, numpy_helper = deferred("onnx.inliner"), deferred("onnx.numpy_helper")

__all__ = ["GraphVerdict", "judge_graph"]

_FIRST, _SECOND = 5, 3
"""Numbers of samples: an operator fixed to one of them fails with the other."""
_MAX_STEPS = 60_000
_MAX_KNOWN_ELEMENTS = 4096
_DOMAINS = ("", "ai.onnx", "com.microsoft", "ai.onnx.ml")
_RULES: Mapping[str, Rule] = {**LAYOUT_RULES, **INDEX_RULES, **COMPUTE_RULES}
_ERRORS = (
    UnknownError,
    ModelError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
)


@dataclass(frozen=True)
class GraphVerdict:
    """The graph's word on a batch.

    Attributes:
        kind: `independent`: proven. `dependent`: a node makes samples depend on each other. `unknown`: a run must
            tell.
        reason: in words, for `dependent` with the node.
        blame: the node, when it is known.
    """

    kind: Literal["independent", "dependent", "unknown"]
    reason: str
    blame: Blame | None = None


def judge_graph(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> GraphVerdict:
    """Follow the samples through a model's graph. Weights are not read.

    Args:
        model: whose inputs all have the samples along their first axis.
        shapes: shape per input the model runs with. The first axis is replaced. `None`: usual sizes.
    """
    proto = model.graph_only
    try:
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        walks = _follow(model, proto, {**usual_shapes(proto), **(shapes or {})})
    except (*_ERRORS, RuntimeError, RecursionError) as exc:
        return GraphVerdict("unknown", f"the graph could not be followed: {exc}")
    doubt: str | None = None
    for output in proto.graph.output:
        for walk, other in (walks[::-1], walks):
            found = _judge_output(output.name, walk, other)
            if found is not None and found.kind == "dependent":
                return found
            if found is not None:
                doubt = doubt or walk.doubt or found.reason
    if doubt is not None:
        return GraphVerdict("unknown", doubt)
    return GraphVerdict("independent", "every operator works on each sample by itself")


def _follow(model: Model, proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> tuple[_Walk, _Walk]:
    held = {tensor.name for tensor in proto.graph.initializer}
    held |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    names = [value.name for value in proto.graph.input if value.name not in held]
    if any(not shapes.get(name) for name in names):
        raise UnknownError("an input has no usual shape")
    walks: list[_Walk] = []
    for samples in (_FIRST, _SECOND):
        # The second walk compares its lengths with the first's. The first has none to compare with.
        at = {name: (samples, *shapes[name][1:]) for name in names}
        walks.append(_Walk(model, proto, at, samples, walks[0].lengths if walks else {}))
        walks[-1].run()
    return walks[0], walks[1]


def _judge_output(name: str, walk: _Walk, other: _Walk) -> GraphVerdict | None:
    """Return the objection to an output, or `None`."""
    value, first, samples = walk.results[name], other.results[name], walk.samples
    if value.shape is None:
        if bin(common(value) & SAMPLES).count("1") > 1:
            return _dependent(name, value)
        return GraphVerdict("unknown", f"the shape of output '{name}' depends on data")
    if not value.shape or value.shape[0] != samples:
        if is_mixed(value):
            return _dependent(name, value)
        return GraphVerdict("unknown", f"output '{name}' has shape {list(value.shape)} for {samples} samples")
    if first.shape is not None and first.shape[1:] != value.shape[1:]:
        return _dependent(name, value, f"output '{name}' has another shape for another number of samples")
    rows = np.broadcast_to(value.marks, (samples, *value.marks.shape[1:]))
    own = (1 << np.arange(samples, dtype=np.uint16)).reshape((-1,) + (1,) * (len(value.shape) - 1)).astype(np.uint16)
    if (rows & (SAMPLES ^ own)).any() or (rows & SIZE).any():
        return _dependent(name, value)
    if (rows & MAYBE).any():
        return GraphVerdict("unknown", f"the graph does not tell what output '{name}' depends on")
    return None


def _dependent(name: str, value: Value, reason: str | None = None) -> GraphVerdict:
    blame = value.blame
    if blame is not None:
        reason = f"node '{blame.node}' ({blame.op_type}) {blame.why}"
    elif reason is None and not (value.marks & SIZE).any():
        reason = f"the rows of output '{name}' are not in the samples' order"
    return GraphVerdict("dependent", reason or f"output '{name}' depends on the number or the place of samples", blame)


class _Walk:
    """One pass over the model with some number of samples.

    Attributes:
        lengths: shape of each value, by its place in the walk.
        results: output name -> its value. Empty until the walk ends.
        doubt: the first operator whose effect is not known, in words.
    """

    def __init__(
        self,
        model: Model,
        proto: onnx.ModelProto,
        shapes: Mapping[str, tuple[int, ...]],
        samples: int,
        other: Mapping[str, tuple[int, ...] | None],
    ) -> None:
        self.model, self.proto, self.shapes, self.samples, self.other = model, proto, shapes, samples, other
        self.opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in proto.opset_import}
        self.lengths: dict[str, tuple[int, ...] | None] = {}
        self.results: dict[str, Value] = {}
        self.doubt: str | None = None
        self.steps = 0
        self._inferred: dict[str, tuple[int, ...]] | None = None

    def run(self) -> None:
        """Follow the main graph."""
        marks = (1 << np.arange(self.samples)).astype(np.uint16)
        scope: dict[str, Value] = {}
        for name, shape in self.shapes.items():
            each = marks.reshape((-1,) + (1,) * (len(shape) - 1))
            scope[name] = self.placed(name, Value(shape, each), "")
            if not self.other:  # first walk: only the batch axis depends on the number of samples
                scope[name] = replace(scope[name], sized=(True,) + (False,) * (len(shape) - 1))
        results = self.graph(self.proto.graph, scope, "")
        self.results = dict(zip((output.name for output in self.proto.graph.output), results, strict=True))

    def placed(self, name: str, value: Value, path: str) -> Value:
        """Note a value's lengths, and compare them with the other walk's."""
        key = path + name
        self.lengths[key] = value.shape
        other = self.other.get(key)
        if value.shape is None or other is None or len(other) != len(value.shape):
            return value
        sized = tuple(here != there for here, there in zip(value.shape, other, strict=True))
        return replace(value, sized=sized if any(sized) else ())

    def graph(self, graph: onnx.GraphProto, scope: dict[str, Value], path: str) -> list[Value]:
        """Follow a graph whose inputs are in `scope`. Return its outputs."""
        for tensor in graph.initializer:
            if tensor.name not in scope or path:
                scope[tensor.name] = constant(self.numbers(tensor), tensor.dims)
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = constant(None, sparse.dims)
        for node in graph.node:
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise UnknownError("the graph is too large to be followed")
            self.node(node, scope, path)
        return [scope[output.name] for output in graph.output]

    def numbers(self, tensor: onnx.TensorProto) -> NDArray[Any] | None:
        """Return a small constant's numbers."""
        if math.prod(tensor.dims) > _MAX_KNOWN_ELEMENTS or tensor.data_type == onnx.TensorProto.STRING:
            return None
        if is_external(tensor) or self.model.weights.blob_of(tensor) is not None:
            return self.model.array(tensor)
        return numpy_helper.to_array(tensor)

    def node(self, node: onnx.NodeProto, scope: dict[str, Value], path: str) -> None:
        """Follow one node. Its results go into `scope`."""
        inputs = [scope[name] if name else None for name in node.input]
        given = [value for value in inputs if value is not None]
        try:
            results = list(self.apply(node, inputs, scope, path))
        except _ERRORS as exc:
            if self.doubt is None and any(total(value) & SAMPLES for value in given):
                self.doubt = f"node '{name_of(node)}' ({node.op_type}): the graph does not tell what it does: {exc}"
            results = self.unknown(node, [*given, *self.captured(node, scope)])
        blame = next((value.blame for value in given if value.blame is not None and is_mixed(value)), None)
        for name, value in zip(node.output, results, strict=False):
            if name:
                if value.blame is None and is_mixed(value):
                    value = replace(value, blame=blame or Blame(name_of(node), node.op_type, _why(node, value, given)))
                scope[name] = self.placed(name, value, path)

    def captured(self, node: onnx.NodeProto, scope: Mapping[str, Value]) -> list[Value]:
        """Return the values a node's bodies take from around it."""
        names = {
            name
            for attribute in node.attribute
            for body in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
            for name in _free_names(body)
        }
        return [scope[name] for name in sorted(names) if name in scope]

    def apply(
        self, node: onnx.NodeProto, inputs: Sequence[Value | None], scope: dict[str, Value], path: str
    ) -> Sequence[Value]:
        """Return a node's outputs.

        Raises:
            UnknownError: no rule covers it. Other exceptions: it does not fit its inputs.
        """
        if node.domain not in _DOMAINS:
            raise UnknownError(f"an operator of domain {node.domain}")
        attributes = {
            attribute.name: helper.get_attribute_value(attribute)
            for attribute in node.attribute
            if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        }
        domain = "" if node.domain == "ai.onnx" else node.domain
        call = BatchCall(node, inputs, attributes, self.opsets.get(domain, 1), self.samples)
        if node.op_type == "Constant":
            return [self.constant(attributes)]
        control = CONTROL_RULES.get(node.op_type)
        if control is not None:
            return control(self.graph, call, scope, path)
        rule = SEQUENCE_RULES.get(node.op_type) or _RULES.get(node.op_type)
        if rule is None:
            raise UnknownError("there is no rule for it")
        return rule(call)

    def constant(self, attributes: Mapping[str, Any]) -> Value:
        """Return the value of a Constant node."""
        name, held = next(iter(attributes.items()))
        if name == "value":
            return constant(self.numbers(held), held.dims)
        if name == "sparse_value":
            return constant(None, held.dims)
        array = np.asarray(held)
        return constant(array, array.shape)

    def unknown(self, node: onnx.NodeProto, values: Sequence[Value]) -> list[Value]:
        """Return the result for an unknown or opaque operator."""
        rest = loose(values)
        results = []
        for name in node.output:
            shape = self.inferred.get(name)
            if shape is None:
                results.append(rest)
                continue
            results.append(Value(shape, self.guessed_rows(values, shape) | np.uint16(rest.marks)))
        return results

    def guessed_rows(self, values: Sequence[Value], shape: tuple[int, ...]) -> Marks:
        """Return the marks of an output whose rows are the inputs', a guess, marked so by the caller."""
        rows = np.zeros((1,) * len(shape), np.uint16)
        for value in values:
            if not value.marks.any():
                continue
            plain = value.shape is not None and value.marks.size == self.samples and value.marks.shape[0] > 1
            if not plain or shape[:1] != (self.samples,):
                return np.zeros((1,) * len(shape), np.uint16)
            rows = rows | value.marks.reshape((-1,) + (1,) * (len(shape) - 1))
        return rows

    @property
    def inferred(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the main graph's values by ONNX's own inference, made when first needed."""
        if self._inferred is None:
            inferred = infer_at(self.proto, self.shapes)
            self._inferred = {}
            for value in () if inferred is None else (*inferred.graph.value_info, *inferred.graph.output):
                shape = static_shape(value.type)
                if shape is not None:
                    self._inferred[value.name] = shape
        return self._inferred


def _free_names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _free_names(body)
    yield from (output.name for output in graph.output)


_OVER_THE_BATCH = "takes the samples of a batch together"
_WHY = {
    "ArgMax": "searches over the batch axis",
    "ArgMin": "searches over the batch axis",
    "BatchNormalization": "is in training mode: it normalises with the statistics of the whole batch",
    "CumSum": "adds up along the batch axis",
    "DynamicQuantizeLinear": "takes one scale for the whole batch",
    "DynamicQuantizeLSTM": "takes one scale for the whole batch",
    "DynamicQuantizeMatMul": "takes one scale for the whole batch",
    "Hardmax": "compares along the batch axis",
    "LogSoftmax": "normalises over the batch axis",
    "LpNormalization": "normalises over the batch axis",
    "MeanVarianceNormalization": "normalises over the batch axis",
    "Softmax": "normalises over the batch axis",
    "TopK": "sorts along the batch axis",
    "Unique": "compares the elements of all samples",
}


def _why(node: onnx.NodeProto, value: Value, given: Sequence[Value]) -> str:
    several = np.array([bin(number).count("1") > 1 for number in range(256)])
    if not several[value.marks & SAMPLES].any() and not value.items:
        return "computes with the number of samples, or with a sample's place among them"
    if node.op_type in _WHY:
        return _WHY[node.op_type]
    if node.op_type.startswith("Reduce") or "Pool" in node.op_type:
        return "reduces over the batch axis"
    if len(given) > 1:
        return "combines elements of different samples"
    return _OVER_THE_BATCH
