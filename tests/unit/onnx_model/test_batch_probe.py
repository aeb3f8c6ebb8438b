"""Findings of a run alone, without the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import batch_blocks, onnx_models
from support.onnx_models import value

from repo_manager.onnx_model.batch_probe import BatchProbe, Finding, neighbours_of, probe_together, same_bits
from repo_manager.onnx_model.inputs import index_limits, natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of


def tried(proto: onnx.ModelProto, tmp_path: Path) -> Finding | None:
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    signature, limits = signature_of(model), index_limits(model)
    first, second = (natural_inputs(signature, seed=seed, limits=limits) for seed in (1, 2))
    return probe_together(BatchProbe(Session(model, threads=1), first, second, neighbours_of(first, [], limits)))


@pytest.mark.parametrize("name", batch_blocks.KEPT)
def test_samples_that_keep_apart(name: str, tmp_path: Path) -> None:
    assert tried(batch_blocks.one_block(name), tmp_path) is None


@pytest.mark.parametrize("name", batch_blocks.MIXED)
def test_samples_that_meet(name: str, tmp_path: Path) -> None:
    found = tried(batch_blocks.one_block(name), tmp_path)
    assert found is not None
    assert found.stackable


@pytest.mark.parametrize("share", [1e-3, 1e-5])
def test_a_dependence_far_below_the_tolerance(share: float, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "share"], ["little"]),
        helper.make_node("Add", ["x", "little"], ["y"]),
    ]
    proto = onnx_models.model(
        nodes, [value("x", ["N", 8])], [value("y", ["N", 8])], {"share": np.array(share, np.float32)}
    )
    found = tried(proto, tmp_path)
    assert found == Finding("output 'y' of a sample changes with the sample stacked beside it")


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL])
def test_whole_numbers_and_flags(kind: int, tmp_path: Path) -> None:
    def proto(axes: list[int]) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["f"], ["m"], axes=axes),
            helper.make_node("Sub", ["f", "m"], ["y"]),
        ]
        return onnx_models.model(nodes, [value("x", ["N", 8], kind)], [value("y", ["N", 8])])

    assert tried(proto([1]), tmp_path) is None
    # Random samples often share their maximum. The extremes of the type tell the samples apart.
    assert tried(proto([0, 1]), tmp_path) is not None


def test_neighbours_are_valid_and_very_different() -> None:
    sample = {
        "f": np.array([[1.5, -2.0]], np.float16),
        "i": np.array([[3, 4]], np.int64),
        "s": np.array([["a", "b"]], object),
        "b": np.array([[True, False]]),
    }
    made = neighbours_of(sample, [], {"i": 10})
    assert all(each[name].dtype == array.dtype for each in made for name, array in sample.items())
    assert {float(np.abs(each["f"]).max()) for each in made} >= {0.0, 65504.0, 2000.0}
    assert all(0 <= each["i"].min() <= each["i"].max() < 10 for each in made)
    assert len({int(each["i"].max()) for each in made}) >= 3
    assert len({each["s"][0, 0] for each in made}) == 5


def test_bits_are_compared_but_for_a_few_units() -> None:
    one = np.array([1.0, np.nan, np.inf, 0.0], np.float32)
    near = one.copy()
    near[0] = np.nextafter(np.float32(1), np.float32(2))
    assert same_bits(one, one.copy())
    assert not same_bits(one, near)
    assert same_bits(one, near, units=4)
    assert not same_bits(one, one * np.float32(1.0001), units=4)
    assert not same_bits(one, one[:3])
