"""`tune` against the exhaustive grid of the same settings, measured in the same way.

    python benchmarks/tune.py [--models NAME ...] [--runs 3] [--budget 300] [--json FILE]

Five models, made here: a tiny MLP, a CNN of about a millisecond, a CNN of about twenty, one whose single request gains
from threads, and one that gains from instances only (a long chain of small products). Each is published with one
instance, batches of at most 4 and no queue delay, which is right for none of them. The grid measures the largest rate
that holds the limit for every setting of the space; its best is the truth. Bars, for each model: a run of `tune`
reaches 95 % of the truth (its setting's value in the grid against the grid's best) in at most 15 % of the grid's
time. A busy machine makes both worthless: run it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import repo_manager as rm
from repo_manager.tuning.result import TuneOptions, TuneProgress
from repo_manager.tuning.run import tune, tuning_run

TRUTH_SHARE, TIME_SHARE = 0.95, 0.15


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[object], last: str
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def chain(width: int, depth: int) -> onnx.ModelProto:
    """Make a chain of matrix products: too small for threads, too long for one core."""
    draw, nodes, weights, last = np.random.default_rng(0), [], {}, "x"
    for layer in range(depth):
        weights[f"w{layer}"] = (draw.standard_normal((width, width)) / width**0.5).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]),
            helper.make_node("Relu", [f"m{layer}"], [f"r{layer}"]),
        ]
        last = f"r{layer}"
    return _model(nodes, weights, [width], last)


def cnn(channels: int, depth: int, size: int) -> onnx.ModelProto:
    """Make a chain of 3x3 convolutions, with a mean over the image at its end."""
    draw, nodes, weights, last, before = np.random.default_rng(0), [], {}, "x", 3
    for layer in range(depth):
        scale = (before * 9) ** 0.5
        weights[f"w{layer}"] = (draw.standard_normal((channels, before, 3, 3)) / scale).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
        ]
        last, before = f"r{layer}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    return _model(nodes, weights, [3, size, size], "y")


MODELS = {
    "mlp": (lambda: chain(64, 2), "p99<10ms"),
    "cnn_1ms": (lambda: cnn(16, 3, 32), "p99<20ms"),
    "cnn_20ms": (lambda: cnn(32, 5, 96), "p99<300ms"),
    "threads": (lambda: cnn(64, 3, 64), "p99<200ms"),
    "instances": (lambda: chain(48, 300), "p99<40ms"),
}


def options(limit: str, budget_s: float, *, fresh: bool) -> TuneOptions:
    """Return what is sought."""
    return TuneOptions(gates=(rm.parse_slo(limit),), budget_s=budget_s, fresh=fresh)


def grid(root: Path, name: str, limit: str, budget_s: float) -> tuple[dict[str, float], float]:
    """Measure every setting; return setting -> the largest rate that holds, and the seconds."""
    began, values = time.monotonic(), {}
    with tuning_run(root, {name: 1}, options(limit, budget_s, fresh=True)) as run:
        space = run.prepare()[name]
        for setting in space.settings():
            values[setting.label] = run.evaluate({name: setting}, None, 0.0).value or 0.0
            print(f"  grid: {setting.label}: {values[setting.label]:.4g}/s", flush=True)
    return values, time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds a run of tune may take")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        root.mkdir()
        for name in chosen.models:
            make, limit = MODELS[name]
            file = Path(folder) / f"{name}.onnx"
            onnx.save(make(), file)
            config = rm.ConfigOptions(max_batch_size=4, instance_count=1)
            rm.add(file, name, root, rm.AddOptions(sparsity="report", config=config))
            values, grid_s = grid(root, name, limit, chosen.budget)
            best = max(values.values())
            for run in range(chosen.runs):
                result = tune(root, {name: 1}, options(limit, chosen.budget, fresh=True), progress=_say)
                reached = values.get(result.best.setting.label, 0.0) / best if best else 0.0
                rows.append(
                    {
                        "model": name,
                        "run": run,
                        "outcome": result.outcome,
                        "setting": result.best.setting.label,
                        "reached": reached,
                        "time_share": result.seconds / grid_s,
                        "seconds": result.seconds,
                        "grid_s": grid_s,
                        "settings": len(values),
                        "measured": len(result.trials),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
            own = [row for row in rows if row["model"] == name]
            held = sum(row["reached"] >= TRUTH_SHARE and row["time_share"] <= TIME_SHARE for row in own)
            reached, share = (statistics.median(row[key] for row in own) for key in ("reached", "time_share"))
            print(f"{name:10} {reached:6.1%} of the grid's best in {share:5.1%} of its time; {held} of {len(own)} held")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=2))


def _say(told: TuneProgress) -> None:
    print(f"  tune: {told.text}", flush=True)


if __name__ == "__main__":
    main()
