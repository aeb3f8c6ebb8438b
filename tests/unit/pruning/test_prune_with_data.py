"""Whole models pruned on data: closer to the dense model than by magnitude, valid, and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager import samples
from repo_manager.errors import CalibrationError, InputError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.adding import AddOptions, SparsityMode, add
from repo_manager.pipeline.inspect import inspect_model
from repo_manager.precision import load_calibration
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.columns import ConvColumns
from repo_manager.report.added_view import _facts
from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.report.tables import pruning_facts
from repo_manager.sparsity import PruneReport, SparsityVerdict, sparsity_report
from repo_manager.types import as_json

T = onnx.TensorProto
ALL = PruneOptions(all_valid=True)


def load(proto: onnx.ModelProto, tmp_path: Path) -> Model:
    return load_model(onnx_models.save(proto, tmp_path / "m.onnx"))


def data_for(model: Model, count: int = 24, seed: int = 3) -> CalibrationData:
    """Correlated inputs, as real ones are."""
    random, signature = np.random.default_rng(seed), signature_of(model)
    found = []
    for _ in range(count):
        sample = {}
        for spec in signature.inputs:
            shape = [size if isinstance(size, int) else 1 for size in spec.shape or ()]
            noise = random.normal(size=shape)
            sample[spec.name] = np.cumsum(np.cumsum(noise, axis=-1), axis=-2).astype(np.float32) / 4
        found.append(sample)
    return data_of_samples(found, signature, "made up")


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def graph(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], shape: Sequence[int | str], rank: int
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(list(nodes), "g", [value("x", shape)], [value("y", [None] * rank)], initializer=tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def worst(report: PruneReport) -> tuple[float, float]:
    assert report.evidence is not None
    return (
        max(item.relative_error for item in report.evidence.drift),
        max(item.relative_error for item in report.evidence.magnitude_drift),
    )


def test_a_trained_model_keeps_its_answers(tmp_path: Path) -> None:
    model = load_model(samples.dense_twin())
    data = load_calibration(samples.calibration_data(), signature_of(model))
    proto, report = prune_with_data(model, data)
    ours, by_magnitude = worst(report)
    assert ours < 0.12
    assert by_magnitude > 0.25
    assert {layer.verdict for layer in sparsity_report(proto).layers} >= {SparsityVerdict.VALID}
    assert [layer.node for layer in report.pruned] == ["/conv2/Conv", "/conv3/Conv", "/linear1/Gemm"]
    assert all(layer.error is not None and layer.error < (layer.magnitude_error or 0) for layer in report.pruned)
    evidence = report.evidence
    assert evidence is not None
    assert (evidence.judged_on, evidence.samples, evidence.judged_samples) == ("held-out", 96, 32)
    assert evidence.data_digest == data.digest
    assert 0.9 < evidence.sparse_macs / evidence.macs < 1
    document = json.loads(json.dumps(as_json(report)))
    assert document["method"] == "second-order"
    # The report is the file's behaviour.
    path = tmp_path / "pruned.onnx"
    path.write_bytes(proto.SerializeToString())
    held_out = data.split()
    assert held_out is not None
    dense, pruned = Session(model.path), Session(path)
    pairs = [(dense.run(sample)["logits"], pruned.run(sample)["logits"]) for sample in held_out[1].batches()]
    off = sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(float((a**2).sum()) for a, _ in pairs)
    assert off**0.5 == pytest.approx(ours, rel=1e-3)


def test_only_weights_and_biases_change(tmp_path: Path) -> None:
    proto = onnx_models.cnn(sparse=False)
    proto.producer_name, proto.doc_string = "maker", "text"
    proto.metadata_props.add(key="author", value="someone")
    model = load(proto, tmp_path)
    before = model.path.read_bytes()
    pruned, report = prune_with_data(model, data_for(model), ALL)
    assert model.path.read_bytes() == before
    changed = {layer.weight for layer in report.pruned} | {layer.shifted for layer in report.pruned}
    old, new = constants(proto), constants(pruned)
    assert {name for name in old if not np.array_equal(old[name], new[name])} <= changed
    for one in (proto, pruned):
        for tensor in one.graph.initializer:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    assert pruned == proto


GEOMETRIES = [
    {"kernel": (3, 3), "pads": [1, 1, 1, 1]},
    {"kernel": (3, 3), "strides": [2, 2], "pads": [0, 1, 1, 0]},
    {"kernel": (3, 2), "dilations": [2, 3], "strides": [1, 2], "pads": [2, 0, 1, 3]},
    {"kernel": (3, 3), "auto_pad": "SAME_UPPER", "strides": [2, 3]},
    {"kernel": (2, 4), "auto_pad": "SAME_LOWER", "strides": [2, 1]},
    {"kernel": (3, 3), "auto_pad": "VALID"},
    {"kernel": (1, 1), "strides": [2, 2]},
    {"kernel": (5,), "pads": [2, 1], "strides": [3]},
    {"kernel": (2, 3, 2), "pads": [1, 1, 0, 0, 1, 1], "strides": [1, 2, 1], "dilations": [1, 1, 2]},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_columns_of_every_convolution(geometry: dict[str, object], tmp_path: Path) -> None:
    """Products of columns and weights are the convolution's own outputs."""
    random = np.random.default_rng(12)
    kernel = geometry["kernel"]
    assert isinstance(kernel, tuple)
    weight = random.normal(size=(8, 4, *kernel)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **{k: v for k, v in geometry.items() if k != "kernel"})
    proto = graph([node], {"w": weight}, [2, 4, *[11] * len(kernel)], 2 + len(kernel))
    x = random.normal(size=(2, 4, *[11] * len(kernel))).astype(np.float32)
    y = Session(proto).run({"x": x})["y"]
    inputs, outputs = ConvColumns.at(node, kernel).of(x, y, 10**9, random)
    matrix = np.moveaxis(weight, 1, -1).reshape(8, -1)
    np.testing.assert_allclose(inputs @ matrix.T, outputs, rtol=1e-4, atol=1e-4)
    drawn, answered = ConvColumns.at(node, kernel).of(x, y, 5, random)
    assert len(drawn) == 5
    np.testing.assert_allclose(drawn @ matrix.T, answered, rtol=1e-4, atol=1e-4)


