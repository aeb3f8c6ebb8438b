"""Verdicts of the graph on random graphs and single blocks, compared with a slow oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto
from support import batch_blocks, onnx_models

from repo_manager.onnx_model.batch_axis import find_batch_axis
from repo_manager.onnx_model.batch_graph import judge_graph
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of

_DRAWS = 12


def samples_meet(proto: onnx.ModelProto, seed: int = 0) -> bool:
    """Whether any of many neighbours changes a sample's answer, in float64 by ONNX's own slow evaluator."""
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        return _meet(proto, random)


def _meet(proto: onnx.ModelProto, random: np.random.Generator) -> bool:
    evaluator = onnx.reference.ReferenceEvaluator(proto)
    shape = (batch_blocks.T, batch_blocks.C)
    sample = random.standard_normal(shape)
    alone = evaluator.run(None, {"x": sample[None]})[0][0]
    for draw in range(_DRAWS):
        size = int(random.integers(2, 6))
        batch = random.standard_normal((size, *shape)) * 10.0 ** random.integers(-3, 4)
        place = draw % size
        batch[place] = sample
        found = evaluator.run(None, {"x": batch})[0]
        if found.shape != batch.shape or not np.allclose(found[place], alone, rtol=1e-9, atol=1e-12):
            return True
    return False


@pytest.mark.parametrize("name", batch_blocks.KEPT)
def test_blocks_that_keep_samples_apart(name: str, tmp_path: Path) -> None:
    assert not samples_meet(batch_blocks.one_block(name, TensorProto.DOUBLE))
    model = load_model(onnx_models.save(batch_blocks.one_block(name), tmp_path / "m.onnx"))
    assert judge_graph(model).kind == "independent"


@pytest.mark.parametrize("name", batch_blocks.MIXED)
def test_blocks_in_which_samples_meet(name: str, tmp_path: Path) -> None:
    assert samples_meet(batch_blocks.one_block(name, TensorProto.DOUBLE))
    model = load_model(onnx_models.save(batch_blocks.one_block(name), tmp_path / "m.onnx"))
    assert judge_graph(model).kind != "independent"
    found = find_batch_axis(model, signature_of(model))
    assert (found.kind, found.stackable) == ("unbatched", True)


@pytest.mark.parametrize("mixed", [False, True])
def test_random_graphs(mixed: bool, tmp_path: Path) -> None:
    wrong = []
    for seed in range(150):
        proto, names = batch_blocks.chain(seed, mixed=mixed)
        model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
        if find_batch_axis(model, signature_of(model)).batched == mixed:
            truth = samples_meet(batch_blocks.chain(seed, mixed=mixed, dtype=TensorProto.DOUBLE)[0])
            wrong.append((seed, names, f"samples meet: {truth}", judge_graph(model).reason))
    assert not wrong
