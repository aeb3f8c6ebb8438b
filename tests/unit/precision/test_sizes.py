"""Models for some sizes only: a detector with its input in pieces, with a state and a scalar rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models

from repo_manager.errors import CalibrationError, ModelError, UsageError
from repo_manager.onnx_model.inputs import given_sizes
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.precision import ConvertOptions, convert, load_calibration
from repo_manager.repository.golden import read_golden

FLOAT = onnx.TensorProto.FLOAT
SHAPES = {"input": (1, 777), "state": (2, 1, 4)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """`samples` has to be a multiple of 777; the state's batch is its second axis, and `rate` has no axis."""
    nodes = [
        helper.make_node("Reshape", ["input", "pieces"], ["cut"]),
        helper.make_node("ReduceMean", ["cut"], ["loud"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["loud", "rate"], ["scaled"]),
        helper.make_node("Unsqueeze", ["scaled", "last"], ["column"]),
        helper.make_node("Add", ["state", "column"], ["stateN"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input", FLOAT, ["batch", "samples"]),
        helper.make_tensor_value_info("state", FLOAT, [2, "batch", 4]),
        helper.make_tensor_value_info("rate", FLOAT, []),
    ]
    outputs = [helper.make_tensor_value_info("stateN", FLOAT, [2, "batch", 4])]
    weights = {"pieces": np.array([0, -1, 777]), "last": np.array([1])}
    proto = onnx_models.model(nodes, inputs, outputs, weights)
    target = tmp_path / "detector.onnx"
    onnx.save(proto, target)
    return target


@pytest.fixture
def model(path: Path) -> Model:
    return load_model(path)


def test_a_size_that_cannot_be_guessed_is_taken_as_given(model: Model, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not run on made-up inputs") as refused:
        convert(model, "fp16", tmp_path / "out.onnx")
    assert "--shape NAME:SIZES" in (refused.value.hint or "")
    assert convert(model, "fp16", tmp_path / "out.onnx", options=ConvertOptions(shapes=SHAPES)).samples == 3
    added = add(path, "detector", tmp_path / "models", AddOptions(convert=ConvertOptions(shapes=SHAPES)))
    golden = read_golden(tmp_path / "models" / "detector" / str(added.version) / "golden.npz")
    assert {name: array.shape for name, array in golden.inputs.items()} == {**SHAPES, "rate": ()}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"inpt": (1, 777)}, "no such input; it has input, state, rate"),
        ({"input": (777,)}, "does not fit"),
        ({"state": (3, 1, 4)}, "does not fit"),
        ({"input": (2, 777), "state": (2, 1, 4)}, "gives 'batch' the sizes 2 and 1"),
    ],
)
def test_wrong_shapes_are_named(model: Model, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        given_sizes(signature_of(model), shapes)


def states(count: int) -> np.ndarray:
    return np.arange(8 * count, dtype=np.float32).reshape(2, count, 4)


@pytest.mark.parametrize(
    ("state", "rate", "second"),
    [
        (states(6), np.float32(16), states(6)[:, 1:2]),
        (states(1), np.float32(16), states(1)),
        (states(6).transpose(1, 0, 2)[:, :, None], np.full(6, 16, np.float32), states(6)[:, 1:2]),
    ],
    ids=["batch second", "one state for all", "samples first"],
)
def test_states_and_scalars_in_calibration_data(
    model: Model, tmp_path: Path, state: np.ndarray, rate: Any, second: np.ndarray
) -> None:
    file = tmp_path / "data.npz"
    waves = np.random.default_rng(0).normal(size=(6, 777)).astype(np.float32)
    np.savez(file, input=waves, state=state, rate=rate)
    data = load_calibration(str(file), signature_of(model))
    samples = list(data.batches())
    assert (data.count, samples[1]["input"].shape, samples[1]["rate"].shape) == (6, (1, 777), ())
    np.testing.assert_array_equal(samples[1]["state"], second)
    assert convert(model, "fp16", tmp_path / "out.onnx", calibration=data).inputs == "calibration"


def test_a_single_number_for_an_input_with_axes_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, input=np.float32(1), state=states(1), rate=np.float32(16))
    with pytest.raises(CalibrationError, match="'input' is a single number"):
        load_calibration(str(file), signature_of(model))
