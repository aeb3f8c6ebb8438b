"""Layers chosen within a budget: the budget holds on unseen inputs, and the front is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.errors import CalibrationError, GateError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.budget import Budget, FrontStep
from repo_manager.pruning.judge import Judge, errors_by_sample, upper_bound
from repo_manager.sparsity import SparsityVerdict, sparsity_report
from repo_manager.types import as_json

Array = np.ndarray
Run = Callable[[Mapping[str, Array]], dict[str, Array]]


def branches(tmp_path: Path) -> tuple[Model, CalibrationData]:
    """Four layers side by side with equal work: pruning harms the output by 8, 4, 2 and nearly 0."""
    random = np.random.default_rng(21)
    weights: dict[str, Array] = {}
    nodes, parts = [], []
    for number, size in enumerate((8, 4, 2, 0.01)):
        weights[f"w{number}"] = (size * random.normal(size=(32, 32)) / 6).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["x", f"w{number}"], [f"p{number}"], name=f"fc{number}"))
        parts.append(f"p{number}")
    nodes.append(helper.make_node("Sum", parts, ["y"]))
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", [1, 12, 32])], [value("y", [1, 12, 32])], initializer=tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    given = [{"x": random.normal(size=(1, 12, 32)).astype(np.float32)} for _ in range(64)]
    return model, data_of_samples(given, signature_of(model), "noise")


def fresh_drift(model: Model, proto: onnx.ModelProto, tmp_path: Path) -> float:
    random = np.random.default_rng(22)
    given = [{"x": random.normal(size=(1, 12, 32)).astype(np.float32)} for _ in range(64)]
    judge = Judge(model, data_of_samples(given, signature_of(model), "fresh"), tmp_path)
    path = tmp_path / "pruned.onnx"
    path.write_bytes(proto.SerializeToString())
    pruned = Session(path)
    off = [(pruned.run(sample)["y"], answer["y"]) for sample, answer in zip(given, judge.answers, strict=True)]
    return float((sum(((a - b) ** 2).sum() for a, b in off) / sum((b**2).sum() for _, b in off)) ** 0.5)


def test_the_least_harmful_layers_go_and_the_budget_holds_on_other_inputs(tmp_path: Path) -> None:
    model, data = branches(tmp_path)
    proto, report = prune_with_data(model, data, PruneOptions(max_drift=0.12))
    names = [layer.node for layer in report.pruned]
    assert names == ["fc2", "fc3"]
    assert "fc0" not in names
    reasons = {layer.node: layer.reason for layer in report.skipped}
    assert reasons == dict.fromkeys(("fc0", "fc1"), "too much harm for its share of the work")
    evidence = report.evidence
    assert evidence is not None
    assert evidence.drift_upper is not None
    assert evidence.budget is not None
    drift, upper = evidence.drift[0].relative_error, evidence.drift_upper["y"]
    assert drift < upper < 0.15
    assert drift <= 0.12
    assert fresh_drift(model, proto, tmp_path) <= min(upper, 0.12)
    assert (evidence.samples, evidence.budget.samples, evidence.judged_samples) == (32, 16, 16)
    front = [point for point in evidence.budget.front if not point.final]
    assert [point.added for point in front] == [("fc3",), ("fc2",), ("fc1",), ("fc0",)]
    assert [point.macs_share for point in front] == [0.25, 0.5, 0.75, 1.0]
    drifts = [point.drift or 0 for point in front]
    assert drifts == sorted(drifts)
    assert drifts[-1] > 0.3
    assert [point.macs_share for point in evidence.budget.front if point.final][-1] >= 0.5
    assert json.loads(json.dumps(as_json(report)))["evidence"]["budget"]["front"][0]["added"] == ["fc3"]


def test_a_budget_that_holds_everything_prunes_everything(tmp_path: Path) -> None:
    model, data = branches(tmp_path)
    proto, report = prune_with_data(model, data, PruneOptions(max_drift=0.9))
    assert len(report.pruned) == 4
    assert {layer.verdict for layer in sparsity_report(proto).layers} == {SparsityVerdict.VALID}
    _, kept = prune_with_data(model, data, PruneOptions(max_drift=0.9, exclude=("fc0",)))
    assert [layer.node for layer in kept.pruned] == ["fc1", "fc2", "fc3"]


def test_the_bound_pays_for_each_look_at_the_held_out_samples(tmp_path: Path) -> None:
    """The held-out inputs are harder than the others: a set of layers that fits by those does not fit by these."""
    model, data = branches(tmp_path)
    first, _ = prune_with_data(model, data, PruneOptions(max_drift=0.12))
    before, after = (sum(map(numpy_helper.to_array, it.graph.initializer)) for it in (onnx.load(model.path), first))
    answers, _, _ = np.linalg.svd(np.linalg.solve(before, after - before))
    hard = np.linalg.solve(before.T, answers[:, 0])  # in this direction pruning changes most of the answer
    split = data.split()
    assert split is not None
    held_out = {sample["x"].tobytes() for sample in split[1].batches()}
    random = np.random.default_rng(30)
    given = [
        {"x": (hard + random.normal(size=x.shape) / 6).astype(np.float32) if x.tobytes() in held_out else x}
        for x in (sample["x"] for sample in data.batches())
    ]
    other = data_of_samples(given, signature_of(model), "harder where it is held out")
    proto, report = prune_with_data(model, other, PruneOptions(max_drift=0.12))
    assert report.evidence is not None
    assert report.evidence.budget is not None
    looks, bounds = report.evidence.budget.looks, report.evidence.drift_upper
    assert looks == 2
    path = tmp_path / "pruned.onnx"
    path.write_bytes(proto.SerializeToString())
    dense, pruned = Session(model.path), Session(path)
    parts = other.split()
    assert parts is not None
    pairs = errors_by_sample(((pruned.run(one), dense.run(one)) for one in parts[1].batches()), ["y"])["y"]
    assert bounds == {"y": pytest.approx(upper_bound(pairs, 0.05 * 6 / (np.pi * looks) ** 2), rel=1e-4)}
    assert bounds["y"] > upper_bound(pairs)


def test_what_no_layer_can_hold_is_refused(tmp_path: Path) -> None:
    model, data = branches(tmp_path)
    with pytest.raises(GateError, match=r"no set of layers stays within the budget of 1e-06: pruning 'fc3', with 95 %"):
        prune_with_data(model, data, PruneOptions(max_drift=1e-6))
    few = data.without_one_in(8)[1]
    with pytest.raises(CalibrationError, match="8 samples, and a largest drift needs 16"):
        prune_with_data(model, few, PruneOptions(max_drift=0.2))
    with pytest.raises(UsageError, match="one budget at a time"):
        prune_with_data(model, data, PruneOptions(max_drift=0.2, metric=lambda run: 1.0))


def test_a_metric_chooses_and_is_told_what_for(tmp_path: Path) -> None:
    model, data = branches(tmp_path)
    random = np.random.default_rng(23)
    given = random.normal(size=(24, 1, 12, 32)).astype(np.float32)
    dense = Session(model.path)
    labels = [dense.run({"x": x})["y"].argmax(-1) for x in given]
    parts = []

    def agreement(run: Run, part: str) -> float:
        parts.append(part)
        half = slice(0, 12) if part == "choose" else slice(12, 24)
        pairs = zip(given[half], labels[half], strict=True)
        return float(np.mean([(run({"x": x})["y"].argmax(-1) == label).mean() for x, label in pairs]))

    _, report = prune_with_data(model, data, PruneOptions(metric=agreement, max_loss=0.1))
    assert {"choose", "judge"} == set(parts)
    names = [layer.node for layer in report.pruned]
    assert "fc3" in names
    assert "fc0" not in names
    assert report.evidence is not None
    budget = report.evidence.budget
    assert budget is not None
    assert budget.kind == "metric"
    assert budget.dense_metric == 1.0
    assert budget.metric is not None
    assert budget.metric >= 0.9
    assert all(point.metric is not None and point.drift is None for point in budget.front)

    assert not budget.shared

    def one_number(run: Run) -> float:
        return agreement(run, "judge")

    _, report = prune_with_data(model, data, PruneOptions(metric=one_number, max_loss=0.1))
    assert report.evidence is not None
    assert report.evidence.budget is not None
    assert report.evidence.budget.shared

    def broken(run: Run) -> float:
        raise RuntimeError("no labels")

    with pytest.raises(CalibrationError, match="metric 'broken': RuntimeError: no labels"):
        prune_with_data(model, data, PruneOptions(metric=broken))
    with pytest.raises(CalibrationError, match="expected a finite number"):
        prune_with_data(model, data, PruneOptions(metric=lambda run: float("nan")))


def test_one_wrong_answer_of_a_hundred_is_a_loss_of_a_hundredth() -> None:
    assert 0.99 - 0.98 > 0.01  # in float64
    assert FrontStep(("fc",), 1.0, None, None, metric=0.98).cost(Budget(0.01, dense_metric=0.99)) <= 0.01
    assert FrontStep(("fc",), 1.0, None, None, metric=0.97).cost(Budget(0.01, dense_metric=0.99)) > 0.01


def test_small_layers_stay_dense_where_large_ones_hold_the_work(tmp_path: Path) -> None:
    random = np.random.default_rng(24)
    weights = {"small": random.normal(size=(256, 32)).astype(np.float32) / 16}
    weights |= {"large": random.normal(size=(256, 256)).astype(np.float32) / 16}
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["z"], name="large"),
        helper.make_node("MatMul", ["z", "small"], ["y"], name="small"),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", [12, 256])], [value("y", [12, 32])], initializer=tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    given = [{"x": random.normal(size=(12, 256)).astype(np.float32)} for _ in range(16)]
    data = data_of_samples(given, signature_of(model), "noise")
    _, report = prune_with_data(model, data, PruneOptions(max_drift=5.0))
    assert [layer.node for layer in report.pruned] == ["large"]
    assert [layer.reason for layer in report.skipped] == [
        "256 inputs to 32 outputs: below 256, seldom faster (TensorRT#3849)"
    ]
    _, report = prune_with_data(model, data, PruneOptions(max_drift=5.0, all_valid=True))
    assert len(report.pruned) == 2


def test_measurements_and_solutions_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = branches(tmp_path)
    options = PruneOptions(max_drift=0.2, work=tmp_path / "work")
    first, _ = prune_with_data(model, data, options)
    measured = 0
    measure = Judge.measure

    def counted(self: Judge, *given: object, **more: object) -> object:
        nonlocal measured
        measured += 1
        return measure(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "measure", counted)
    again, _ = prune_with_data(model, data, options)
    assert again.SerializeToString() == first.SerializeToString()
    assert measured == 2  # the result and its twin by magnitude, on the held-out samples


@pytest.mark.parametrize("count", [4, 8, 32])
def test_the_bound_holds_nineteen_times_in_twenty(count: int) -> None:
    """Errors of very different sizes, as of easy and hard inputs."""
    random = np.random.default_rng(count)
    errors, sizes = random.lognormal(0, 0.7, (4000, count)), random.lognormal(3, 0.3, (4000, count))
    true = np.sqrt(np.exp(0.7**2 / 2) / np.exp(3 + 0.3**2 / 2))
    bounds = [upper_bound(list(zip(e, s, strict=True))) for e, s in zip(errors, sizes, strict=True)]
    assert 0.92 < np.mean(np.array(bounds) >= true) < 0.99
    assert np.median(bounds) < {4: 4, 8: 2.2, 32: 1.4}[count] * true


@pytest.mark.parametrize(
    ("count", "alpha", "quantile"), [(3, 0.05, 6.314), (4, 0.01, 6.965), (5, 0.01, 4.541), (12, 0.005, 3.169)]
)
def test_the_bound_follows_students_tables(count: int, alpha: float, quantile: float) -> None:
    """Pairs whose logarithms pull evenly to both sides: no skewness, so the bound is the quantile's alone."""
    pull = np.linspace(-1, 1, count) * 1e-3
    pairs = [(1.0 + each, 1.0) for each in pull]
    total = count + pull.sum()
    logs = np.log((total - 1 - pull) / (count - 1))
    error = np.sqrt((count - 1) / count * ((logs - logs.mean()) ** 2).sum())
    assert upper_bound(pairs, alpha) == pytest.approx(np.sqrt(total / count * np.exp(quantile * error)), rel=1e-4)


def test_an_input_as_hard_as_the_worst_may_come_again() -> None:
    """Many equal samples say nothing about harder ones. One harder sample does."""
    easy = [(1.0, 100.0)] * 30
    assert upper_bound(easy) == pytest.approx(0.1, rel=1e-6)
    with_hard = [*easy, (4.0, 100.0)]
    assert upper_bound(with_hard) > np.sqrt((30 + 8) / 3200)


def test_the_bound_of_nothing() -> None:
    assert upper_bound([(0.0, 1.0)] * 5) == 0
    assert upper_bound([(0.1, 1.0)]) == np.inf
    assert upper_bound([(np.inf, 1.0), (0.1, 1.0)]) == np.inf
