"""Measure pruning on data: each layer's solver beside the linear algebra it cannot do without, and peak memory.

    python benchmarks/prune.py [--rounds 3] [--model MODEL.onnx] [--images 64] [--layers 6]

1. The solver: Hessian, mask and values of layers of several sizes, beside one accumulation of the Hessian, one Cholesky
   factor and one inverse in NumPy on as many cores. Interleaved; the bar is 4.
2. A whole model, by default the ResNeXt-101 of `benchmarks/resnext.py` with seeded images of 224x224: seconds per
   layer for some layers spread over its depth, and the peak of the process beside the model. The bar is 4 times the
   model plus the largest Hessian.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from resnext import resnext101
from threadpoolctl import threadpool_limits

from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision.calibration.data import data_of_samples
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.calibrate import workers
from repo_manager.pruning.moments import Moments
from repo_manager.pruning.solve import best_damping, judged_rows, solve

BAR = 4.0
PART = 512  # columns that arrive at a time
LAYERS = ((1024, 1024), (2304, 256), (1024, 256), (512, 2048), (576, 128))
"""(inputs, outputs), kernel counted: matrix products and convolutions of ResNeXt-101 and of a small Transformer."""

Array = NDArray[np.float32]


def columns_of(inputs: int, outputs: int) -> tuple[Array, Array, Array]:
    """Return correlated, half-dead inputs `[P, K]`, weights `[N, K]`, and their answers."""
    random = np.random.default_rng(inputs + outputs)
    count = max(8192, 8 * inputs)
    hidden = random.standard_normal((count, inputs // 2), np.float32)
    given = np.maximum(0, hidden @ random.standard_normal((inputs // 2, inputs), np.float32) / 8)
    weights = random.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
    return given, weights, given @ weights.T


def solved(given: Array, weights: Array, answers: Array) -> None:
    """The work of `prune` for one layer."""
    with workers(None) as (pool, _):
        moments = Moments(len(weights), weights.shape[1], pool)
        for place, start in enumerate(range(0, len(given), PART)):
            part = slice(start, start + PART)
            before = given[part] if moments.reads_dense_inputs else None
            moments.add(given[part].copy(), answers[part], before, judging=place % 4 == 3)
        parts = moments.parts(weights, judged_rows(len(weights)), centred=True)
        assert parts is not None
        solve(moments.whole(weights, centred=True), pool, best_damping(*parts))


def floor(given: Array) -> None:
    """The linear algebra alone, as NumPy does it."""
    with threadpool_limits(os.cpu_count()):
        hessian = np.zeros((given.shape[1], given.shape[1]))
        for start in range(0, len(given), PART):
            part = given[start : start + PART]
            hessian += part.T @ part
        hessian += 0.01 * hessian.diagonal().mean() * np.eye(len(hessian))
        np.linalg.cholesky(hessian)
        np.linalg.inv(hessian)


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare_layer(inputs: int, outputs: int, rounds: int) -> dict[str, object]:
    """Print the ratio of a layer's time and the floor's, median of interleaved rounds."""
    given, weights, answers = columns_of(inputs, outputs)
    pairs = [(seconds(lambda: solved(given, weights, answers)), seconds(lambda: floor(given))) for _ in range(rounds)]
    ratios = sorted(ours / other for ours, other in pairs)
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{inputs} x {outputs}: {ours:.2f} s against {other:.2f} s, ratio {statistics.median(ratios):.1f} "
        f"({ratios[0]:.1f} to {ratios[-1]:.1f}, {rounds} rounds), bar {BAR:g}",
        flush=True,
    )
    return {"layer": [inputs, outputs], "ours_s": ours, "floor_s": other, "ratio": statistics.median(ratios)}


def prune_some(path: Path, images: int, count: int) -> dict[str, object]:
    """Prune some layers of a model, spread over its depth; print seconds per layer and the peak of memory."""
    model = load_model(path)
    random, spec = np.random.default_rng(5), signature_of(model).inputs[0]
    shape = [size if isinstance(size, int) else 1 for size in spec.shape or ()]
    given = [{spec.name: random.standard_normal(shape, np.float32)} for _ in range(images)]
    data = data_of_samples(given, signature_of(model), "seeded images")
    eligible = [
        (node.name, weight)
        for node in model.graph_only.graph.node
        for weight in model.graph_only.graph.initializer
        if node.op_type == "Conv" and node.input[1] == weight.name and weight.dims[1] % 16 == 0
        and not any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    ]  # fmt: skip
    chosen = eligible[:: max(1, len(eligible) // count)][:count]
    columns = max(int(np.prod(weight.dims[1:])) for _, weight in chosen)
    began, times = time.perf_counter(), []

    def told(share: float, label: str) -> None:
        times.append((time.perf_counter() - began, share, label))

    watch = PeakWatch()
    _, report = prune_with_data(model, data, PruneOptions(layers=[name for name, _ in chosen]), told)
    took, peak = time.perf_counter() - began, watch.end()
    bar = BAR * model.size_bytes + 8 * columns**2
    print(
        f"{len(report.pruned)} of {len(eligible)} layers, {images} images: {took:.0f} s, {took / len(chosen):.1f} s "
        f"a layer, the runs through the model included; peak {peak / 2**20:.0f} MiB above the start, "
        f"{peak / model.size_bytes:.1f} times the model, bar {bar / 2**20:.0f} MiB"
    )
    errors = {layer.node: [layer.error, layer.magnitude_error] for layer in report.pruned}
    return {"seconds": took, "layers": errors, "peak_bytes": peak, "bar_bytes": bar, "told": times}


class PeakWatch:
    """The peak of the process's memory above its start."""

    def __init__(self) -> None:
        self.start = self.peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, resident_bytes())

    def end(self) -> int:
        """Return the peak, in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak - self.start


def resident_bytes() -> int:
    """Return the process's present memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run the benchmark; the model runs in a process of its own, for its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6, help="0 leaves the model out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-model", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_model:
        print(json.dumps(prune_some(given.model, given.images, given.layers)))
        return
    results: dict[str, object] = {"layers": [compare_layer(*sizes, given.rounds) for sizes in LAYERS]}
    with tempfile.TemporaryDirectory() as folder:
        path = given.model
        if path is None and given.layers:
            path = Path(folder) / "resnext101.onnx"
            onnx.save(resnext101(), path)
        if given.layers:
            told = ["--only-model", "--model", str(path), "--images", str(given.images), "--layers", str(given.layers)]
            ended = subprocess.run([sys.executable, __file__, *told], check=True, stdout=subprocess.PIPE, text=True)
            shown, _, document = ended.stdout.strip().rpartition("\n")
            print(shown)
            results["model"] = json.loads(document)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
