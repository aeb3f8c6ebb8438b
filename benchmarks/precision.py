"""Time and peak memory of FP16 and INT8 conversion, beside NumPy's floor and ONNX Runtime's own converters.

    python benchmarks/precision.py MODEL.onnx [--rounds 3] [--samples 8] [--only fp16|int8]

Every variant runs in a process of its own, in turn (interleaved), so a busy machine affects all alike. The result is
the ratio within a round, shown with its spread over the rounds. MODEL.onnx: for instance `python benchmarks/resnext.py
resnext.onnx --sparse`.

    floor          onnx.load, NumPy astype(float16) of every float weight, onnx.save
    fp16-ort       onnxruntime.transformers.float16 (load, convert, save; nothing is checked)
    fp16-write     ours without the proof: load, convert, write
    fp16           ours with every check: what `repo-manager convert` does
    int8-ort       onnxruntime.quantization.quantize_static (QDQ, per channel; nothing is checked)
    int8-write     ours without the proof
    int8           ours with every check
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from repo_manager.onnx_model.inputs import find_sizes, natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision import ConvertOptions, convert
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.precision.candidate import Builder
from repo_manager.types import Precision

Inputs = list[dict[str, np.ndarray[Any, Any]]]


def samples_of(path: Path, count: int) -> Inputs:
    """Return seeded inputs the model accepts."""
    model = load_model(path)
    signature = signature_of(model)
    sizes = find_sizes(Session(path), signature)
    return [natural_inputs(signature, seed=seed, sizes=sizes) for seed in range(count)]


def floor(source: Path, target: Path, samples: Inputs) -> None:
    """Load, cast, save."""
    proto = onnx.load(source)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = onnx.numpy_helper.to_array(tensor).astype(np.float16).tobytes()
            tensor.data_type = onnx.TensorProto.FLOAT16
    onnx.save(proto, target)


def fp16_ort(source: Path, target: Path, samples: Inputs) -> None:
    """ONNX Runtime's FP16 converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def int8_ort(source: Path, target: Path, samples: Inputs) -> None:
    """ONNX Runtime's static quantizer, as FACTS and its own documentation advise it for TensorRT."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "QDQDisableWeightAdjustForInt32Bias": True,
    }
    quantize_static(
        str(source), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, extra_options=options
    )


def write_only(precision: Precision) -> Callable[[Path, Path, Inputs], None]:
    """Ours, without the proof."""

    def run(source: Path, target: Path, samples: Inputs) -> None:
        model = load_model(source)
        builder = Builder(draft_of(model), precision, ConvertOptions(), samples, target.parent)
        write_draft(builder.build().draft, target)

    return run


def whole(precision: Precision) -> Callable[[Path, Path, Inputs], None]:
    """Ours, with every check."""

    def run(source: Path, target: Path, samples: Inputs) -> None:
        model = load_model(source)
        data: CalibrationData | None = None
        if precision is Precision.INT8:
            data = data_of_samples(samples, signature_of(model), "seeded")
        convert(model, precision, target, calibration=data)

    return run


VARIANTS: dict[str, Callable[[Path, Path, Inputs], None]] = {
    "floor": floor,
    "fp16-ort": fp16_ort,
    "fp16-write": write_only(Precision.FP16),
    "fp16": whole(Precision.FP16),
    "int8-ort": int8_ort,
    "int8-write": write_only(Precision.INT8),
    "int8": whole(Precision.INT8),
}
REFERENCE = {"fp16": "floor", "int8": "int8-ort"}


def child(variant: str, source: Path, count: int) -> None:
    """Run one variant in this process and print its seconds and peak memory (bytes) as JSON."""
    samples = samples_of(source, count) if variant.startswith("int8") else []
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        started = time.perf_counter()
        VARIANTS[variant](source, Path(folder, "out.onnx"), samples)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def main() -> None:
    """Run all variants in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--only", choices=sorted(REFERENCE))
    parser.add_argument("--child", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model, options.samples)
        return
    names = [name for name in VARIANTS if options.only in (None, name.split("-")[0]) or name == REFERENCE[options.only]]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, str(options.model), "--samples", str(options.samples), "--child", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(output.strip().splitlines()[-1]))
    size = load_model(options.model).size_bytes
    print(f"{options.model.name}: {size / 1e6:.0f} MB, {options.rounds} rounds, {options.samples} calibration samples")
    print(f"{'variant':12} {'seconds':>9}  {'ratio (spread)':24} {'peak / model':>12}")
    for name, results in found.items():
        base = found[REFERENCE["int8" if name.startswith("int8") else "fp16"]]
        ratios = [r["seconds"] / b["seconds"] for r, b in zip(results, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        seconds = statistics.median(r["seconds"] for r in results)
        print(f"{name:12} {seconds:9.2f}  {spread:24} {max(r['peak_bytes'] for r in results) / size:12.2f}")


if __name__ == "__main__":
    main()
