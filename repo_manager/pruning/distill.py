"""Train a pruned graph against the dense model's answers, with its masks fixed.

The graph runs in PyTorch node by node, on unlabelled samples. Before that it is compared with ONNX Runtime: a graph
PyTorch computes differently is refused. Only stored values change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft, Weight, captured_names, opset_of, weight_of_array
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import write_draft
from repo_manager.optional import deferred, require
from repo_manager.precision.calibration.data import CalibrationData
from repo_manager.pruning.calibrate import Run
from repo_manager.pruning.judge import errors_by_sample, is_better, worst_drift
from repo_manager.pruning.stream import in_order
from repo_manager.pruning.torch_operators import OPERATORS, Tensor, TorchCall
from repo_manager.sparsity.prune_report import DistillationEvidence

if TYPE_CHECKING:
    import torch
else:
    torch = deferred("torch")

__all__ = ["Distiller", "Examples", "Teacher", "TrainingSettings"]

Array = NDArray[Any]

_SAME = 1e-3  # share of a value's largest element
_COMPARED = 4  # samples: the answer to a single one may be close to zero
_RATE = 1e-3  # share of a tensor's root mean square
_SLOWER = 0.25  # factor on the rate after a harmful epoch
_NEWEST = 0.1  # share of the last step in the running mean of the values; the mean is kept
_SAMPLES_A_STEP = 4
_WARM_UP = 8  # steps of growing rate
_TRAINED_INPUTS = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "BatchNormalization": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "Add": (0, 1),
}
"""The constants trained beside the pruned weights: biases and scales."""


@dataclass(frozen=True)
class Examples:
    """Samples, and the dense model's answers."""

    inputs: Sequence[Mapping[str, Array]]
    answers: Sequence[Mapping[str, Array]]

    @classmethod
    def of(cls, data: CalibrationData, session: Session) -> Examples:
        """Run the dense model on all samples.

        Args:
            data: samples to run. All inputs and answers stay in memory.
            session: runs the dense model. Its outputs become the answers.
        """
        inputs = list(data.batches())
        return cls(inputs, [session.run(sample) for sample in inputs])


@dataclass(frozen=True)
class TrainingSettings:
    """How a graph is trained.

    Attributes:
        epochs: how often each sample is trained on.
        seed: of the order of the samples.
        pool: where samples run. The result does not depend on it.
        width: how many samples at a time.
    """

    epochs: int
    seed: int
    pool: Executor
    width: int


@dataclass(frozen=True)
class Teacher:
    """The dense model's answers, and a graph to train towards them.

    Attributes:
        graph: the dense graph in PyTorch, checked against ONNX Runtime.
        training: samples the layers are solved on.
        choosing: samples to choose the epoch by.
        settings: learning rate, epochs and other settings of the training.
        largest_difference: between PyTorch and ONNX Runtime.
    """

    graph: Distiller
    training: Examples
    choosing: Examples
    settings: TrainingSettings
    largest_difference: float

    @classmethod
    def of(cls, run: Run, model: Model, choosing: CalibrationData, epochs: int) -> Teacher:
        """Run the dense model, and check that PyTorch computes it as ONNX Runtime does.

        Args:
            run: the dense graph and the samples to train on.
            model: the dense model: ONNX Runtime runs its file, and its constants may be trained.
            choosing: samples for the choice of the epoch.
            epochs: how often each sample is trained on.

        Raises:
            MissingDependencyError: PyTorch is not installed.
            ModelError: an operator is not known, or computes otherwise. The message names it.
        """
        trainable = {tensor.name for tensor in model.graph_only.graph.initializer}
        trainable.update(node.output[0] for node in model.graph_only.graph.node if node.op_type == "Constant")
        graph = Distiller(run.graph.draft, str(model.path), trainable)
        session = Session(model.path)
        training, others = Examples.of(run.samples, session), Examples.of(choosing, session)
        with one_thread():
            difference = graph.compare(training, run.folder)
        settings = TrainingSettings(epochs, run.options.seed, run.pool, run.width)
        return cls(graph, training, others, settings, difference)

    def train(
        self, pruned: Mapping[str, Weight], masked: Collection[str], progress: Callable[[float, str], None]
    ) -> tuple[dict[str, Weight], DistillationEvidence]:
        """Train the constants changed by pruning.

        Args:
            pruned: all constants changed by pruning, by name.
            masked: names of those whose zeros stay.
            progress: called with the share done and a label.
        """

        def told(epoch: int) -> None:
            progress((epoch - 1) / self.settings.epochs, f"distilling, epoch {epoch} of {self.settings.epochs}")

        with one_thread():
            found, evidence = self.graph.train(pruned, masked, self.training, self.choosing, self.settings, told)
        return found, replace(evidence, largest_difference=self.largest_difference)


