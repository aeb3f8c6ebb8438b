"""Run a model piece by piece over all samples, keeping only values with later readers.

A stream is a place in the graph: the nodes already run, and for each sample the values at the cut, those with readers
still to run. To advance, a piece of the graph becomes a model of its own. So each node runs once a sample, however
many layers are solved on the way, and values beyond a limit are kept on disk.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.onnx_model.draft import Draft, Weight, captured_names, replace_nodes
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import write_draft

__all__ = ["Graph", "Stream", "in_order"]

Array = NDArray[Any]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Graph:
    """A draft's nodes, and the inputs of each, its bodies included."""

    draft: Draft
    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, draft: Draft) -> Graph:
        """Look at a draft, whose nodes are in order."""
        nodes = tuple(draft.graph.node)
        return cls(draft, nodes, tuple(frozenset({*node.input, *captured_names(node)} - {""}) for node in nodes))

    @functools.cached_property
    def producer(self) -> dict[str, int]:
        """Value -> place of its node."""
        return {name: place for place, node in enumerate(self.nodes) for name in node.output if name}

    @functools.cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """Value -> its readers."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node, names in zip(self.nodes, self.reads, strict=True):
            for name in names:
                found.setdefault(name, []).append(node)
        return found

    def before(self, unsolved: Collection[str]) -> tuple[frozenset[int], frozenset[str]]:
        """Return the nodes independent of these weights, and the dependent values."""
        blocked, free = set(unsolved), set()
        for place, (node, names) in enumerate(zip(self.nodes, self.reads, strict=True)):
            if blocked.isdisjoint(names):
                free.add(place)
            else:
                blocked.update(node.output)
        return frozenset(free), frozenset(blocked)

    def needed_for(self, values: Collection[str]) -> frozenset[int]:
        """Return the nodes these values need."""
        waiting, found = [self.producer[value] for value in values if value in self.producer], set()
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting.extend(self.producer[name] for name in self.reads[place] if name in self.producer)
        return frozenset(found)


@dataclass
class Stream:
    """One run of a model over all samples, as far as it has come.

    Attributes:
        graph: the model's graph. Node numbers are places in its `nodes`.
        weights: its constants. Replace one before its readers run.
        values: for each sample, the values at the cut.
        folder: for models and values, of its own.
        keep_bytes: size of values kept in memory before they go to disk.
        done: numbers of the nodes already run, places in `graph.nodes`.
        changed: whether a constant is another one than at the start.
    """

    graph: Graph
    weights: dict[str, Weight]
    values: list[dict[str, Array | Path]]
    folder: Path
    keep_bytes: int
    done: frozenset[int] = frozenset()
    changed: bool = False
    _kept: int = 0
    _number: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def at_start(cls, graph: Graph, samples: Iterable[Mapping[str, Array]], folder: Path, keep_bytes: int) -> Stream:
        """Begin with the model's inputs.

        Args:
            graph: order of the model's nodes.
            samples: input samples: input name -> array, batch axis included.
            folder: folder for values that do not fit in memory.
            keep_bytes: bytes to keep in memory. The rest goes to `folder`.
        """
        folder.mkdir()
        stream = cls(graph, dict(graph.draft.weights), [], folder, keep_bytes)
        later = frozenset().union(*graph.reads)
        for place, sample in enumerate(samples):
            stream.values.append({})
            stream._keep(place, {name: value for name, value in sample.items() if name in later}, later)
        return stream

    def advance(
        self, done: frozenset[int], also: Collection[str], pool: Executor, width: int
    ) -> Iterator[dict[str, Array]]:
        """Run the nodes of `done` not run yet, and yield each sample's values of `also`, in order.

        Args:
            done: a closed set: the inputs of its nodes are computed by its nodes.
            also: values computed by `done`, or inputs.
            pool: executor that runs the work.
            width: how many samples at a time.

        Raises:
            ModelError: ONNX Runtime does not run a piece.
        """
        new = sorted(done - self.done)
        graph = self.graph
        later = {name for place in range(len(graph.nodes)) if place not in done for name in graph.reads[place]}
        made = {name for place in new for name in graph.nodes[place].output if name}
        read = {name for place in new for name in graph.reads[place]} - made - self.weights.keys()
        wanted = sorted(made & (later | set(also)))
        session = self._session(new, read, wanted) if wanted else None

        def one(place: int) -> dict[str, Array]:
            inputs = {name: self._load(place, name) for name in read if name in self.values[place]}
            found = session.run(inputs) if session is not None else {}
            for name in also:
                if name not in found:
                    found[name] = self._load(place, name)
            return found

        self.done = done
        for place, found in enumerate(in_order(one, range(len(self.values)), pool, width)):
            self._keep(place, {name: value for name, value in found.items() if name in later}, later)
            yield {name: found[name] for name in also}

    def _session(self, places: Sequence[int], inputs: Collection[str], outputs: Sequence[str]) -> Session:
        """Make a model of some nodes."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._frame)
        replace_nodes(proto.graph, [self.graph.nodes[place] for place in places])
        for name in sorted(inputs):
            if name in self.values[0]:
                value = self._load(0, name)
                dtype = onnx.TensorProto.STRING if value.dtype.kind in "OUS" else None
                number = onnx.helper.np_dtype_to_tensor_dtype(value.dtype) if dtype is None else dtype
                shape = [f"{name}:{axis}" for axis in range(value.ndim)]
                proto.graph.input.append(onnx.helper.make_tensor_value_info(name, number, shape))
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        used = frozenset().union(*(self.graph.reads[place] for place in places))
        weights = {name: weight for name, weight in self.weights.items() if name in used}
        path = self.folder / "piece.onnx"
        written = write_draft(Draft(proto, weights), path)
        session = Session(path, threads=1)
        for file in written.files:
            file.unlink()
        return session

    @functools.cached_property
    def _frame(self) -> onnx.ModelProto:
        """The model without its graph."""
        frame = onnx.ModelProto()
        frame.CopyFrom(self.graph.draft.proto)
        for name in ("node", "input", "output", "value_info"):
            frame.graph.ClearField(name)
        return frame

    def _load(self, place: int, name: str) -> Array:
        value = self.values[place][name]
        return value if isinstance(value, np.ndarray) else np.load(value, allow_pickle=False)

    def _keep(self, place: int, new: Mapping[str, Array], later: Collection[str]) -> None:
        old = self.values[place]
        for name, value in old.items():
            if name in later:
                continue
            if isinstance(value, np.ndarray):
                self._kept -= value.nbytes
            else:
                value.unlink(missing_ok=True)
        kept: dict[str, Array | Path] = {name: value for name, value in old.items() if name in later}
        for name, value in new.items():
            if name in kept:
                continue
            if self._kept + value.nbytes > self.keep_bytes and value.dtype.kind in "biufc":
                path = self.folder / f"value-{next(self._number)}.npy"
                np.save(path, value, allow_pickle=False)
                kept[name] = path
            else:
                self._kept += value.nbytes
                kept[name] = value
        self.values[place] = kept


def in_order(
    work: Callable[[_Item], _Result], items: Collection[_Item], pool: Executor, width: int
) -> Iterator[_Result]:
    """Yield results in the order of the items, `width` of them under way at a time.

    Args:
        work: function from an item to a result.
        items: the items. Results come in their order.
        pool: executor that runs the work.
        width: largest number of running items.
    """
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
