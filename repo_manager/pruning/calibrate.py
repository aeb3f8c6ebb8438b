"""Solve the layers of a model one after the other, each on its inputs behind the layers pruned already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import CalibrationError, InputError
from repo_manager.onnx_model.draft import Weight, weight_of_array
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.optional import deferred
from repo_manager.precision.calibration.data import CalibrationData
from repo_manager.pruning.layers import Layer
from repo_manager.pruning.moments import Moments
from repo_manager.pruning.solve import best_damping, judged_rows, solve
from repo_manager.pruning.stream import Graph, Stream
from repo_manager.sparsity.pattern import magnitude_prune, valid_groups
from repo_manager.types import Digest
from repo_manager.validation import check_fields, check_range

if TYPE_CHECKING:
    import threadpoolctl
else:
    threadpoolctl = deferred("threadpoolctl")

__all__ = [
    "Progress",
    "Run",
    "SolveOptions",
    "Solved",
    "by_magnitude",
    "replacements",
    "solve_alone",
    "solve_layers",
    "workers",
]

Array = NDArray[Any]
Progress = Callable[[float, str], None]
"""Called with the share done, 0 to 1, and the layer being solved."""

_DEFAULT_DAMPING = 0.01
_JUDGING_EVERY = 4  # samples: one of so many judges the damping
_COLUMNS_A_WEIGHT, _COLUMNS_AT_LEAST = 8, 8192
_PASSES = 12  # estimated products with the Hessian for all rows
_VERSION = 2  # of the solver: a journal of another version is ignored


@dataclass(frozen=True)
class SolveOptions:
    """How layers are solved.

    Attributes:
        damping: added to each Hessian's diagonal, as a share of its mean. `None` chooses for each layer the best value
            on a quarter of the samples, left out of the fit.
        seed: of the draws of columns.
        threads: at work at a time. `None` is one per processor. The result does not depend on it.
        work: folder for the layers solved so far, so a stopped run goes on. `None` keeps nothing.
    """

    damping: float | None = None
    seed: int = 0
    threads: int | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("damping", self.damping)
        check_range("threads", self.threads, least=1)


@dataclass(frozen=True)
class Solved:
    """The solution of one layer.

    Attributes:
        matrix: the pruned weights, `[N, K]` float32.
        shift: by how much the means of its outputs fall short, `[N]`.
        error: relative error of the layer's outputs against the dense model's, on the calibration data.
        magnitude_error: the same for magnitude pruning.
        damping: damping used in the solution.
    """

    matrix: Array
    shift: Array
    error: float
    magnitude_error: float
    damping: float


@dataclass(frozen=True)
class Journal:
    """Solved layers, in a folder, so a stopped run goes on where it was.

    Attributes:
        folder: keeps the solved layers and the run's key (`run.json`). `None` keeps nothing.
    """

    folder: Path | None

    @classmethod
    def opened(cls, key: Sequence[Any], folder: Path | None) -> Journal:
        """Open a folder. A missing one is created.

        Args:
            key: everything the solutions depend on.
            folder: folder of solved layers, created if needed. `None`: keep nothing.

        Raises:
            InputError: the folder belongs to another run.
        """
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path, wanted = folder / "run.json", json.dumps([_VERSION, *key])
            if not path.is_file() and not any(folder.iterdir()):
                path.write_text(wanted, encoding="utf-8")
            elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
                raise InputError(
                    f"{folder}: holds something else than solved layers of this model, data and options",
                    hint="Give an empty folder, or delete this one.",
                )
        return cls(folder)

    def read(self, name: str) -> Solved | None:
        """Return a layer solved before."""
        if name not in self:
            return None
        with np.load(self._path(name), allow_pickle=False) as file:
            return Solved(file["matrix"], file["shift"], *(float(number) for number in file["numbers"]))

    def __contains__(self, name: str) -> bool:
        return self.folder is not None and self._path(name).is_file()

    def write(self, name: str, solved: Solved) -> None:
        """Keep a layer, as a whole or not at all."""
        if self.folder is None:
            return
        temporary = self._path(name).with_suffix(".tmp")
        with temporary.open("wb") as file:
            numbers = np.array([solved.error, solved.magnitude_error, solved.damping])
            np.savez(file, matrix=solved.matrix, shift=solved.shift, numbers=numbers)
        temporary.replace(self._path(name))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


@contextmanager
def workers(threads: int | None) -> Iterator[tuple[Executor, int]]:
    """Give a pool of threads, and how many, and hold BLAS to one thread each: so no result depends on their number.

    Args:
        threads: number of threads. `None`: one per CPU.
    """
    width = threads or os.cpu_count() or 1
    with threadpoolctl.threadpool_limits(limits=1), ThreadPoolExecutor(width) as pool:
        yield pool, width


@dataclass(frozen=True)
class Run:
    """The parts of a run over the layers.

    Attributes:
        model: digest of the dense model.
    """

    model: Digest
    graph: Graph
    store: WeightStore
    samples: CalibrationData
    folder: Path
    keep_bytes: int
    options: SolveOptions
    pool: Executor
    width: int

    def key(self, layers: Sequence[Layer]) -> list[Any]:
        """Return everything the solutions of these layers depend on."""
        told = [self.model, self.samples.digest, self.samples.count, self.options.damping, self.options.seed]
        return [*told, [layer.name for layer in layers]]

    def within(self, name: str) -> Run:
        """Return the run with folders of its own."""
        work = None if self.options.work is None else self.options.work / name
        folder = self.folder / name
        folder.mkdir()
        return replace(self, folder=folder, options=replace(self.options, work=work))


def solve_layers(run: Run, layers: Sequence[Layer], progress: Progress = lambda _, __: None) -> dict[str, Solved]:
    """Solve layers in the order of the data flow.

    Args:
        run: the dense model and its data.
        layers: layers to prune, in the graph's order.
        progress: called before each layer with the share of the cost done, 0 to 1, and its label.

    Returns:
        The layers by the names of their tensors.

    Raises:
        CalibrationError: a value is not finite on a sample.
        ModelError: ONNX Runtime does not run the model on a sample.
    """
    keep = run.keep_bytes // 2
    dense = Stream.at_start(run.graph, run.samples.batches(), run.folder / "dense", keep)
    pruned = Stream.at_start(run.graph, run.samples.batches(), run.folder / "pruned", keep)
    journal = Journal.opened(run.key(layers), run.options.work)
    unsolved = {layer.name: layer for layer in layers}
    solved: dict[str, Solved] = {}
    costs = {layer.name: _cost(layer, run.samples.count) for layer in layers}

    def tell(layer: Layer) -> None:
        progress(sum(costs[name] for name in solved) / sum(costs.values()), layer.label)

    def finish(group: Sequence[Layer], moments: dict[str, Moments]) -> None:
        for layer in group:
            tell(layer)
            solved[layer.name] = result = _known_or_solved(layer, moments, run, journal)
            pruned.weights.update(replacements(layer, result, run.graph.draft.weights, run.store))
            pruned.changed = True
            del unsolved[layer.name]
        tell(group[-1])

    shared = [layer for layer in unsolved.values() if len(layer.uses) > 1]
    if shared:  # their uses may follow each other: both see the dense model's values
        alone = Stream.at_start(run.graph, run.samples.batches(), run.folder / "shared", keep)
        finish(shared, _observe(shared, alone, alone, run, journal))
    while unsolved:
        free, blocked = run.graph.before(unsolved)
        ready = [layer for layer in unsolved.values() if layer.uses[0].value not in blocked]
        group = _within(ready, run.keep_bytes)
        tell(group[0])
        finish(group, _observe(group, pruned, dense, run, journal, free))
    return solved


def solve_alone(run: Run, layers: Sequence[Layer], progress: Progress = lambda _, __: None) -> dict[str, Solved]:
    """Solve each layer as if it alone were pruned: on its inputs in the dense model.

    Args:
        run: the dense model and its data.
        layers: layers to prune, in the graph's order.
        progress: called before each layer with the share of layers done, 0 to 1, and its label.

    Raises:
        CalibrationError: a value is not finite on a sample.
        ModelError: ONNX Runtime does not run the model on a sample.
    """
    journal = Journal.opened(run.key(layers), run.options.work)
    in_order = sorted(layers, key=lambda layer: max(run.graph.producer[use.output] for use in layer.uses))
    solved: dict[str, Solved] = {}
    for is_shared in (True, False):  # a shared weight's later uses may follow other layers: own stream
        waiting = [layer for layer in in_order if (len(layer.uses) > 1) == is_shared]
        name = "shared" if is_shared else "dense"
        samples = run.samples.batches() if waiting else ()
        dense = Stream.at_start(run.graph, samples, run.folder / name, run.keep_bytes)
        while waiting:
            group = waiting if is_shared else _within(waiting, run.keep_bytes)
            progress(len(solved) / len(layers), group[0].label)
            moments = _observe(group, dense, dense, run, journal)
            for layer in group:
                progress(len(solved) / len(layers), layer.label)
                solved[layer.name] = _known_or_solved(layer, moments, run, journal)
            waiting = waiting[len(group) :]
    return solved


def replacements(layer: Layer, solved: Solved, weights: Mapping[str, Weight], store: WeightStore) -> dict[str, Weight]:
    """Return the constants a solved layer changes, by name, as they are stored. They are computed when read.

    Args:
        layer: the solved layer. Its weight changes, and its `shift` constant if it has one.
        solved: new values of the layer.
        weights: name -> constants of the model.
        store: reads the values of constants.
    """
    weight = weights[layer.name]
    found = {layer.name: replace(weight, load=lambda: layer.stored(solved.matrix, store))}
    if layer.shift is not None:
        before = weights[layer.shift.name]
        values = before.load()
        after = values.astype(np.float64) + layer.shift.sign * solved.shift.reshape(values.shape)
        found[layer.shift.name] = weight_of_array(after.astype(values.dtype), before.data_type)
    return found


def by_magnitude(layer: Layer, run: Run) -> Weight:
    """Return a layer's weight as magnitude pruning has it, made when it is read."""

    def load() -> Array:
        pruned, _, _ = magnitude_prune(layer.matrix(run.store), 1)
        return layer.stored(pruned, run.store)

    return replace(run.graph.draft.weights[layer.name], load=load)