class Distiller:
    """A graph in PyTorch.

    Args:
        draft: the dense model. Each of its operators has to be in `OPERATORS`.
        where: names the model in errors.
        trainable: names of the constants free to change.

    Raises:
        MissingDependencyError: PyTorch is not installed.
        ModelError: an operator is not known here; the message names it.
    """

    def __init__(self, draft: Draft, where: str, trainable: Collection[str]) -> None:
        require("torch")
        self.draft, self.where, self.trainable = draft, where, trainable
        self.nodes = list(draft.graph.node)
        opset = opset_of(draft.proto)
        for node in self.nodes:
            if node.domain not in ONNX_DOMAINS or node.op_type not in OPERATORS or any(captured_names(node)):
                raise self._refusal(node, "PyTorch has no equivalent here")
        self.calls = [
            TorchCall(
                {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}, opset, len(node.output)
            )
            for node in self.nodes
        ]
        self.constants = {
            name: torch.from_numpy(np.array(weight.load()))
            for name, weight in draft.weights.items()
            if weight.tensor is None
        }
        last = {name: place for place, node in enumerate(self.nodes) for name in node.input}
        kept = {value.name for value in draft.graph.output}
        self.ends: list[list[str]] = [[] for _ in self.nodes]
        for name, place in last.items():
            if name and name not in kept and name not in self.constants:
                self.ends[place].append(name)

    def _refusal(self, node: onnx.NodeProto, why: str) -> ModelError:
        kind = node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}.{node.op_type}"
        return ModelError(
            f"{self.where}: cannot distil operator {kind} (node '{node.name or node.output[0]}'): {why}",
            hint="Prune without --distill.",
        )

    def run(self, sample: Mapping[str, Array], trained: Mapping[str, Tensor], *, all_values: bool = False) -> Any:
        """Return the outputs, or all values, of the graph on one sample.

        Args:
            sample: arrays by name of the input.
            trained: constants in place of the dense model's, by name.
            all_values: also return values inside the graph.
        """
        values: dict[str, Tensor] = {**self.constants, **trained}
        values.update((name, torch.from_numpy(np.array(value))) for name, value in sample.items())
        for node, call, ends in zip(self.nodes, self.calls, self.ends, strict=True):
            inputs = [values[name] if name else None for name in node.input]
            try:
                found = OPERATORS[node.op_type](call, *inputs)
            except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as exc:
                raise self._refusal(node, str(exc).splitlines()[0] if str(exc) else type(exc).__name__) from exc
            values.update(zip(node.output, found if isinstance(found, tuple) else (found,), strict=False))
            if not all_values:
                for name in ends:
                    values.pop(name, None)
        return values if all_values else {value.name: values[value.name] for value in self.draft.graph.output}

    def compare(self, examples: Examples, folder: Path) -> float:
        """Check that PyTorch computes the dense graph as ONNX Runtime does.

        Args:
            examples: the first of these are compared.
            folder: for a temporary model, written only where answers differ, and removed again.

        Returns:
            The largest difference of an output, as a share of its largest value.

        Raises:
            ModelError: they differ. The message names the first differing operator.
        """
        pairs = list(zip(examples.inputs, examples.answers, strict=True))[:_COMPARED]
        sizes = {name: max(_size(answer[name]) for _, answer in pairs) for name in pairs[0][1]}
        largest, worst = -1.0, pairs[0][0]
        with torch.no_grad():
            for sample, answer in pairs:
                found = self.run(sample, {})
                for name, value in answer.items():
                    difference = _difference(found[name].numpy(), value, sizes[name])
                    largest, worst = (difference, sample) if difference > largest else (largest, worst)
            if largest <= _SAME:
                return max(largest, 0.0)
            sample = worst
            values = self.run(sample, {}, all_values=True)
        path = folder / "compared.onnx"
        probe = self.draft.copy()
        del probe.graph.output[:]
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for node in self.nodes for name in node.output if name)
        written = write_draft(probe, path)
        real = Session(path, optimize=False).run(sample)
        for file in written.files:
            file.unlink()
        for node in self.nodes:
            for name in (name for name in node.output if name):
                if name in values and _difference(values[name].numpy(), real[name], _size(real[name])) > _SAME:
                    raise self._refusal(node, f"PyTorch computes '{name}' otherwise than ONNX Runtime")
        raise ModelError(f"{self.where}: PyTorch answers otherwise than ONNX Runtime, by {largest:.2g}")

    def train(
        self,
        pruned: Mapping[str, Weight],
        masked: Collection[str],
        training: Examples,
        choosing: Examples,
        settings: TrainingSettings,
        progress: Callable[[int], None],
    ) -> tuple[dict[str, Weight], DistillationEvidence]:
        """Train, and return the constants of the epoch with the best result on samples outside the training.

        Args:
            pruned: all constants changed by pruning, by name.
            masked: names of those trained only outside their zeros.
            training: samples with the dense model's answers. Each epoch takes all, in random order.
            choosing: examples to choose the epoch by.
            settings: learning rate, epochs and other settings of the training.
            progress: told the number of each epoch before it begins.
        """
        start = {name: self._tensor(pruned.get(name, self.draft.weights[name])) for name in self._trained(pruned)}
        masks = {name: (start[name] != 0).float() for name in masked}
        values = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        sizes = {name: max(float(tensor.square().mean().sqrt()), 1e-6) for name, tensor in start.items()}
        best, mean = ({name: tensor.clone() for name, tensor in start.items()} for _ in range(2))
        errors = [self.errors(choosing, self._used(values, masks))]
        kept, random, done, rate = 0, np.random.default_rng(settings.seed), 0, _RATE
        energies = _energies(training.answers)
        optimizer = _optimizer(values, sizes)

        def gradients(place: int) -> tuple[Tensor, ...]:
            found = self.run(training.inputs[place], self._used(values, masks))
            loss = _loss(found, training.answers[place], energies)
            return tuple(torch.autograd.grad(loss, list(values.values()), allow_unused=True))

        for epoch in range(1, settings.epochs + 1):
            progress(epoch)
            order = [int(place) for place in random.permutation(len(training.inputs))]
            for first in range(0, len(order), _SAMPLES_A_STEP):
                lot = order[first : first + _SAMPLES_A_STEP]
                optimizer.zero_grad()
                found = in_order(gradients, lot, settings.pool, settings.width)
                _add_up(values.values(), found, len(lot))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"] * min(1.0, (done + 1) / _WARM_UP)
                optimizer.step()
                done += 1
                for name, tensor in values.items():
                    mean[name].lerp_(tensor.detach(), max(_NEWEST, 1 / (done + 1)))
            errors.append(self.errors(choosing, self._used(mean, masks)))
            if worst_drift(errors[-1]) < worst_drift(errors[kept]):
                kept, best = epoch, {name: tensor.clone() for name, tensor in mean.items()}
                continue
            rate, done, optimizer = rate * _SLOWER, 0, _optimizer(values, sizes)
            for copies in (values, mean):  # the rate was too high: restart from the best values
                _set(copies, best)
        if not is_better(errors[0], errors[kept]):
            kept = 0
        counts, worst = (len(training.inputs), len(choosing.inputs)), tuple(map(worst_drift, errors))
        evidence = DistillationEvidence(settings.epochs, kept, *counts, errors=worst, trained=len(values))
        return self._constants(best, masks) if kept else dict(pruned), evidence

    def errors(self, examples: Examples, trained: Mapping[str, Tensor]) -> dict[str, list[tuple[float, float]]]:
        """Return each sample's squared error and squared size, by output, as `errors_by_sample`.

        Args:
            examples: samples with the answers of the dense model.
            trained: constants in place of the dense model's, by name.
        """
        pairs = zip(examples.inputs, examples.answers, strict=True)
        with torch.no_grad():
            found = (
                ({name: value.numpy() for name, value in self.run(sample, trained).items()}, answer)
                for sample, answer in pairs
            )
            return errors_by_sample(found, [value.name for value in self.draft.graph.output])

    def _trained(self, pruned: Mapping[str, Weight]) -> list[str]:
        """Return the constants to train: those changed by pruning, and biases and scales."""
        names = list(pruned)
        for node in self.nodes:
            for place in _TRAINED_INPUTS.get(node.op_type, ()):
                name = node.input[place] if place < len(node.input) else ""
                if name not in self.trainable or name not in self.constants:
                    continue
                if self.constants[name].is_floating_point() and self.constants[name].ndim:
                    names.append(name)
        return list(dict.fromkeys(names))

    def _tensor(self, weight: Weight) -> Tensor:
        return torch.from_numpy(np.array(weight.load())).float()

    def _used(self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained constants as the graph reads them: masked, in their stored type."""
        return {
            name: (value * masks[name] if name in masks else value).to(self.constants[name].dtype)
            for name, value in values.items()
        }

    def _constants(self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Weight]:
        used = self._used(values, masks)
        return {
            name: weight_of_array(
                np.asarray(value.numpy() + value.numpy().dtype.type(0)), self.draft.weights[name].data_type
            )
            for name, value in used.items()
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread for each sample, so no result depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _add_up(values: Collection[Tensor], found: Iterator[tuple[Tensor, ...]], count: int) -> None:
    """Give each value the mean of its gradients, summed in the order of the samples."""
    for gradients in found:
        for value, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                value.grad = gradient / count if value.grad is None else value.grad + gradient / count


def _set(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in values.items():
            tensor.copy_(wanted[name])


def _optimizer(values: Mapping[str, Tensor], sizes: Mapping[str, float]) -> Any:
    return torch.optim.Adam([{"params": [values[name]], "size": sizes[name]} for name in values])


def _energies(answers: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return the mean squared size of each floating-point output."""
    names = [name for name, value in answers[0].items() if value.dtype.kind == "f"]
    return {
        name: max(float(np.mean([(answer[name].astype(np.float64) ** 2).sum() for answer in answers])), 1e-12)
        for name in names
    }


def _loss(found: Mapping[str, Tensor], answer: Mapping[str, Array], energies: Mapping[str, float]) -> Tensor:
    """Return the squared errors of the outputs, each as a share of its mean size, summed."""
    total: Any = 0.0
    for name, energy in energies.items():
        if found[name].requires_grad:
            wanted = torch.from_numpy(np.array(answer[name])).float()
            total = total + (found[name].float() - wanted).square().sum() / energy
    return total


def _size(value: Array) -> float:
    """Return the largest finite magnitude of a value."""
    if value.dtype.kind != "f":
        return 1.0
    return float(np.abs(value[np.isfinite(value)]).max(initial=0.0))


def _difference(found: Array, wanted: Array, size: float) -> float:
    """Return the largest difference as a share of `size`, or the share of differing elements."""
    if found.shape != wanted.shape:
        return math.inf
    if wanted.dtype.kind != "f":
        return float((found != wanted).mean()) if wanted.size else 0.0
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(found)):
        return math.inf
    gap = np.abs(found[finite].astype(np.float64) - wanted[finite]).max(initial=0.0)
    return float(gap) / (size or 1.0)
