"""The shipped model agrees with its documentation: valid, 2:4 sparse, accurate, small, with disjoint data."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from repo_manager import samples

MAX_BYTES = 300_000
# conv1 has one input channel, linear2 ten outputs: ASP leaves both dense (examples/README.md).
SPARSE_WEIGHTS = {"conv2.weight", "conv3.weight", "linear1.weight"}


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def groups_of_four(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, 1, -1).reshape(-1, 4)


def accuracy_of(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with np.load(samples.held_out()) as data:
        (logits,) = session.run(["logits"], {"image": data["image"]})
        return float((logits.argmax(axis=1) == data["labels"]).mean())


@pytest.mark.parametrize("path", [samples.sample_model(), samples.dense_twin()], ids=["sparse", "dense"])
def test_model_is_valid_small_and_accurate(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert path.stat().st_size < MAX_BYTES
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes == {"image": ["batch", 1, 8, 8]}
    assert accuracy_of(path) > 0.98


def test_sparse_model_keeps_exactly_two_of_every_four() -> None:
    weights = weights_of(samples.sample_model())
    for name in SPARSE_WEIGHTS:
        assert (np.count_nonzero(groups_of_four(weights[name]), axis=1) <= 2).all(), name
    eligible = sum(weights[name].size for name in SPARSE_WEIGHTS)
    assert eligible / sum(w.size for w in weights.values() if w.ndim > 1) > 0.95


def test_dense_twin_is_dense_and_has_the_same_graph() -> None:
    sparse, dense = onnx.load(samples.sample_model()), onnx.load(samples.dense_twin())
    assert sparse.graph.node == dense.graph.node
    for ours, theirs in itertools.zip_longest(sparse.graph.initializer, dense.graph.initializer):
        assert (ours.name, ours.dims, ours.data_type) == (theirs.name, theirs.dims, theirs.data_type)
    weights = weights_of(samples.dense_twin())
    assert all(np.count_nonzero(weights[name]) > 0.99 * weights[name].size for name in SPARSE_WEIGHTS)


def test_calibration_images_are_not_held_out() -> None:
    with np.load(samples.calibration_data()) as calibration, np.load(samples.held_out()) as held_out:
        assert calibration.files == ["image"]
        assert calibration["image"].shape == (128, 1, 8, 8)
        assert held_out["image"].shape == (600, 1, 8, 8)
        assert calibration["image"].dtype == held_out["image"].dtype == np.float32
        assert set(np.unique(held_out["labels"])) == set(range(10))
        seen = {image.tobytes() for image in calibration["image"]}
        assert not any(image.tobytes() in seen for image in held_out["image"])


def test_data_are_scikit_learns_digits_in_the_stated_split() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = (digits.images[:, np.newaxis] / 16).astype(np.float32)
    with np.load(samples.held_out()) as held_out:
        np.testing.assert_array_equal(held_out["image"], images[-600:])
        np.testing.assert_array_equal(held_out["labels"], digits.target[-600:])
    training = {image.tobytes() for image in images[:-600]}
    with np.load(samples.calibration_data()) as calibration:
        assert all(image.tobytes() in training for image in calibration["image"])
