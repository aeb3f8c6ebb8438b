"""The ONNX files of the headline benchmark: generated, pruned, calibrated, converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from models import MODELS

from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.precision import ConvertOptions, convert, load_calibration
from repo_manager.sparsity import prune
from repo_manager.types import Precision

__all__ = ["NO_GATE", "calibration_of", "converted", "weights"]

NO_GATE = ConvertOptions(max_drift=1e9)  # made-up weights: accuracy is not the question


def weights(model: str, folder: Path) -> dict[str, Path]:
    """Write the model dense, and pruned by ASP's rule, unless the folder has them."""
    dense, sparse = folder / f"{model}-dense.onnx", folder / f"{model}-sparse.onnx"
    if not sparse.exists():
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(MODELS[model](), dense)
        save_model(prune(load_model(dense))[0], sparse)
    return {"dense": dense, "sparse": sparse, "noflag": sparse}


def calibration_of(source: Path) -> Path:
    """Write eight made-up samples beside a model."""
    path = source.with_suffix(".npz")
    samples = [natural_inputs(signature_of(load_model(source)), batch=1, seed=seed) for seed in range(8)]
    np.savez(path, **{name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]})
    return path


def converted(source: Path, precision: Precision) -> Path:
    """Convert once per source and precision."""
    output = source.with_name(f"{source.stem}-{precision}") / "model.onnx"
    if not output.exists():
        output.parent.mkdir(exist_ok=True)
        model = load_model(source)
        data = load_calibration(calibration_of(source), signature_of(model)) if "int8" in str(precision) else None
        convert(model, precision, output, calibration=data, options=NO_GATE)
    return output
