"""Distillation: refused where PyTorch computes something else, and only values of constants change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models

from repo_manager import samples
from repo_manager.errors import CalibrationError, MissingDependencyError, ModelError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import is_installed
from repo_manager.precision import load_calibration
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.pruning import PruneOptions, distill, prune_with_data, torch_operators
from repo_manager.pruning.judge import is_better
from repo_manager.sparsity import SparsityVerdict, sparsity_report

DISTIL = PruneOptions(distill=True, epochs=2, all_valid=True)
needs_torch = pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")


def model_with(node: onnx.NodeProto, tmp_path: Path, *, domain: str = "") -> Model:
    """x [1, 8] -> MatMul -> the node -> y."""
    weight = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    product = helper.make_node("MatMul", ["x", "w"], ["h"], "product")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [product, node],
        "g",
        [value("x", TensorProto.FLOAT, [1, 8])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return load_model(onnx_models.save(proto, tmp_path / "m.onnx"))


def data_for(model: Model, count: int = 16) -> CalibrationData:
    random, signature = np.random.default_rng(3), signature_of(model)
    given = [{"x": random.normal(size=(1, 8)).astype(np.float32)} for _ in range(count)]
    return data_of_samples(given, signature, "made up")


def digits() -> tuple[Model, CalibrationData]:
    model = load_model(samples.dense_twin())
    return model, load_calibration(samples.calibration_data(), signature_of(model))


def test_a_budget_and_too_few_samples_are_refused(tmp_path: Path) -> None:
    model = model_with(helper.make_node("Relu", ["h"], ["y"], "act"), tmp_path)
    with pytest.raises(UsageError, match="within a budget"):
        prune_with_data(model, data_for(model), PruneOptions(distill=True, max_drift=0.1))
    with pytest.raises(CalibrationError, match="distillation needs 16"):
        prune_with_data(model, data_for(model, 15), DISTIL)


@needs_torch
def test_training_that_does_harm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_RATE", 10.0)
    model, data = digits()
    proto, report = prune_with_data(model, data, DISTIL)
    found = report.evidence.distillation if report.evidence is not None else None
    assert found is not None
    assert found.kept_epoch == 0
    assert min(found.errors) == found.errors[0]
    before = {tensor.name: tensor for tensor in onnx.load(model.path).graph.initializer}
    by_pruning = {name for layer in report.pruned for name in (layer.weight, layer.shifted)}
    others = [tensor for tensor in proto.graph.initializer if tensor.name not in by_pruning]
    assert others  # such as the biases of dense layers, trained as well
    assert all(tensor == before[tensor.name] for tensor in others)


def test_a_gain_by_chance_is_told_from_one_that_lasts() -> None:
    random = np.random.default_rng(3)
    sizes = np.full(16, 100.0)
    old = random.lognormal(0, 0.7, 16)

    def errors(values: np.ndarray) -> dict[str, list[tuple[float, float]]]:
        return {"y": list(zip(values.tolist(), sizes.tolist(), strict=True))}

    assert is_better(errors(old), errors(0.9 * old))
    assert not is_better(errors(old), errors(old))
    assert not is_better(errors(0.9 * old), errors(old))
    one_gains = np.where(np.arange(16) == 0, 0.5, 1.01) * np.ones(16)  # half the error of one, a little more elsewhere
    assert one_gains.sum() < 16
    assert not is_better(errors(np.ones(16)), errors(one_gains))
    assert not is_better(errors(old), errors(np.where(np.arange(16) == 3, np.inf, 0.5 * old)))


@pytest.mark.skipif(is_installed("torch"), reason="torch is installed")
def test_without_pytorch_the_extra_is_named() -> None:
    model, data = digits()
    with pytest.raises(MissingDependencyError) as refused:
        prune_with_data(model, data, DISTIL)
    assert "[train]" in str(refused.value.hint)


@needs_torch
def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    model = model_with(helper.make_node("Hardmax", ["h"], ["y"], "winner"), tmp_path)
    with pytest.raises(ModelError, match="cannot distil operator Hardmax \\(node 'winner'\\)"):
        prune_with_data(model, data_for(model), DISTIL)


@needs_torch
def test_an_operator_that_pytorch_computes_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_operators.OPERATORS, "Relu", lambda call, x: x)
    model = model_with(helper.make_node("Relu", ["h"], ["y"], "act"), tmp_path)
    with pytest.raises(ModelError, match="operator Relu \\(node 'act'\\): PyTorch computes 'y' otherwise"):
        prune_with_data(model, data_for(model), DISTIL)


@needs_torch
def test_a_trained_model_comes_closer_and_only_values_change() -> None:
    model, data = digits()
    # So much damping leaves the values near the dense ones, so training can gain something.
    options = PruneOptions(distill=True, epochs=2, all_valid=True, damping=30.0)
    proto, report = prune_with_data(model, data, options)
    again, _ = prune_with_data(model, data, replace(options, threads=1))
    assert again == proto
    found = report.evidence.distillation if report.evidence is not None else None
    assert found is not None
    assert found.largest_difference < 1e-5
    assert found.errors[found.kept_epoch] == min(found.errors)
    assert found.kept_epoch > 0
    verdicts = {layer.node: layer.verdict for layer in sparsity_report(proto).layers}
    assert all(verdicts[layer.node] is SparsityVerdict.VALID for layer in report.pruned)
    before = onnx.load(model.path)
    changed = [
        tensor.name
        for tensor, old in zip(proto.graph.initializer, before.graph.initializer, strict=True)
        if tensor.SerializeToString() != old.SerializeToString()
    ]
    assert {layer.weight for layer in report.pruned} <= set(changed)
    for one in (proto, before):
        for tensor in one.graph.initializer:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    assert proto == before
