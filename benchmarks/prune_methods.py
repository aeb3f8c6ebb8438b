"""Compare `prune` with pruning by magnitude and with ModelOpt's SparseGPT, on samples unseen by all methods.

    python benchmarks/prune_methods.py MODEL.onnx DATA [--samples 64] [--seed 0]

A random part of the data (`--samples`) is calibrated on, and the rest judges. All methods prune the same layers.
ModelOpt prunes PyTorch modules: each layer of the graph becomes a `Conv2d` or a `Linear`, and the other nodes run as
`prune --distill` runs them. It needs PyTorch and nvidia-modelopt (`pip install --no-deps nvidia-modelopt`, with
huggingface_hub, regex and nvidia-ml-py, is enough). Without them that row is left out.

For each method: the relative error of the worst output against the dense model, the share of rows with the dense
model's top class along the last axis, and whether every weight is 2:4 along its input channels, as TensorRT wants it.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import save_model
from repo_manager.precision import load_calibration
from repo_manager.precision.calibration.data import data_of_samples
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.distill import Distiller
from repo_manager.pruning.torch_operators import OPERATORS
from repo_manager.sparsity import PruneReport, prune, sparsity_report
from repo_manager.sparsity.pattern import valid_groups

HAS_MODELOPT = all(importlib.util.find_spec(name) is not None for name in ("torch", "modelopt"))
if HAS_MODELOPT:
    import modelopt.torch.sparsity as mts
    import torch

Array = np.ndarray
Sample = Mapping[str, Array]
Runs = Callable[[Sample], Mapping[str, Array]]


def session_of(proto: onnx.ModelProto) -> Session:
    """Run a model in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(proto, path)
        return Session(path)


def judged(runs: Runs, rest: Sequence[Sample], answers: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
    """Return the worst output's relative error, and the share of rows with the same top class."""
    squares: dict[str, Array] = {}
    same = rows = 0
    for sample, answer in zip(rest, answers, strict=True):
        found = runs(sample)
        for name, wanted in answer.items():
            if wanted.dtype.kind != "f":
                continue
            gap, wanted = found[name].astype(np.float64) - wanted, wanted.astype(np.float64)
            squares[name] = squares.get(name, np.zeros(2)) + np.array([(gap**2).sum(), (wanted**2).sum()])
            if wanted.ndim > 1 and wanted.shape[-1] > 1:
                tops = found[name].argmax(-1) == wanted.argmax(-1)
                same, rows = same + int(tops.sum()), rows + tops.size
    return max(float(np.sqrt(error / size)) for error, size in squares.values()), same / rows if rows else float("nan")


def modelopt_pruned(model: Model, layers: set[str], given: Sequence[Sample]) -> tuple[Runs, str]:
    """Prune the same weights with ModelOpt. Return how the result runs, and how many weights are 2:4."""
    draft = draft_of(model)
    graph = Distiller(draft, str(model.path), [])

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleDict()
            for place, node in enumerate(graph.nodes):
                if len(node.input) > 1 and node.input[1] in layers:
                    self.layers[str(place)] = self.module_of(place)

        def module_of(self, place: int) -> torch.nn.Module:
            node, call = graph.nodes[place], graph.calls[place]
            weight = graph.constants[node.input[1]]
            if node.op_type == "Conv":
                steps, gaps = call.get("strides", [1, 1]), call.get("dilations", [1, 1])
                size = tuple(weight.shape[2:])
                made = torch.nn.Conv2d(weight.shape[1], len(weight), size, tuple(steps), 0, tuple(gaps), bias=False)
            else:
                weight = weight if node.op_type == "Gemm" and call.get("transB", 0) else weight.T
                made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            made.weight.data.copy_(weight)
            return made

        def forward(self, sample: Sample) -> dict[str, Any]:
            values = {**graph.constants, **{name: torch.from_numpy(np.array(value)) for name, value in sample.items()}}
            for place, (node, call) in enumerate(zip(graph.nodes, graph.calls, strict=True)):
                inputs = [values[name] if name else None for name in node.input]
                if str(place) not in self.layers:
                    found = OPERATORS[node.op_type](call, *inputs)
                elif node.op_type == "Conv":
                    size = inputs[1].shape[2:]
                    pads = call.pads(inputs[0], size, call.get("strides", [1, 1]), call.get("dilations", [1, 1]))
                    found = self.layers[str(place)](torch.nn.functional.pad(inputs[0], pads))
                else:
                    found = self.layers[str(place)](inputs[0])
                if str(place) in self.layers and len(inputs) > 2 and inputs[2] is not None:
                    bias = inputs[2].reshape(1, -1, 1, 1) if node.op_type == "Conv" else inputs[2]
                    found = found + bias
                values.update(zip(node.output, found if isinstance(found, tuple) else (found,), strict=False))
            return {value.name: values[value.name] for value in draft.graph.output}

    module = Module().eval()

    def forward_loop(pruned: Any) -> None:
        for sample in given:
            pruned(sample)

    with torch.no_grad():
        for name, value in Session(model.path).run(given[0]).items():
            np.testing.assert_allclose(
                module(given[0])[name].numpy(), value, rtol=1e-2, atol=1e-3 * np.abs(value).max()
            )
        module = mts.sparsify(module, "sparsegpt", {"forward_loop": forward_loop, "verbose": False, "device": "cpu"})
    pruned = [layer.weight.detach().numpy() for layer in module.layers.values()]
    valid = sum(len(set(valid_groups(weight, 1))) == 1 for weight in pruned)

    def runs(sample: Sample) -> Mapping[str, Array]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in module(sample).items()}

    return runs, f"{valid} of {len(pruned)} weights 2:4"


def valid_share(proto: onnx.ModelProto, report: PruneReport) -> str:
    """Count the pruned weights with 2:4 along the axis of the sum."""
    wanted = {layer.weight for layer in report.pruned}
    found = [layer for layer in sparsity_report(proto).layers if layer.weight in wanted]
    return f"{sum(str(layer.verdict) == 'valid' for layer in found)} of {len(found)} weights 2:4"


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", help="as for --calibration: more samples than --samples")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", action="append", default=[])
    given = parser.parse_args()
    model = load_model(given.model)
    every = list(load_calibration(given.data, signature_of(model)).batches())
    order = np.random.default_rng(given.seed).permutation(len(every))
    drawn, rest = [every[i] for i in order[: given.samples]], [every[i] for i in order[given.samples :]]
    dense = Session(model.path)
    answers = [dense.run(sample) for sample in rest]
    data = data_of_samples(drawn, signature_of(model), "drawn")
    ours, report = prune_with_data(model, data, PruneOptions(layers=tuple(given.layers)))
    by_magnitude, _ = prune(model, layers=[layer.weight for layer in report.pruned])
    methods = [
        ("magnitude", session_of(by_magnitude).run, valid_share(by_magnitude, report)),
        ("prune --calibration", session_of(ours).run, valid_share(ours, report)),
    ]
    if HAS_MODELOPT:
        methods.insert(1, ("ModelOpt SparseGPT", *modelopt_pruned(model, {x.weight for x in report.pruned}, drawn)))
    print(f"{len(report.pruned)} layers, {len(drawn)} samples to calibrate on, {len(rest)} to judge by")
    for name, runs, valid in methods:
        error, same = judged(runs, rest, answers)
        print(f"{name:20} relative error {error:.4f}, same top class {same:.2%}, {valid}")


if __name__ == "__main__":
    main()