def matrix_models() -> dict[str, onnx.ModelProto]:
    """Models with one layer to prune: each way a matrix product can hold its weight."""
    random = np.random.default_rng(13)
    w = random.normal(size=(32, 16)).astype(np.float32)
    b = random.normal(size=16).astype(np.float32)
    node = helper.make_node
    return {
        "right": graph([node("MatMul", ["x", "w"], ["y"])], {"w": w}, [1, 6, 32], 3),
        "right, add": graph(
            [node("MatMul", ["x", "w"], ["z"]), node("Add", ["b", "z"], ["y"])], {"w": w, "b": b}, [1, 6, 32], 3
        ),
        "left": graph([node("MatMul", ["w", "x"], ["y"])], {"w": w.T.copy()}, [1, 32, 9], 3),
        "gemm": graph([node("Gemm", ["x", "w", "b"], ["y"])], {"w": w, "b": b}, [5, 32], 2),
        "gemm, transposed": graph([node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)], {"w": w.T.copy()}, [32, 5], 2),
        "gemm, left": graph([node("Gemm", ["w", "x"], ["y"], transA=1, transB=1)], {"w": w}, [5, 32], 2),
        "behind a transpose": graph(
            [node("Transpose", ["v"], ["w"], perm=[1, 0]), node("MatMul", ["x", "w"], ["y"])],
            {"v": w.T.copy()},
            [1, 6, 32],
            3,
        ),
        "float16": graph(
            [
                node("Cast", ["x"], ["h"], to=T.FLOAT16),
                node("MatMul", ["h", "w"], ["z"]),
                node("Cast", ["z"], ["y"], to=T.FLOAT),
            ],
            {"w": w.astype(np.float16)},
            [1, 6, 32],
            3,
        ),
    }


