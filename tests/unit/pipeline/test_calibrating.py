"""Calibration data from images and requests: calibration and load tests read exactly the written values."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from support.onnx_models import mlp
from typer.testing import CliRunner

from repo_manager.cli.main import app
from repo_manager.errors import CalibrationError, InputError, RepoManagerError, UsageError
from repo_manager.files import sha256_file
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.calibrating import CalibrationOptions, make_calibration
from repo_manager.precision import load_calibration
from repo_manager.request_data.read import read_rows
from repo_manager.request_data.tensors import InputFacts

RNG = np.random.default_rng(0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Requests as an access log has them, with and without a batch axis, and in Triton's own form."""
    rows = RNG.normal(size=(9, 32)).astype(np.float32)
    lines: list[object] = [{"x": row.tolist()} for row in rows[:3]] + [{"x": [row.tolist()]} for row in rows[3:6]]
    lines += [
        {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": row.tolist()}]} for row in rows[6:]
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.save(tmp_path / "rows.npy", rows)
    return path


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    return path


def relu(shape: list[str | int]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_requests_become_one_array_an_input(requests: Path, tmp_path: Path) -> None:
    model = saved(mlp(), tmp_path / "mlp.onnx")
    made = make_calibration(model, requests, tmp_path / "c.npz")
    rows = np.load(tmp_path / "rows.npy")
    assert np.array_equal(np.load(tmp_path / "c.npz")["x"], rows)
    assert (made.samples, made.available, made.inputs[0].high) == (9, 9, pytest.approx(rows.max()))
    assert made.digest == sha256_file(tmp_path / "c.npz"), "what the manifest of a version will record"
    assert load_calibration(tmp_path / "c.npz", signature_of(load_model(model))).count == 9
    load = read_rows(tmp_path / "c.npz", [InputFacts("x", "FP32", (32,))])
    assert [sample["x"].shape for sample in load] == [(32,)] * 9, "a load test sends the same"


def test_samples_are_drawn_and_keep_their_order(requests: Path, tmp_path: Path) -> None:
    model, rows = saved(mlp(), tmp_path / "mlp.onnx"), np.load
    drawn = []
    for seed in (1, 1, 2):
        made = make_calibration(model, requests, tmp_path / "c.npz", CalibrationOptions(samples=4, seed=seed))
        assert (made.samples, made.available) == (4, 9)
        drawn.append(rows(tmp_path / "c.npz")["x"])
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    everything = np.load(tmp_path / "rows.npy").tolist()
    places = [everything.index(row) for row in drawn[0].tolist()]
    assert places == sorted(places)


def test_images_as_a_file_and_as_a_recipe_are_the_same(images: Path, tmp_path: Path) -> None:
    model = saved(relu(["N", 3, "H", "W"]), tmp_path / "images.onnx")
    image = {"mean": "0.5,0.4,0.3", "std": "0.2,0.2,0.2", "resize": "18"}
    with pytest.raises(UsageError, match="a size in pixels"):
        make_calibration(model, images, tmp_path / "c.npz", CalibrationOptions(image=image))
    options = CalibrationOptions(image=image, shapes={"x": (3, 16, 16)})
    make_calibration(model, images, tmp_path / "c.npz", options)
    recipe = make_calibration(model, images, images / "calibration.yaml", options)
    assert recipe.samples == 12
    signature = signature_of(load_model(model))
    whole = load_calibration(tmp_path / "c.npz", signature)
    described = load_calibration(images, signature)
    for a, b in zip(whole.batches(), described.batches(), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_states_and_scalars_come_with_an_axis_of_samples(tmp_path: Path) -> None:
    """A recurrent model: audio, a state whose batch comes second, a scalar rate."""
    inputs = [
        helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["N", "T"]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "N", 3]),
        helper.make_tensor_value_info("rate", TensorProto.INT64, []),
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("audio", "state", "rate")]
    outputs = [
        helper.make_tensor_value_info(f"{value.name}_out", value.type.tensor_type.elem_type, None) for value in inputs
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    model = saved(proto, tmp_path / "state.onnx")
    rows = [
        {"audio": RNG.normal(size=(1, 8)).tolist(), "state": RNG.normal(size=(2, 1, 3)).tolist(), "rate": 16000}
        for _ in range(5)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = make_calibration(model, tmp_path / "r.jsonl", tmp_path / "c.npz")
    assert [item.shape for item in made.inputs] == [(1, 8), (2, 1, 3), ()]
    (first, *_) = load_calibration(tmp_path / "c.npz", signature_of(load_model(model))).batches()
    assert first["rate"].shape == ()
    assert np.array_equal(first["state"], np.asarray(rows[0]["state"], np.float32))


def test_samples_of_different_shapes_need_a_folder(tmp_path: Path) -> None:
    model = saved(relu(["N", "T"]), tmp_path / "m.onnx")
    content = [
        {"x": {"content": {"b64": base64.b64encode(RNG.normal(size=n).astype("<f4")).decode()}, "shape": [n]}}
        for n in (3, 4, 5, 4)
    ]
    (tmp_path / "r.json").write_text(json.dumps({"data": content}))
    with pytest.raises(CalibrationError, match=r"'x' has samples of 3 shapes, \[3\] and \[4\] among them"):
        make_calibration(model, tmp_path / "r.json", tmp_path / "c.npz")
    made = make_calibration(model, tmp_path / "r.json", tmp_path / "folder")
    assert made.inputs[0].shape is None
    data = load_calibration(tmp_path / "folder", signature_of(load_model(model)))
    assert [sample["x"].shape for sample in data.batches()] == [(1, 3), (1, 4), (1, 5), (1, 4)]


BAD = {
    "absent": (InputError, "there is no such file"),
    "zeros.npz": (CalibrationError, "every input is one and the same value"),
    "wrong.jsonl": (InputError, "request 1"),
    "images": (UsageError, "image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_calibrate_writes_nothing(name: str, images: Path, tmp_path: Path) -> None:
    model = saved(mlp(), tmp_path / "mlp.onnx")
    np.savez(tmp_path / "zeros.npz", x=np.zeros((8, 32), np.float32))
    (tmp_path / "wrong.jsonl").write_text('{"z": [1]}\n')
    kind, said = BAD[name]
    assert images.is_dir()
    with pytest.raises(RepoManagerError, match=said) as caught:
        make_calibration(model, tmp_path / name, tmp_path / "c.npz")
    assert isinstance(caught.value, kind)
    assert not list(tmp_path.glob("*c.npz*"))


def test_the_command(requests: Path, tmp_path: Path) -> None:
    model = saved(mlp(), tmp_path / "mlp.onnx")
    words = ["calibrate", "make", str(model), "--from", str(requests), "-o", str(tmp_path / "c.npz")]
    result = CliRunner().invoke(app, [*words, "--samples", "6", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"] == 6
    again = [
        "convert",
        str(model),
        "-o",
        str(tmp_path / "q.onnx"),
        "-p",
        "int8",
        "--calibration",
        str(tmp_path / "c.npz"),
    ]
    assert CliRunner().invoke(app, [*again, "--max-drift", "inf"]).exit_code == 0
