"""Models scored on labelled data and by functions, and held against limits, by the real ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_models import mlp
from typer.testing import CliRunner

from repo_manager.accuracy import AccuracyGate, AccuracyOptions, load_evaluator
from repo_manager.cli.main import app
from repo_manager.errors import CalibrationError, GateError, InputError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.precision import convert
from repo_manager.repository.difference import compare_versions
from repo_manager.repository.scan import find_model
from repo_manager.stats.accuracy import Score, judge_accuracy
from repo_manager.types import Precision

SAMPLES = 200


@pytest.fixture
def model(tmp_path: Path) -> Model:
    onnx.save(mlp(), tmp_path / "model.onnx")
    return load_model(tmp_path / "model.onnx")


def inputs(count: int = SAMPLES) -> Any:
    return np.random.default_rng(1).normal(size=(count, 32)).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path, model: Model) -> str:
    """The model's own answers as labels, but for every tenth: it is right on 90 %."""
    x = inputs()
    labels = Session(model).run({"x": x})["y"].argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 8
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    return f"{tmp_path / 'data.npz'}:labels"


def worse(model: Model, path: Path, classes: int) -> Path:
    """Write the model with the scores of its first classes negated: other answers."""
    proto = onnx.load(model.path)
    scale = np.ones(8, np.float32)
    scale[:classes] = -1.0
    proto.graph.initializer.append(numpy_helper.from_array(scale, "flip"))
    proto.graph.node[-1].output[0] = "before"
    proto.graph.node.append(helper.make_node("Mul", ["before", "flip"], ["y"], name="flipped"))
    onnx.save(proto, path)
    return path


def test_a_score_is_the_share_of_right_answers(model: Model, data: str) -> None:
    evaluator = load_evaluator(data, signature_of(model))
    found = evaluator.score(model)
    assert (found.value, found.samples, evaluator.metric) == (0.9, SAMPLES, "top-1 accuracy")
    session = Session(model)
    assert evaluator.score_of(session.run) == found, "whatever runs the model"
    assert evaluator.digest is not None


def test_samples_run_together_where_the_first_axis_is_a_batch(model: Model, data: str, tmp_path: Path) -> None:
    sizes: list[int] = []
    session = Session(model)

    def run(taken: Any) -> Any:
        sizes.append(taken["x"].shape[0])
        return session.run(taken)

    alone = load_evaluator(data, signature_of(model)).score_of(run)
    assert sizes == [1] * SAMPLES
    sizes.clear()
    together = load_evaluator(data, signature_of(model), model=model).score_of(run)
    assert (together, sizes) == (alone, [32] * 6 + [8])

    mixed = onnx.load(model.path)  # each answer depends on the whole batch
    mixed.graph.node[-1].output[0] = "before"
    mixed.graph.node.append(helper.make_node("Softmax", ["before"], ["y"], axis=0))
    onnx.save(mixed, tmp_path / "mixed.onnx")
    other = load_model(tmp_path / "mixed.onnx")
    sizes.clear()
    load_evaluator(data, signature_of(other), model=other).score_of(run)
    assert sizes == [1] * SAMPLES


def test_limits_decide_and_few_samples_are_said_to_be_few(model: Model, data: str, tmp_path: Path) -> None:
    other = worse(model, tmp_path / "worse.onnx", 1)
    free = AccuracyGate.of(AccuracyOptions(data), model).judge(other)
    assert free.passed
    assert free.source == 0.9
    assert 0 < free.drop < 0.9
    assert free.interval is not None
    assert free.interval.low < free.value < free.interval.high
    strict = AccuracyGate.of(AccuracyOptions(data, max_drop=free.drop / 2), model).judge(other)
    assert not strict.passed
    assert re.search(r"a drop of 0\.\d+ > 0\.", strict.detail)
    exact = AccuracyGate.of(AccuracyOptions(data, max_drop=free.drop), model).judge(other)
    assert exact.passed, "a limit that is met exactly holds"
    near = AccuracyGate.of(AccuracyOptions(data, min_accuracy=free.value - 0.001), model).judge(other)
    assert near.passed
    assert "few samples: the limit is within the 95 % interval" in near.detail
    far = AccuracyGate.of(AccuracyOptions(data, min_accuracy=0.01), model).judge(other)
    assert "few samples" not in far.detail


def test_pairs_show_a_drop_that_the_accuracies_alone_do_not() -> None:
    """199 of 200 equal answers: the drop is narrow, though each accuracy is 0.5 give or take 0.07."""
    each = np.tile([0.0, 1.0], 100)
    changed = each.copy()
    changed[1] = 0.0
    found = judge_accuracy(
        Score(0.5, each), Score(0.495, changed), data="d", digest=None, metric="accuracy", max_drop=0.02
    )
    assert found.drop_interval is not None
    assert found.drop_interval.high < 0.02
    assert "few samples" not in found.detail


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_conversion_is_scored_and_recorded(precision: str, model: Model, data: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "calibration.npz", x=inputs(32))
    options = AddOptions(
        precision=Precision(precision),
        calibration=str(tmp_path / "calibration.npz"),
        accuracy=AccuracyOptions(data, min_accuracy=0.8, max_drop=0.08),
    )
    added = add(tmp_path / "model.onnx", "m", tmp_path / "models", options)
    accuracy = added.conversion.accuracy
    assert accuracy is not None
    assert added.conversion.checks[-1].name == "accuracy"
    entry = find_model(tmp_path / "models", "m").version(1)
    assert entry.manifest is not None
    assert entry.manifest.conversion["accuracy"]["value"] == accuracy.value
    assert compare_versions(entry, entry).facts["accuracy"][0].startswith(f"{accuracy.value:.4g} (source 0.9)")


