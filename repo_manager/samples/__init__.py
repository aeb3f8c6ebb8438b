"""A real 2:4-sparse model and its data, for `quickstart`, the sample repository and the tests.

A small CNN to tell handwritten digits apart, written by `examples/train_sparse_digits.py --seed 0`.
`examples/README.md` has the recipe and the accuracy. Input `image` `[batch, 1, 8, 8]` float32 in 0..1, output `logits`
`[batch, 10]` float32.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["calibration_data", "dense_twin", "held_out", "sample_model"]

_FOLDER = Path(__file__).parent


def sample_model() -> Path:
    """Return the path of the sparse model (ONNX, FP32), pruned and retrained."""
    return _FOLDER / "digits_sparse.onnx"


def dense_twin() -> Path:
    """Return the path of the dense model `sample_model` was pruned from: same graph, other weights."""
    return _FOLDER / "digits_dense.onnx"


def calibration_data() -> Path:
    """Return the path of 128 training images: `.npz` with `image` `[128, 1, 8, 8]` float32."""
    return _FOLDER / "digits_calibration.npz"


def held_out() -> Path:
    """Return the path of 600 images no training saw: `.npz` with `image` float32 and `labels` `[600]` uint8."""
    return _FOLDER / "digits_held_out.npz"
