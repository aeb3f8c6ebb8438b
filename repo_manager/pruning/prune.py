"""Prune a model with calibration data, and measure and report its harm on held-out inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import CalibrationError, ModelError, UsageError
from repo_manager.files import work_folder
from repo_manager.onnx_model.draft import Weight
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.write import save_model
from repo_manager.optional import installed_version
from repo_manager.precision.calibration.data import MIN_TO_SPLIT, CalibrationData
from repo_manager.pruning.budget import FrontStep, gain_of
from repo_manager.pruning.calibrate import (
    Progress,
    Run,
    Solved,
    SolveOptions,
    by_magnitude,
    replacements,
    solve_layers,
    workers,
)
from repo_manager.pruning.distill import Teacher
from repo_manager.pruning.judge import Judge, Judgement, Metric
from repo_manager.pruning.layers import Layer, layer_of
from repo_manager.pruning.permute import permuted
from repo_manager.pruning.search import Tried, scaled, within_budget
from repo_manager.pruning.stream import Graph
from repo_manager.sparsity.pattern import nonzero
from repo_manager.sparsity.prune import Chosen, as_bytes, choose, skip
from repo_manager.sparsity.prune_report import (
    BudgetEvidence,
    DistillationEvidence,
    PermutationEvidence,
    PrunedLayer,
    PruneEvidence,
    PruneReport,
    SkippedLayer,
)
from repo_manager.sparsity.uses import Use
from repo_manager.sparsity.verdict import SMALL
from repo_manager.validation import check_range

__all__ = ["PruneOptions", "prune_with_data"]

Array = NDArray[Any]

_KEPT_AT_LEAST = 64 << 20  # bytes of activations and sums in memory, for every model size
_SAME = 1e-3  # share of an output's largest value: the effect of another order of sums, also in float16
_CHOOSING_EVERY = 3  # one of so many samples chooses, without the held-out ones
_TO_DISTIL = 0.5  # share of the progress before distillation
_ADVICE = (
    "Each layer was solved on calibration data, without retraining. Retraining with the masks fixed still gives more "
    "(NVIDIA's recipe: train dense, prune, train again with the same schedule)."
)


@dataclass(frozen=True)
class PruneOptions(SolveOptions):
    """The layers to prune, and how.

    Attributes:
        layers: shell patterns of node or weight names to prune. Empty is all.
        exclude: patterns of layers to leave dense. Wins over `layers`.
        all_valid: go beyond ASP's default sizes (outputs divide by 8, inputs by 16), and within a budget also prune
            layers TensorRT seldom runs faster.
        max_drift: the largest relative error of an output accepted: the largest set of layers is pruned whose drift on
            samples no layer was solved on is below it with 95 % confidence. `None`: all layers.
        metric: of the user, see `Metric`. The largest set of layers with a fall of at most `max_loss` is pruned.
        max_loss: how far the metric may fall.
        permute: let channels change places first, so large weights do not share a group of four, where producers
            absorb the change.
        distill: train the pruned weights afterwards, masks fixed, against the dense model's outputs. Needs PyTorch.
        epochs: how often each sample is trained on.
    """

    layers: Sequence[str] = ()
    exclude: Sequence[str] = ()
    all_valid: bool = False
    max_drift: float | None = None
    metric: Metric | None = None
    max_loss: float = 0.0
    permute: bool = False
    distill: bool = False
    epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("epochs", self.epochs, least=1)

    @property
    def has_budget(self) -> bool:
        """Whether layers are chosen within a budget."""
        return self.max_drift is not None or self.metric is not None

    @property
    def limit(self) -> float:
        """Of the drift, or of how far the metric may fall."""
        return self.max_loss if self.max_drift is None else self.max_drift


def prune_with_data(
    model: Model,
    data: CalibrationData,
    options: PruneOptions | None = None,
    progress: Progress = lambda _, __: None,
) -> tuple[onnx.ModelProto, PruneReport]:
    """Prune weights to 2:4 with the least change of the model's answers on real inputs.

    Layers are solved in the order of the data flow. Each is solved on its inputs behind the pruned layers, against the
    dense model's answers there. Mask and remaining values are found together (optimal brain surgeon for groups). The
    constant behind a layer takes up the change of its outputs' means. A quarter of the samples is held out to judge the
    result. With `max_drift`, another quarter chooses the layers.

    Args:
        model: the dense model, not changed. Its answers are the aim.
        data: representative inputs of the model.
        options: layers, budget and further settings. `None` takes the defaults.
        progress: called with the share done, 0 to 1, and the present layer or step in words.

    Returns:
        A new model in memory (external data loaded), and the report. Only values of weights and biases differ.

    Raises:
        CalibrationError: the samples are all the same, a value is not finite on one, the metric fails, or there are too
            few samples for `max_drift`.
        GateError: not even one layer stays within the budget.
        InputError: `PruneOptions.work` belongs to another run.
        ModelError: a pattern matches no layer, or ONNX Runtime does not run the model.
        UsageError: both `max_drift` and `metric`, or `distill` with one of them.
    """
    options = options or PruneOptions()
    data.require_variety()
    if options.permute:
        return _prune_permuted(model, data, options, progress)
    parts = _Parts.of(data, options)
    first = next(iter(data.batches()))
    shapes = {name: value.shape for name, value in first.items()}
    chosen = choose(model, layers=options.layers, exclude=options.exclude, all_valid=options.all_valid, shapes=shapes)
    graph = Graph.of(draft_of(model))
    layers = _layers_of(chosen, graph)
    if options.has_budget and not options.all_valid:
        layers = _worth_pruning(layers, chosen)
    keep_bytes = max(_KEPT_AT_LEAST, model.size_bytes // 2)
    with work_folder("repo-manager-prune-") as folder, workers(options.threads) as (pool, width):
        work = Path(folder)
        run = Run(model.digest, graph, model.weights, parts.solving, work, keep_bytes, options, pool, width)
        judge = Judge(model, parts.judging, work, options.metric)
        budget = distillation = None
        if options.has_budget and layers:
            chooser = Judge(model, parts.choosing or parts.judging, work, options.metric, "choose")
            tried, found, budget = within_budget(run, layers, options.limit, chooser, judge, chosen.macs, progress)
            constants = tried.constants
        else:
            tried, constants, distillation = _all_solved(run, model, layers, parts, progress)
            found = judge.measure(graph.draft, constants)
        for layer in (layer for layer in layers if layer not in tried.layers):
            chosen.skipped.append(SkippedLayer(layer.label, layer.name, "too much harm for its share of the work"))
        magnitude = judge.measure(graph.draft, {layer.name: by_magnitude(layer, run) for layer in tried.layers})
    report = _report(run, data, parts, chosen, tried, found, magnitude, budget)
    return _rebuilt(model, constants), report.with_distillation(distillation)


def _all_solved(
    run: Run, model: Model, layers: Sequence[Layer], parts: _Parts, progress: Progress
) -> tuple[Tried, dict[str, Weight], DistillationEvidence | None]:
    """Solve all layers, and train them if asked to. Return all changed constants, too."""
    options = run.options
    assert isinstance(options, PruneOptions)
    teacher = None
    if options.distill and layers and parts.choosing is not None:
        teacher = Teacher.of(run, model, parts.choosing, options.epochs)
    solved = solve_layers(run, layers, progress if teacher is None else scaled(progress, 0.0, _TO_DISTIL))
    changed = {x.name: replacements(x, solved[x.name], run.graph.draft.weights, run.store) for x in layers}
    tried = Tried(FrontStep((), 0.0, None, None, None), tuple(layers), solved, changed)
    if teacher is None:
        return tried, tried.constants, None
    told = scaled(progress, _TO_DISTIL, 1.0)
    return tried, *teacher.train(tried.constants, [layer.name for layer in layers], told)


def _report(
    run: Run,
    data: CalibrationData,
    parts: _Parts,
    chosen: Chosen,
    tried: Tried,
    found: Judgement,
    magnitude: Judgement,
    budget: BudgetEvidence | None,
) -> PruneReport:
    """Describe the pruned layers, the data, and the distance of the answers from the dense model's (`found`), and by
    magnitude."""
    records = tuple(_record(layer, tried.solved[layer.name], run) for layer in tried.layers)
    evidence = PruneEvidence(
        data=data.source,
        data_digest=data.digest,
        samples=parts.solving.count,
        judged_on="held-out" if parts.held_out else "calibration",
        judged_samples=parts.judging.count,
        drift=found.drift,
        magnitude_drift=magnitude.drift,
        macs=chosen.macs,
        sparse_macs=sum(record.macs or 0 for record in records),
        seed=run.options.seed,
        versions={name: installed_version(name) or "" for name in ("numpy", "onnxruntime")},
        drift_upper=found.upper if parts.held_out else None,
        budget=budget,
    )
    return PruneReport(run.model, records, tuple(chosen.skipped), _ADVICE, "second-order", evidence)


def _prune_permuted(
    model: Model, data: CalibrationData, options: PruneOptions, progress: Progress
) -> tuple[onnx.ModelProto, PruneReport]:
    """Permute channels, check the dense model's answers against those before, and prune the result."""
    chosen = choose(model, layers=options.layers, exclude=options.exclude, all_valid=options.all_valid)
    found = permuted(draft_of(model), [_stored_name(uses[0]) for uses in chosen.uses.values()], options.seed)
    with work_folder("repo-manager-permute-") as folder:
        path = Path(folder) / model.path.name
        save_model(_rebuilt(model, found.weights), path, external=True if model.external_files else None)
        other = load_model(path)
        difference = _largest_difference(model, other, next(iter(data.batches())))
        if not difference <= _SAME:
            raise ModelError(
                f"{model.path}: with its channels permuted the model answers otherwise, by {difference:.2g}",
                hint="Prune without permutation, and please report the model.",
            )
        proto, report = prune_with_data(other, data, replace(options, permute=False), progress)
    assert report.evidence is not None
    permutation = PermutationEvidence(
        found.channels, found.layers, found.kept_before, found.kept_after, largest_difference=difference
    )
    evidence = replace(report.evidence, permutation=permutation)
    return proto, replace(report, source=model.digest, evidence=evidence)