def _cost(layer: Layer, samples: int) -> float:
    """Return about how many operations a layer takes: its sums, its solution, and its share of both runs."""
    columns, outputs = float(layer.columns), layer.outputs
    sums = max(_COLUMNS_AT_LEAST, _COLUMNS_A_WEIGHT * columns) * columns * (columns + outputs)
    return sums + columns**2 * (columns + _PASSES * outputs) + 4.0 * samples * (layer.macs or 0)


def _within(ready: Sequence[Layer], keep_bytes: int) -> list[Layer]:
    """Return the first layers whose sums fit into memory together, one at least."""
    group: list[Layer] = []
    total = 0
    for layer in ready:
        total += 8 * layer.columns * (layer.columns + layer.outputs)
        if group and total > keep_bytes:
            break
        group.append(layer)
    return group


def _observe(
    group: Sequence[Layer],
    pruned: Stream,
    dense: Stream,
    run: Run,
    journal: Journal,
    free: frozenset[int] = frozenset(),
) -> dict[str, Moments]:
    """Sum up the inputs of layers in the pruned model, and their answers in the dense one.

    Layers of the journal are not summed up. The model runs in the same pieces with them, because other pieces round
    otherwise, and a continued run must end like one never stopped.
    """
    seen = {use.value for layer in group for use in layer.uses}
    wanted = {use.output for layer in group for use in layer.uses}
    ahead = free | dense.done | run.graph.needed_for(wanted)
    answers = dense.advance(ahead, wanted | seen, run.pool, run.width)
    inputs = answers if dense is pruned else pruned.advance(free, seen, run.pool, run.width)
    pairs = ((both, both) for both in answers) if dense is pruned else zip(inputs, answers, strict=True)
    summed = [layer for layer in group if layer.name not in journal]
    same = dense is pruned or not pruned.changed
    moments = {layer.name: Moments(layer.outputs, layer.columns, run.pool, same=same) for layer in summed}
    biases = {
        layer.name: np.zeros(1, np.float32)
        if layer.bias is None
        else run.graph.draft.weights[layer.bias].load().astype(np.float32).reshape(-1)
        for layer in summed
    }
    for number, (values, outputs) in enumerate(pairs):
        for layer in summed:
            limit = -(-max(_COLUMNS_AT_LEAST, _COLUMNS_A_WEIGHT * layer.columns) // run.samples.count)
            for place, use in enumerate(layer.uses):
                random = np.random.default_rng([run.options.seed, number, place])
                columns, answered = use.of(values[use.value], outputs[use.output], limit, random)
                if not (np.isfinite(columns).all() and np.isfinite(answered).all()):
                    raise CalibrationError(
                        f"layer '{layer.label}' has infinities or NaN on sample {number + 1}",
                        hint="Look at that sample: the model itself overflows on it.",
                    )
                before = None
                if moments[layer.name].reads_dense_inputs:
                    random = np.random.default_rng([run.options.seed, number, place])
                    before, _ = use.of(outputs[use.value], outputs[use.output], limit, random)
                judging = number % _JUDGING_EVERY == _JUDGING_EVERY - 1
                moments[layer.name].add(columns, answered - biases[layer.name], before, judging=judging)
    return moments


def _known_or_solved(layer: Layer, moments: dict[str, Moments], run: Run, journal: Journal) -> Solved:
    """Return a layer as the journal has it, or solve it and keep it there. Frees the sums it was solved from."""
    result = journal.read(layer.name)
    if result is None:
        result = _solve(layer, moments.pop(layer.name), run)
        journal.write(layer.name, result)
    return result


def _solve(layer: Layer, moments: Moments, run: Run) -> Solved:
    dense, centred = layer.matrix(run.store), layer.shift is not None
    damping = run.options.damping
    if damping is None:
        parts = moments.parts(dense, judged_rows(len(dense)), centred=centred)
        damping = _DEFAULT_DAMPING if parts is None else best_damping(*parts)
        del parts
    solution = solve(moments.whole(dense, centred=centred), run.pool, damping)
    valid, groups = valid_groups(solution.weights.reshape(layer.outputs, -1), 1)
    assert valid == groups, layer.label
    shift = moments.shift(solution.weights)
    return Solved(solution.weights, shift, solution.error, solution.magnitude_error, damping)
