"""Prune, then quantise: layers are corrected before quantisation, and the pattern holds on the quantised values."""

from __future__ import annotations

from pathlib import Path

from repo_manager import samples
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.pipeline.adding import AddOptions, SparsityMode, add
from repo_manager.precision import convert, load_calibration
from repo_manager.pruning import prune_with_data
from repo_manager.sparsity import SparsityVerdict, prune, sparsity_report
from repo_manager.stats.drift import DriftMeter
from repo_manager.types import Precision


def test_the_pattern_and_the_gain_survive_int8(tmp_path: Path) -> None:
    dense = load_model(samples.dense_twin())
    data = load_calibration(samples.calibration_data(), signature_of(dense))
    drifts = []
    for name, proto in (("data", prune_with_data(dense, data)[0]), ("magnitude", prune(dense)[0])):
        source = tmp_path / f"{name}.onnx"
        save_model(proto, source)
        target = tmp_path / f"{name}_int8.onnx"
        convert(load_model(source), Precision.INT8, target, calibration=data)
        layers = {layer.node: layer for layer in sparsity_report(load_model(target)).layers}
        pruned = [layer for layer in layers.values() if layer.verdict is SparsityVerdict.VALID]
        assert len(pruned) == 3, layers
        assert {layer.dtype for layer in pruned} == {"int8"}
        held_out = data.split()
        assert held_out is not None
        before, after = Session(dense.path), Session(target, optimize=False)
        meter = DriftMeter(before.output_names)
        for sample in held_out[1].batches():
            meter.add(after.run(sample), before.run(sample))
        drifts.append(meter.result()[0].relative_error)
    assert drifts[0] < 0.13
    assert drifts[0] < drifts[1] / 2


def test_add_prunes_then_quantises(tmp_path: Path) -> None:
    options = AddOptions(
        sparsity=SparsityMode.PRUNE,
        calibration=str(samples.calibration_data()),
        precision=Precision.INT8,
        backend="onnxruntime",
    )
    added = add(samples.dense_twin(), "digits", tmp_path / "repository", options)
    assert added.pruned is not None
    assert added.pruned.method == "second-order"
    assert added.conversion.precision is Precision.INT8
    valid = [layer for layer in added.sparsity.layers if layer.verdict is SparsityVerdict.VALID]
    assert [layer.dtype for layer in valid] == ["int8"] * 3
    assert added.conversion.drift[0].relative_error < 0.05  # against the pruned model