@pytest.mark.parametrize("name", matrix_models())
def test_every_matrix_product(name: str, tmp_path: Path) -> None:
    model = load(matrix_models()[name], tmp_path)
    proto, report = prune_with_data(model, data_for(model, 96), ALL)
    assert len(report.pruned) == 1, report.skipped
    assert {layer.verdict for layer in sparsity_report(proto).layers} == {SparsityVerdict.VALID}
    ours, by_magnitude = worst(report)
    assert ours < 0.85 * by_magnitude
    assert report.pruned[0].shifted == ("b" if name in ("right, add", "gemm") else None)


def test_batch_normalisation_takes_up_the_means(tmp_path: Path) -> None:
    random = np.random.default_rng(14)
    weights = {
        "w": random.normal(size=(8, 16, 3, 3)).astype(np.float32),
        "scale": np.ones(8, np.float32),
        "b": np.zeros(8, np.float32),
        "mean": random.normal(size=8).astype(np.float32),
        "var": np.ones(8, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"]),
        helper.make_node("BatchNormalization", ["z", "scale", "b", "mean", "var"], ["y"]),
    ]
    model = load(graph(nodes, weights, [1, 16, 8, 8], 4), tmp_path)
    samples_ = [
        {"x": (2 + np.random.default_rng(seed).normal(size=(1, 16, 8, 8))).astype(np.float32)} for seed in range(32)
    ]
    data = data_of_samples(samples_, signature_of(model), "made up")
    proto, report = prune_with_data(model, data, ALL)
    assert [layer.shifted for layer in report.pruned] == ["mean"]
    dense, pruned = Session(model.path), Session(proto)
    off = [pruned.run(sample)["y"] - dense.run(sample)["y"] for sample in samples_]
    size = np.std([dense.run(sample)["y"] for sample in samples_])
    assert np.abs(np.mean(off, axis=(0, 1, 3, 4))).max() < 0.02 * size
    ours, by_magnitude = worst(report)
    assert ours < 0.6 * by_magnitude


def test_a_shared_weight_sees_all_its_uses(tmp_path: Path) -> None:
    random = np.random.default_rng(15)
    w = (random.normal(size=(32, 32)) / 6).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    model = load(graph(nodes, {"w": w}, [1, 6, 32], 3), tmp_path)
    proto, report = prune_with_data(model, data_for(model, 48), ALL)
    assert [layer.weight for layer in report.pruned] == ["w"]
    assert {layer.verdict for layer in sparsity_report(proto).layers} == {SparsityVerdict.VALID}
    ours, by_magnitude = worst(report)
    assert ours < 0.8 * by_magnitude


def test_what_cannot_be_solved_says_why(tmp_path: Path) -> None:
    random = np.random.default_rng(16)

    def w(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    node = helper.make_node
    nodes = [
        node("Conv", ["x", "grouped"], ["a"], group=2, name="grouped"),
        node("ConvTranspose", ["a", "transposed"], ["b"], name="transposed"),
        node("MatMul", ["b", "stack"], ["c"], name="stack"),
        node("MatMul", ["c", "table"], ["d"], name="tied"),
        node("Gather", ["table", "zero"], ["row"]),
        node("Add", ["d", "row"], ["y"]),
    ]
    weights = {
        "grouped": w(16, 8, 1, 1),
        "transposed": w(16, 8, 1, 1),
        "stack": w(8, 8, 16),
        "table": w(16, 16),
        "zero": np.array(0),
    }
    model = load(graph(nodes, weights, [1, 16, 4, 8], 4), tmp_path)
    _, report = prune_with_data(model, data_for(model), ALL)
    reasons = {layer.node: layer.reason for layer in report.skipped}
    assert "group convolution" in reasons["grouped"]
    assert "only Conv, MatMul and Gemm" in reasons["transposed"]
    assert "stack of matrices" in reasons["stack"]
    assert "read by Gather" in reasons["tied"]
    assert report.pruned == ()


def test_a_value_that_is_not_finite_names_layer_and_sample(tmp_path: Path) -> None:
    w = np.random.default_rng(17).normal(size=(16, 8)).astype(np.float32)
    nodes = [helper.make_node("Log", ["x"], ["l"]), helper.make_node("MatMul", ["l", "w"], ["y"], name="fc")]
    model = load(graph(nodes, {"w": w}, [1, 4, 16], 3), tmp_path)
    given = [{"x": np.full((1, 4, 16), sign, np.float32)} for sign in (1, 2, -1, 3)]
    data = data_of_samples(given, signature_of(model), "logs")
    with pytest.raises(CalibrationError, match="layer 'fc' has infinities or NaN on sample 3"):
        prune_with_data(model, data, ALL)


def test_samples_that_show_no_variety_are_refused(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    zeros = [{name: np.zeros_like(array) for name, array in each.items()} for each in data_for(model, 8).batches()]
    with pytest.raises(CalibrationError, match="every input is one and the same value"):
        prune_with_data(model, data_of_samples(zeros, signature_of(model), "zeros"), ALL)


def test_one_sample_is_judged_on_itself(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    _, report = prune_with_data(model, data_for(model, 1), ALL)
    assert report.evidence is not None
    assert (report.evidence.judged_on, report.evidence.samples) == ("calibration", 1)


def test_runs_and_threads_give_the_same_file(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    data = data_for(model)
    first, _ = prune_with_data(model, data, PruneOptions(all_valid=True, threads=1))
    for threads in (1, 3):
        again, _ = prune_with_data(model, data, PruneOptions(all_valid=True, threads=threads))
        assert again.SerializeToString() == first.SerializeToString()


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    data, work = data_for(model), tmp_path / "work"
    whole, _ = prune_with_data(model, data, ALL)
    told: list[str] = []

    def stop(_: float, label: str) -> None:
        told.append(label)
        if len(list(work.glob("*.npz"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_with_data(model, data, PruneOptions(all_valid=True, work=work), stop)
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.npz")}
    assert len(kept) == 2
    proto, _ = prune_with_data(model, data, PruneOptions(all_valid=True, work=work))
    assert proto.SerializeToString() == whole.SerializeToString()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(InputError, match="something else than solved layers of this model"):
        prune_with_data(model, data, PruneOptions(all_valid=True, work=work, seed=1))


def test_add_prunes_on_data_and_records_it(tmp_path: Path) -> None:
    options = AddOptions(
        sparsity=SparsityMode.PRUNE,
        calibration=str(samples.calibration_data()),
        backend="onnxruntime",
        prune_drift=0.2,
        permute=True,
        control=True,
    )
    added = add(samples.dense_twin(), "digits", tmp_path / "repository", options)
    manifest = json.loads((Path(added.path) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["pruned"]["method"] == "second-order"
    evidence = manifest["pruned"]["evidence"]
    assert evidence["judged_on"] == "held-out"
    assert evidence["permutation"]["channels"] > 0
    assert [point["layers"] for point in evidence["budget"]["front"]] == [1, 2, 3, 3]
    inspected = inspect_model(next(Path(added.path).glob("*.onnx")))
    assert inspected.pruned == manifest["pruned"]
    known = dict(pruning_facts(manifest["pruned"]))
    assert known["budget"] == "drift 0.2"
    assert "at most" in known["drift"]
    page = sparsity_page(inspected.sparsity, title="digits", pruned=inspected.pruned)
    assert "Compute able to run sparse against its cost" in page
    # The dense twin of --control has every weight of the pruned layers.
    assert [control.name for control in added.controls] == ["digits__dense"]
    twin = Path(added.path).parents[1] / "digits__dense" / str(added.controls[0].version)
    dense = sparsity_report(load_model(next(twin.glob("*.onnx"))))
    assert not dense.valid
    assert len(added.sparsity.valid) == 3
    shown = [str(value) for name, value in _facts(added) if name == "pruning"]
    assert len(shown) == 1
    assert "on 32 held-out sample(s)" in shown[0]


@pytest.mark.parametrize("given", [{"prune_drift": 0.1}, {"permute": True}, {"distill": True}])
def test_add_refuses_what_would_have_no_effect(given: dict[str, Any], tmp_path: Path) -> None:
    calibration = str(samples.calibration_data())
    for options in (
        AddOptions(sparsity=SparsityMode.PRUNE, **given),
        AddOptions(sparsity=SparsityMode.REPORT, calibration=calibration, **given),
    ):
        with pytest.raises(UsageError, match="need --sparsity prune and --calibration DATA"):
            add(samples.dense_twin(), "digits", tmp_path / "repository", options)
