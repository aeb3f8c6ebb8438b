"""What `add --backend tensorrt_rtx` costs above its parts, called by hand: load, convert, build.

The build by hand is the library's own API and nothing of ours: parse, one profile, build, write.

    python benchmarks/engine.py [MODEL.onnx] [--precision fp16] [--runs 5] [--json FILE]

Without a model: a generated ResNeXt-101 32x8d (355 MB), in a temporary folder. Needs no GPU. Bar: at most
15 % more (medians, interleaved, after a pair that does not count); ends with 1 when it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import require
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.precision import convert
from repo_manager.types import Precision

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from models import MODELS

BATCH = 8
BAR = 0.15


def build_by_hand(library: ModuleType, model: Path, output: Path) -> None:
    """Build an engine with the library's API."""
    logger = library.Logger(library.Logger.ERROR)
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise SystemExit(f"{model}: not parsed")
    config = builder.create_builder_config()
    config.set_flag(library.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [1 if size == -1 else size for size in tensor.shape]
        high = [BATCH, *shape[1:]]
        profile.set_shape(tensor.name, shape, high, high)
    config.add_optimization_profile(profile)
    output.write_bytes(memoryview(builder.build_serialized_network(network, config)))


def parts(path: Path, precision: Precision, folder: Path) -> dict[str, float]:
    """Time load, convert and build by hand, in seconds."""
    library = require("tensorrt_rtx")
    start = time.perf_counter()
    model = load_model(path)
    signature_of(model)
    loaded = time.perf_counter()
    convert(model, precision, folder / "model.onnx")
    converted = time.perf_counter()
    build_by_hand(library, folder / "model.onnx", folder / "model.engine")
    built = time.perf_counter()
    return {"load_s": loaded - start, "convert_s": converted - loaded, "build_s": built - converted}


def whole(path: Path, precision: Precision, folder: Path) -> float:
    """Time `add`, in seconds."""
    start = time.perf_counter()
    add(path, "model", folder / "repository", AddOptions(precision=precision, backend="tensorrt_rtx"))
    return time.perf_counter() - start


def measure(path: Path, precision: Precision, runs: int, root: Path) -> tuple[list[dict[str, float]], list[float]]:
    """Run parts and whole in turn, each first every other time, after one uncounted run of both."""
    by_hand, ours = [], []
    for number in range(runs + 1):
        for what in ("parts", "whole") if number % 2 else ("whole", "parts"):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                if what == "parts":
                    by_hand.append(parts(path, precision, Path(folder)))
                else:
                    ours.append(whole(path, precision, Path(folder)))
    return by_hand[1:], ours[1:]


def report(path: Path, precision: Precision, by_hand: list[dict[str, float]], ours: list[float]) -> dict[str, Any]:
    """Compare the medians. The spread is over the pairs of neighbours."""
    totals = [sum(run.values()) for run in by_hand]
    overhead = statistics.median(ours) / statistics.median(totals) - 1
    pairs = sorted(whole_s / total - 1 for whole_s, total in zip(ours, totals, strict=True))
    return {
        "model": path.name,
        "size_bytes": path.stat().st_size,
        "precision": str(precision),
        "builder": require("tensorrt_rtx").__version__,
        "machine": f"{platform.platform()}, {len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}",
        "parts": {name: statistics.median(run[name] for run in by_hand) for name in by_hand[0]},
        "parts_s": statistics.median(totals),
        "add_s": statistics.median(ours),
        "overhead": overhead,
        "overhead_spread": [pairs[0], pairs[-1]],
        "bar": BAR,
        "verdict": "within the bar" if overhead <= BAR else "over the bar",
        "runs": {"parts": by_hand, "add_s": ours},
    }


def main() -> None:
    """Read the command line, measure, and end with 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--precision", type=Precision, default=Precision.FP16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        path = options.model
        if path is None:
            path = Path(root, "resnext101.onnx")
            onnx.save(MODELS["resnext101_32x8d"](), path)
        by_hand, ours = measure(path, options.precision, options.runs, Path(root))
        result = report(path, options.precision, by_hand, ours)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    raise SystemExit(0 if result["overhead"] <= BAR else 1)


if __name__ == "__main__":
    main()