def test_bf16_is_scored_with_each_value_rounded(model: Model, data: str, tmp_path: Path) -> None:
    gate = AccuracyGate.of(AccuracyOptions(data), model)
    found = convert(model, "bf16", tmp_path / "low.onnx", judge=gate.judge).accuracy
    assert found is not None
    assert found.value > 0.8


def test_a_conversion_below_its_limit_writes_nothing(model: Model, data: str, tmp_path: Path) -> None:
    gate = AccuracyGate.of(AccuracyOptions(data, min_accuracy=0.95), model)
    with pytest.raises(GateError, match=r"FAILED  accuracy: top-1 accuracy 0\.9, .* 0\.9 < 0\.95"):
        convert(model, "fp16", tmp_path / "low.onnx", judge=gate.judge)
    assert not (tmp_path / "low.onnx").exists()
    with pytest.raises(GateError):
        add(tmp_path / "model.onnx", "m", tmp_path / "models", AddOptions(accuracy=gate.options))
    assert not list((tmp_path / "models").glob("m/*"))


def test_a_function_scores(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric.py").write_text(
        "import numpy as np\n"
        "def each(run):\n"
        "    y = run({'x': np.ones((4, 32), np.float32)})['y']\n"
        "    return (y.argmax(axis=1) == y[0].argmax()).astype(float)\n"
        "def one(run): return -1.5\n"
        "def none(run): return float('nan')\n"
        "def fails(run): return run({'wrong': 1})\n"
    )
    monkeypatch.chdir(tmp_path)
    signature = signature_of(model)
    found = load_evaluator("my_metric:each", signature).score(model)
    assert (found.value, found.samples) == (1.0, 4)
    assert load_evaluator("my_metric:one", signature).score(model) == Score(-1.5)
    judged = AccuracyGate.of(AccuracyOptions("my_metric:one", min_accuracy=-1.0), model).judge(model.path)
    assert not judged.passed
    for name, said in (("none", "expected a number"), ("fails", "my_metric:fails"), ("absent", "AttributeError")):
        with pytest.raises((InputError, CalibrationError), match=said):
            load_evaluator(f"my_metric:{name}", signature).score(model)


def test_several_outputs_need_a_name(tmp_path: Path) -> None:
    proto = mlp()
    proto.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 64]))
    onnx.save(proto, tmp_path / "two.onnx")
    model = load_model(tmp_path / "two.onnx")
    np.savez(tmp_path / "d.npz", x=inputs(8), labels=np.zeros(8, int), y=np.zeros(8, int))
    place = str(tmp_path / "d.npz")
    with pytest.raises(UsageError, match=r"the outputs y, r; which one"):
        load_evaluator(f"{place}:labels", signature_of(model))
    with pytest.raises(UsageError, match="has no output 'z'"):
        load_evaluator(f"{place}:labels:z", signature_of(model))
    np.savez(tmp_path / "d.npz", x=inputs(8), labels=np.zeros(8, int))
    assert load_evaluator(f"{place}:labels:y", signature_of(model)).score(model).samples == 8
    np.savez(tmp_path / "d.npz", x=inputs(8), y=np.zeros(8, int))
    assert load_evaluator(f"{place}:y", signature_of(model)).score(model).samples == 8


BAD = {
    "x.npz": (UsageError, "which of its arrays holds the labels"),
    "labels": (UsageError, "expected FILE.npz:LABELS"),
    "absent.npz:labels": (InputError, "there is no such file"),
    "DATA:nothing": (CalibrationError, "there is no array 'nothing'"),
    "SHORT:labels": (InputError, "has 3 labels for 8 samples"),
    "IGNORED:labels": (InputError, "no label that counts"),
}


@pytest.mark.parametrize("text", BAD)
def test_data_that_cannot_be_used(text: str, model: Model, data: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "short.npz", x=inputs(8), labels=np.zeros(3, int))
    np.savez(tmp_path / "ignored.npz", x=inputs(8), labels=np.full(8, -1))
    kind, said = BAD[text]
    place = text.replace("DATA", data.rpartition(":")[0])
    place = place.replace("SHORT", str(tmp_path / "short.npz")).replace("IGNORED", str(tmp_path / "ignored.npz"))
    with pytest.raises(kind, match=said):
        load_evaluator(place, signature_of(model)).score(model)


def test_the_command_line(model: Model, data: str, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code if not result.exception else getattr(result.exception, "exit_code", 1), result.output

    code, output = run("prune", str(model.path), "-o", str(tmp_path / "pruned.onnx"), "--eval", data)
    assert (code, "top-1 accuracy" in output) == (0, True), output
    pruned = load_evaluator(data, signature_of(model)).score(tmp_path / "pruned.onnx")
    assert f"top-1 accuracy {pruned.value:.4g}, of the source 0.9" in " ".join(output.split())
    kept = (tmp_path / "pruned.onnx").stat().st_mtime_ns
    code, _ = run("prune", str(model.path), "-o", str(tmp_path / "pruned.onnx"), "--eval", data, "--min-accuracy", "1")
    assert (code, (tmp_path / "pruned.onnx").stat().st_mtime_ns) == (GateError.exit_code, kept)
    assert not list(tmp_path.glob(".pruned*"))
    base = ["convert", str(model.path), "-o", str(tmp_path / "out.onnx"), "-p", "fp16"]
    code, output = run(*base, "--eval", data, "--max-accuracy-drop", "0.02", "--json")
    assert (code, '"accuracy"' in output) == (0, True)
    (tmp_path / "out.onnx").unlink()
    assert run(*base, "--min-accuracy", "0.5")[0] == UsageError.exit_code
    assert not (tmp_path / "out.onnx").exists()