def _stored_name(use: Use) -> str:
    assert use.weight is not None
    return use.weight.name


def _largest_difference(model: Model, other: Model, sample: Mapping[str, Array]) -> float:
    before, after = Session(model).run(sample), Session(other).run(sample)
    largest = 0.0
    for name, value in before.items():
        if value.dtype.kind != "f":
            largest = max(largest, float((value != after[name]).mean()) if value.size else 0.0)
            continue
        size = float(np.abs(value).max(initial=0.0)) or 1.0
        largest = max(largest, float(np.abs(value - after[name]).max(initial=0.0)) / size)
    return largest


@dataclass(frozen=True)
class _Parts:
    """The use of each sample.

    Attributes:
        solving: layers are solved on these.
        choosing: layers are chosen by these. `None` without `max_drift`.
        judging: the result is judged on these.
        held_out: whether no layer was solved on those.
    """

    solving: CalibrationData
    choosing: CalibrationData | None
    judging: CalibrationData
    held_out: bool

    @classmethod
    def of(cls, data: CalibrationData, options: PruneOptions) -> _Parts:
        """Part the data: with `max_drift` a quarter chooses, and another one judges."""
        if options.max_drift is not None and options.metric is not None:
            raise UsageError("both a largest drift and a metric: one budget at a time")
        if options.distill and options.has_budget:
            raise UsageError(
                "distillation within a budget: each set of layers would have to be trained",
                hint="Find the layers within the budget first, then give them with --layers and --distill.",
            )
        split = data.split()
        if options.max_drift is None and not options.distill:
            return cls(*((split[0], None, split[1], True) if split else (data, None, data, False)))
        if split is None:
            raise CalibrationError(
                f"{data.source}: {data.count} samples, and {'distillation' if options.distill else 'a largest drift'} "
                f"needs {MIN_TO_SPLIT}: half to solve layers on, a quarter to choose by, a quarter to judge the result",
                hint=f"Give more samples, or prune without {'distillation' if options.distill else 'a largest drift'}.",
            )
        solving, choosing = split[0].without_one_in(_CHOOSING_EVERY)
        return cls(solving, choosing, split[1], True)


