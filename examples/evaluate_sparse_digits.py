"""Measure what 2:4 sparsity, FP16 and INT8 cost in accuracy: the table of `README.md`.

For every seed it runs the recipe of `train_sparse_digits.py`, converts the dense, the pruned, the retrained and a
control network to FP16 and INT8 with `repo_manager.precision.convert` at its default gates, and runs each on ONNX
Runtime over the held-out images. A conversion that a gate refuses is recorded as refused. INT8 is calibrated with
training images only.

    pip install "triton-repo-manager[train]"
    python examples/evaluate_sparse_digits.py --seeds 10 --write-readme
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accuracy_table
import numpy as np
import onnxruntime
from train_sparse_digits import (
    CALIBRATION_IMAGES,
    Digits,
    Schedule,
    export_onnx,
    load_data,
    save_data,
    train,
    train_variants,
)

from repo_manager.errors import GateError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision import convert, load_calibration
from repo_manager.types import Precision

PACKAGES = ("torch", "scikit-learn", "onnx", "onnxruntime", "numpy", "repo-manager")


def measure(path: Path, digits: Digits) -> dict[str, Any]:
    """Run an ONNX model over the held-out images on ONNX Runtime's CPU provider.

    Returns:
        `right`: how many images are classified right; `loss`: the mean cross-entropy, in nats.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(["logits"], {"image": digits.held_out_images})
    logits = np.asarray(output, dtype=np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    of_the_label = log_probability[np.arange(len(logits)), digits.held_out_labels]
    right = int((logits.argmax(axis=1) == digits.held_out_labels).sum())
    return {"right": right, "loss": round(float(-of_the_label.mean()), 6)}


def evaluate_model(path: Path, calibration: Path, digits: Digits) -> list[dict[str, Any]]:
    """Return one row per precision of an exported FP32 model; converted files lie beside it."""
    model = load_model(path)
    data = load_calibration(calibration, signature_of(model))
    rows: list[dict[str, Any]] = [{"precision": "fp32", "refused": None, **measure(path, digits)}]
    for precision in (Precision.FP16, Precision.INT8):
        converted = path.with_name(f"{path.stem}_{precision}.onnx")
        row: dict[str, Any] = {"precision": str(precision), "refused": None, "right": None, "loss": None}
        try:
            convert(model, precision, converted, calibration=data if precision is Precision.INT8 else None)
        except GateError as error:
            row["refused"] = error.message
        else:
            row.update(measure(converted, digits))
        rows.append(row)
    return rows


def evaluate_seed(seed: int, digits: Digits, schedule: Schedule, folder: Path) -> list[dict[str, Any]]:
    """Train one seed and return its twelve rows: four networks in three precisions.

    Retraining is also more training. The fourth network is the control for that: dense, trained twice.
    """
    variants = train_variants(seed, digits, schedule)
    control = copy.deepcopy(variants.dense)
    train(control, digits, schedule, seed)
    networks = {**vars(variants), "dense_twice": control}
    save_data(digits, folder)
    rows = []
    for name in accuracy_table.VARIANTS:
        path = folder / f"digits_{name}.onnx"
        export_onnx(networks[name], path)
        for row in evaluate_model(path, folder / "digits_calibration.npz", digits):
            rows.append({"seed": seed, "variant": name, **row})
    return rows


def main() -> None:
    """Evaluate every seed, write the JSON, and on request the README's table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 0 upwards")
    parser.add_argument("--epochs", type=int, default=Schedule.epochs, help="epochs of each of the two trainings")
    parser.add_argument("--output", type=Path, default=accuracy_table.RESULTS, help="where the JSON goes")
    parser.add_argument("--write-readme", action="store_true", help="renew the table in examples/README.md")
    arguments = parser.parse_args()

    digits, schedule = load_data(), Schedule(epochs=arguments.epochs)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += evaluate_seed(seed, digits, schedule, Path(folder))
        print(f"seed {seed}: " + ", ".join(f"{r['variant']} {r['precision']} {r['right']}" for r in rows[-12:]))
    results = {
        "command": f"python examples/evaluate_sparse_digits.py --seeds {arguments.seeds} --epochs {arguments.epochs}",
        "measured": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "platform": f"{platform.system()} {platform.machine()}, CPU",
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "training_images": len(digits.train_labels),
        "held_out_images": len(digits.held_out_labels),
        "calibration_images": CALIBRATION_IMAGES,
        "schedule": dataclasses.asdict(schedule),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(accuracy_table.render(results))
    if arguments.write_readme:
        readme = accuracy_table.README.read_text(encoding="utf-8")
        table = accuracy_table.render(results)
        accuracy_table.README.write_text(accuracy_table.insert(readme, table), encoding="utf-8")


if __name__ == "__main__":
    main()
