"""Measure the 2:4 test, inspect and prune beside the NumPy floor, onnx.load and polygraphy, in one run.

    python benchmarks/sparsity.py [--model MODEL.onnx] [--rounds 7] [--polygraphy /path/to/venv/bin/polygraphy]

Without `--model` the ResNeXt-101 of `benchmarks/resnext.py` is made. The sides of a comparison are interleaved
round by round; a ratio is the median of the rounds' ratios, with the smallest and the largest. polygraphy runs
once: it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from resnext import resnext101

from repo_manager.onnx_model.model import load_model, parameter_count
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.sparsity import prune, sparsity_report
from repo_manager.sparsity.pattern import count_groups


def seconds(action: Callable[[], object]) -> float:
    """Time one call; its result is dropped within the time, as a caller would."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare(
    name: str, ours: Callable[[], object], other: Callable[[], object], rounds: int, budget: float
) -> dict[str, object]:
    """Time two sides in turns and print the ratio ours / other."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    result = {
        "name": name,
        "ours_s": statistics.median(a for a, _ in pairs),
        "other_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "budget": budget,
        "rounds": rounds,
    }
    print(
        f"{name}: {result['ours_s']:.3f} s against {result['other_s']:.3f} s, ratio {result['ratio']:.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} rounds), budget {budget:g}",
        flush=True,
    )
    return result


def weights_of(path: Path) -> list[np.ndarray]:
    """The weights of Conv and Gemm (transB) alone: those read by the 2:4 test of a ResNeXt."""
    proto = onnx.load(path)
    used = {node.input[1] for node in proto.graph.node if node.op_type in ("Conv", "Gemm")}
    arrays = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name in used]
    return [np.array(array) for array in arrays]


def compare_pattern_test(path: Path, rounds: int) -> dict[str, object]:
    """The 2:4 test of all weights in memory, beside one sum over the same bytes."""
    arrays = [array for array in weights_of(path) if array.shape[1] % 4 == 0]
    name = "2:4 test of all weights / np.sum of them"
    return compare(name, lambda: [count_groups(a, 1) for a in arrays], lambda: [np.sum(a) for a in arrays], rounds, 3)


def compare_polygraphy(polygraphy: Path, path: Path, output: Path) -> list[dict[str, object]]:
    """Polygraphy's two commands, once each, beside the median of three of ours."""
    theirs = output.with_name("polygraphy.onnx")
    command = [str(polygraphy), "surgeon", "prune", str(path), "-o", str(theirs)]
    took = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    ours = statistics.median(seconds(lambda: prune_file(path, output)) for _ in range(3))
    same, pairs = same_masks(output, theirs)
    print(f"prune: polygraphy {took:.1f} s / ours {ours:.2f} s = {took / ours:.0f} (at least 25)")
    print(f"same weights afterwards: {same} of {pairs} without groups")
    results: list[dict[str, object]] = [
        {"name": "polygraphy prune / ours", "ratio": took / ours, "same": same, "of": pairs}
    ]
    command = [str(polygraphy), "inspect", "sparsity", str(path)]
    took = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    ours = statistics.median(seconds(lambda: inspect(path)) for _ in range(3))
    print(f"inspect: polygraphy {took:.1f} s / ours {ours:.2f} s = {took / ours:.0f}")
    return [*results, {"name": "polygraphy inspect sparsity / ours", "ratio": took / ours}]


def inspect(path: Path) -> None:
    """The work of the inspect command, without the printing."""
    model = load_model(path)
    signature_of(model), parameter_count(model), sparsity_report(model)


def prune_file(path: Path, output: Path) -> None:
    """The work of the prune command."""
    proto, _ = prune(load_model(path), all_valid=True)
    save_model(proto, output)


def same_masks(ours: Path, theirs: Path) -> tuple[int, int]:
    """Compare pruned weights of convolutions without groups and of Gemm: (identical, all)."""
    left, right = onnx.load(ours), onnx.load(theirs)
    grouped = {n.input[1] for n in left.graph.node for a in n.attribute if a.name == "group" and a.i > 1}
    plain = {n.input[1] for n in left.graph.node if n.op_type in ("Conv", "Gemm")} - grouped
    other = {tensor.name: tensor for tensor in right.graph.initializer}
    pairs = [(t, other[t.name]) for t in left.graph.initializer if t.name in plain]
    same = sum(np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b)) for a, b in pairs)
    return same, len(pairs)


def main() -> None:
    """Run all comparisons and print one line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--polygraphy", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.model or Path(scratch) / "resnext101.onnx"
        if options.model is None:
            path.write_bytes(resnext101().SerializeToString())
        size = path.stat().st_size
        print(
            f"{path.name}: {size / 1e6:.0f} MB; {os.cpu_count()} CPUs, NumPy {np.__version__}, onnx {onnx.__version__}"
        )
        results = [compare_pattern_test(path, options.rounds)]
        results.append(
            compare("inspect / onnx.load", lambda: inspect(path), lambda: onnx.load(path), options.rounds, 2)
        )
        output = Path(scratch) / "pruned.onnx"
        copied = Path(scratch) / "copied.onnx"

        def floor() -> None:
            onnx.save(onnx.load(path), copied)

        results.append(compare("prune / onnx.load and save", lambda: prune_file(path, output), floor, 3, float("nan")))
        if options.polygraphy is not None:
            results += compare_polygraphy(options.polygraphy, path, output)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / size
        print(f"peak memory of this script: {peak:.1f} times the model")
        print(json.dumps(results), file=sys.stderr)


if __name__ == "__main__":
    main()
