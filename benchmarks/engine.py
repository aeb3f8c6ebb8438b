"""What `add --backend tensorrt_rtx` costs above its parts, called by hand: load, convert, build.

The build by hand is the library's own API and nothing of ours: parse, one profile, build, write.

    python benchmarks/engine.py [MODEL.onnx] [--precision fp16] [--runs 3] [--json FILE]

Without a model: a generated ResNeXt-101 32x8d (355 MB), in a temporary folder. Needs no GPU. Bar: at most 15 % more.
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

import onnx

from repo_manager.onnx_model import load_model, signature_of
from repo_manager.optional import require
from repo_manager.pipeline import AddOptions, add
from repo_manager.precision import convert
from repo_manager.types import Precision

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from models import MODELS

BATCH = 8


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


def main() -> None:
    """Run parts and whole alternately and compare the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--precision", type=Precision, default=Precision.FP16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        path = options.model
        if path is None:
            path = Path(root, "resnext101.onnx")
            onnx.save(MODELS["resnext101_32x8d"](), path)
        by_hand, ours = [], []
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                by_hand.append(parts(path, options.precision, Path(folder)))
            with tempfile.TemporaryDirectory(dir=root) as folder:
                ours.append(whole(path, options.precision, Path(folder)))
        size_bytes = path.stat().st_size
    medians = {name: statistics.median(run[name] for run in by_hand) for name in by_hand[0]}
    total = statistics.median(sum(run.values()) for run in by_hand)
    result = {
        "model": path.name,
        "size_bytes": size_bytes,
        "precision": str(options.precision),
        "builder": require("tensorrt_rtx").__version__,
        "machine": f"{platform.platform()}, {len(os.sched_getaffinity(0))} CPUs",
        "parts": medians,
        "parts_s": total,
        "add_s": statistics.median(ours),
        "overhead": statistics.median(ours) / total - 1,
        "runs": {"parts": by_hand, "add_s": ours},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
