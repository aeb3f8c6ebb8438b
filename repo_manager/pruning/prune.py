"""Prune a model with calibration data, measure what it cost on inputs that were held out, and say so."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import Draft, Weight, weight_of_array
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.write import write_draft
from repo_manager.optional import installed_version
from repo_manager.precision.calibration.data import CalibrationData
from repo_manager.pruning.calibrate import Progress, Run, Solved, SolveOptions, replacements, solve_layers, workers
from repo_manager.pruning.layers import Layer, layer_of
from repo_manager.pruning.stream import Graph
from repo_manager.sparsity.pattern import magnitude_prune, nonzero
from repo_manager.sparsity.prune import Chosen, PrunedLayer, PruneEvidence, PruneReport, as_bytes, choose, skip
from repo_manager.stats.drift import DriftMeter, OutputDrift

__all__ = ["PruneOptions", "prune_with_data"]

Array = NDArray[Any]

_KEPT_AT_LEAST = 64 << 20  # bytes of activations and sums in memory, whatever the model's size
_ADVICE = (
    "Each layer was solved on calibration data, without retraining. Retraining with the masks fixed still gives more "
    "(examples/train_sparse_digits.py shows NVIDIA's recipe)."
)


@dataclass(frozen=True)
class PruneOptions(SolveOptions):
    """Which layers are pruned, and how.

    Attributes:
        layers: shell patterns of node or weight names to prune; empty is all.
        exclude: patterns of those that stay dense; wins over `layers`.
        all_valid: go beyond ASP's default sizes (outputs divide by 8, inputs by 16).
    """

    layers: Sequence[str] = ()
    exclude: Sequence[str] = ()
    all_valid: bool = False


def prune_with_data(
    model: Model,
    data: CalibrationData,
    options: PruneOptions | None = None,
    progress: Progress = lambda _, __: None,
) -> tuple[onnx.ModelProto, PruneReport]:
    """Prune weights to 2:4 so that the model's answers on real inputs change least.

    Layers are solved in the order of the data's way through the model, each on what it sees behind the pruned ones and
    against what the dense model answers there: mask and remaining values together (optimal brain surgeon for groups),
    and the constant behind it takes up the change of its outputs' means. Every fourth sample is held out and judges.

    Args:
        model: the model; not changed.
        data: representative inputs.
        options: `None` takes the defaults.
        progress: told before each layer.

    Returns:
        A new model in memory (external data loaded), and the report. Only values of weights and biases differ.

    Raises:
        CalibrationError: a value is not finite on a sample.
        InputError: `PruneOptions.work` belongs to another run.
        ModelError: a pattern matches no layer, or ONNX Runtime does not run the model.
    """
    options = options or PruneOptions()
    first = next(iter(data.batches()))
    shapes = {name: value.shape for name, value in first.items()}
    chosen = choose(model, layers=options.layers, exclude=options.exclude, all_valid=options.all_valid, shapes=shapes)
    graph = Graph.of(draft_of(model))
    found = _layers_of(chosen, graph)
    split = data.split()
    calibration, held_out = split if split is not None else (data, data)
    keep_bytes = max(_KEPT_AT_LEAST, model.size_bytes // 2)
    with tempfile.TemporaryDirectory(prefix="repo-manager-prune-") as folder, workers(options.threads) as (pool, width):
        run = Run(graph, model.weights, calibration, Path(folder), keep_bytes, options, pool, width)
        solved = solve_layers(run, [layer for layer, _ in found.values()], progress)
        judge = _Judge(model, held_out, Path(folder))
        changed: dict[str, Weight] = {}
        for layer, _ in found.values():
            changed.update(replacements(layer, solved[layer.name], graph.draft.weights, model.weights))
        drift = judge.drift(graph.draft, changed)
        magnitude = judge.drift(graph.draft, {layer.name: _by_magnitude(layer, run) for layer, _ in found.values()})
    records = tuple(_record(layer, solved[layer.name], changed, model) for layer, _ in found.values())
    evidence = PruneEvidence(
        data=data.source,
        data_digest=data.digest,
        samples=calibration.count,
        judged_on="calibration" if split is None else "held-out",
        judged_samples=held_out.count,
        drift=drift,
        magnitude_drift=magnitude,
        macs=chosen.macs,
        sparse_macs=sum(record.macs or 0 for record in records),
        seed=options.seed,
        versions={name: installed_version(name) or "" for name in ("numpy", "onnxruntime")},
    )
    report = PruneReport(model.digest, records, tuple(chosen.skipped), _ADVICE, "second-order", evidence)
    return _rebuilt(model, changed), report


def _layers_of(chosen: Chosen, graph: Graph) -> dict[int, tuple[Layer, int]]:
    """Return the layers that can be solved, in order; the others are added to `chosen.skipped`."""
    found: dict[int, tuple[Layer, int]] = {}
    for place, uses in chosen.uses.items():
        layer = layer_of(uses, graph.draft, graph.readers)
        if isinstance(layer, str):
            chosen.skipped.extend(skip(use, layer) for use in uses)
        else:
            found[place] = (layer, place)
    return found


def _by_magnitude(layer: Layer, run: Run) -> Weight:
    matrix = layer.matrix(run.store)
    pruned, _, _ = magnitude_prune(matrix, 1)
    return weight_of_array(layer.stored(pruned, run.store), run.graph.draft.weights[layer.name].data_type)


def _record(layer: Layer, solved: Solved, changed: Mapping[str, Weight], model: Model) -> PrunedLayer:
    before, after = layer.matrix(model.weights), solved.matrix
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


class _Judge:
    """Compares models with the dense one on the same inputs."""

    def __init__(self, model: Model, data: CalibrationData, folder: Path) -> None:
        self.data, self.folder = data, folder
        session = Session(model.path)
        self.names = session.output_names
        self.answers = [session.run(sample) for sample in data.batches()]

    def drift(self, draft: Draft, changed: Mapping[str, Weight]) -> tuple[OutputDrift, ...]:
        """Return the drift of a draft with some constants changed."""
        path = self.folder / "judged.onnx"
        written = write_draft(Draft(draft.proto, {**draft.weights, **changed}), path)
        session, meter = Session(path), DriftMeter(self.names)
        for sample, answer in zip(self.data.batches(), self.answers, strict=True):
            meter.add(session.run(sample), answer)
        for file in written.files:
            file.unlink()
        return meter.result()


def _rebuilt(model: Model, changed: Mapping[str, Weight]) -> onnx.ModelProto:
    """Return the model as it was stored, with some constants of its main graph changed."""
    tensors = {tensor.name: tensor for tensor in model.graph_only.graph.initializer}
    for node in model.graph_only.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    kept = list(tensors_of(model.graph_only))  # alive: they are told apart by identity
    places = {id(tensor): place for place, tensor in enumerate(kept)}
    wanted = {places[id(tensors[name])]: weight for name, weight in changed.items()}

    def replace(place: int, tensor: onnx.TensorProto) -> bytes | None:
        weight = wanted.get(place)
        if weight is None:
            return None
        if tuple(tensor.dims) != weight.shape:
            raise ModelError(f"{model.path}: tensor '{tensor.name}' is not what it was")
        return as_bytes(weight.load(), tensor.data_type)

    return model.rebuild(replace)
