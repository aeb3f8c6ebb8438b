"""The example's pruning is ASP's, and its retraining holds the mask. Needs PyTorch (`[train]`)."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[3] / "examples" / "train_sparse_digits.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_sparse_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_mask_keeps_the_pattern_with_the_largest_sum_of_magnitudes(recipe: ModuleType) -> None:
    weight = torch.randn(8, 16, 3, 2, generator=torch.Generator().manual_seed(1))
    mask = recipe.two_four_mask(weight)
    assert mask.shape == weight.shape
    for k, r, s in itertools.product(range(8), range(3), range(2)):
        for start in range(0, 16, 4):
            group = weight[k, start : start + 4, r, s].abs().numpy()
            best = max(itertools.combinations(range(4), 2), key=lambda pair: group[list(pair)].sum())
            assert tuple(np.flatnonzero(mask[k, start : start + 4, r, s].numpy())) == best


def test_only_layers_that_asp_prunes_get_a_mask(recipe: ModuleType) -> None:
    assert set(recipe.masks_of(recipe.build_network())) == {"conv2.weight", "conv3.weight", "linear1.weight"}


def test_retraining_moves_weights_and_keeps_the_zeros(recipe: ModuleType) -> None:
    digits = recipe.load_data()
    variants = recipe.train_variants(3, digits, recipe.Schedule(epochs=1))
    for name in recipe.masks_of(variants.dense):
        pruned, sparse = variants.pruned.get_parameter(name), variants.sparse.get_parameter(name)
        assert torch.equal(pruned == 0, sparse == 0)
        assert (pruned == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        assert not torch.equal(pruned, sparse)
        kept = pruned != 0
        assert torch.equal(pruned[kept], variants.dense.get_parameter(name)[kept])


def test_folding_batch_normalisation_changes_no_answer(recipe: ModuleType) -> None:
    digits = recipe.load_data()
    network = recipe.train_variants(0, digits, recipe.Schedule(epochs=1)).sparse
    images = torch.from_numpy(digits.held_out_images[:32])
    with torch.no_grad():
        torch.testing.assert_close(recipe.folded(network)(images), network(images), rtol=1e-4, atol=1e-4)