def _worth_pruning(layers: Sequence[Layer], chosen: Chosen) -> list[Layer]:
    """Return the layers TensorRT may run faster. The others are added to `chosen.skipped`.

    In a model whose work is mostly in small layers, all are returned.
    """
    large = [layer for layer in layers if min(layer.columns, layer.outputs) >= SMALL]
    if 2 * sum(map(gain_of, large)) < sum(map(gain_of, layers)):
        large = list(layers)
    else:
        for layer in (layer for layer in layers if layer not in large):
            reason = f"{layer.columns} inputs to {layer.outputs} outputs: below {SMALL}, seldom faster (TensorRT#3849)"
            chosen.skipped.append(SkippedLayer(layer.label, layer.name, reason))
    return large


def _layers_of(chosen: Chosen, graph: Graph) -> list[Layer]:
    """Return the solvable layers, in order. The others are added to `chosen.skipped`."""
    found: list[Layer] = []
    for uses in chosen.uses.values():
        layer = layer_of(uses, graph.draft, graph.readers)
        if isinstance(layer, str):
            chosen.skipped.extend(skip(use, layer) for use in uses)
        else:
            found.append(layer)
    return found


def _record(layer: Layer, solved: Solved, run: Run) -> PrunedLayer:
    before, after = layer.matrix(run.store), solved.matrix
    removed = nonzero(before) & ~nonzero(after)
    sizes = np.abs(before)
    total = float(sizes.sum(dtype=np.float64))
    return PrunedLayer(
        node=layer.label,
        weight=layer.name,
        shape=layer.weight.shape,
        axis=layer.axis,
        values=layer.weight.size,
        removed=int(np.count_nonzero(removed)),
        lost_magnitude=float(sizes[removed].sum(dtype=np.float64)) / total if total else 0.0,
        error=solved.error,
        magnitude_error=solved.magnitude_error,
        shifted=None if layer.shift is None else layer.shift.name,
        macs=layer.macs,
        damping=solved.damping,
    )


def _rebuilt(model: Model, changed: Mapping[str, Weight]) -> onnx.ModelProto:
    """Return the model as it was stored, with some constants of its main graph changed."""
    tensors = {tensor.name: tensor for tensor in model.graph_only.graph.initializer}
    for node in model.graph_only.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    kept = list(tensors_of(model.graph_only))  # kept alive: id() identifies each tensor
    places = {id(tensor): place for place, tensor in enumerate(kept)}
    wanted = {places[id(tensors[name])]: weight for name, weight in changed.items()}

    def replace(place: int, tensor: onnx.TensorProto) -> bytes | None:
        weight = wanted.get(place)
        if weight is None:
            return None
        if tuple(tensor.dims) != weight.shape:
            raise ModelError(f"{model.path}: tensor '{tensor.name}' has changed")
        return as_bytes(weight.load(), tensor.data_type)

    return model.rebuild(replace)
