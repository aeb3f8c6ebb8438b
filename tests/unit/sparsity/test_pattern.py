"""The 2:4 test and mask against a slow, obvious reference: every type, axis, rank and memory layout."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_manager.sparsity.pattern import count_groups, count_nonzero, nonzero, two_four_mask, valid_groups

DTYPES = [
    np.float32, np.float16, np.float64, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint16, np.bool_,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz,
]  # fmt: skip
PAIRS = list(itertools.combinations(range(4), 2))


def is_zero(value: object) -> bool:
    """0.0, -0.0, 0, False; not NaN."""
    return float(value) == 0.0  # type: ignore[arg-type]


def groups_of(array: np.ndarray, axis: int) -> list[tuple[tuple, list]]:
    """Every group of four with its place, by plain loops."""
    axis %= array.ndim
    others = [range(size) if i != axis else range(0, size, 4) for i, size in enumerate(array.shape)]
    found = []
    for index in itertools.product(*others):
        places = [tuple(index[i] + (k if i == axis else 0) for i in range(array.ndim)) for k in range(4)]
        found.append((index, [array[place] for place in places]))
    return found


def slow_scan(array: np.ndarray, axis: int) -> tuple[int, int, int]:
    groups = groups_of(array, axis)
    valid = sum(sum(not is_zero(v) for v in values) <= 2 for _, values in groups)
    return valid, len(groups), sum(not is_zero(v) for v in array.reshape(-1))


def slow_mask(array: np.ndarray, axis: int) -> np.ndarray:
    mask = np.zeros(array.shape, bool)
    axis %= array.ndim
    for index, values in groups_of(array, axis):
        sizes = [abs(float(v)) for v in values]
        best = max(PAIRS, key=lambda pair: (sizes[pair[0]] + sizes[pair[1]], -PAIRS.index(pair)))
        for k in best:
            mask[tuple(index[i] + (k if i == axis else 0) for i in range(array.ndim))] = True
    return mask


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    shape[axis] = 4 * draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
    values = generator.integers(-8, 9, shape) * (generator.random(shape) < density)
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    array = (np.abs(values) if dtype.kind == "u" else values).astype(dtype)
    if dtype.kind == "f" and draw(st.booleans()):
        array[generator.random(shape) < 0.3] *= -1  # -0.0 among them
    if draw(st.booleans()):
        order = draw(st.permutations(range(rank)))
        array = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if draw(st.booleans()):
        array = np.flip(array, draw(st.integers(0, rank - 1)))
    return array, axis - rank if draw(st.booleans()) else axis


@settings(max_examples=300, deadline=None)
@given(weights())
def test_scan_agrees_with_the_reference(case: tuple[np.ndarray, int]) -> None:
    array, axis = case
    assert count_groups(array, axis) == slow_scan(array, axis)
    assert valid_groups(array, axis) == slow_scan(array, axis)[:2]
    assert count_nonzero(array) == slow_scan(array, axis)[2]


@settings(max_examples=300, deadline=None)
@given(weights())
def test_mask_agrees_with_the_reference(case: tuple[np.ndarray, int]) -> None:
    array, axis = case
    mask = two_four_mask(array, axis)
    np.testing.assert_array_equal(mask, slow_mask(array, axis))
    kept = np.where(mask, array, np.zeros((), array.dtype))
    valid, groups = valid_groups(kept, axis)
    assert valid == groups


@pytest.mark.parametrize("run", [1, 9, 127, 128, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_blocks_join_up(run: int, dtype: str) -> None:
    """Large enough for several blocks, in each of the three ways to count."""
    generator = np.random.default_rng(run)
    values = generator.integers(-2, 3, (300_000 // (4 * run) + 1, 4, run)).astype(dtype)
    filled = values != 0
    expected = int((filled.sum(axis=1) <= 2).sum())
    assert count_groups(values, 1) == (expected, values.shape[0] * run, int(filled.sum()))
    order = np.argsort(-np.abs(values.astype(np.float32)), axis=1, kind="stable")
    reference = np.zeros(values.shape, bool)
    np.put_along_axis(reference, order[:, :2], True, axis=1)
    np.testing.assert_array_equal(two_four_mask(values, 1), reference)


def test_negative_zero_is_zero_and_nan_is_not() -> None:
    for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        values = np.array([-0.0, 0.0, np.nan, 1.0], np.float32).astype(dtype)
        assert nonzero(values).tolist() == [False, False, True, True]
        assert valid_groups(values, 0) == (1, 1)
        worse = np.array([np.nan, -0.0, np.nan, 1.0], np.float32).astype(dtype)
        assert valid_groups(worse, 0) == (0, 1)


def test_small_numbers_are_not_zero() -> None:
    tiny = np.array([1e-45, 1e-40, 0, 1e-38], np.float32)
    assert nonzero(tiny).tolist() == [True, True, False, True]
    assert valid_groups(tiny, 0) == (0, 1)


def test_ties_keep_the_lowest_index() -> None:
    assert two_four_mask(np.array([1, -1, 1, 1], np.int8), 0).tolist() == [True, True, False, False]
    assert two_four_mask(np.array([0, 2, 1, 1.0]), 0).tolist() == [False, True, True, False]
    assert two_four_mask(np.zeros(4, np.float16), 0).tolist() == [True, True, False, False]


def test_extremes_of_integers() -> None:
    assert two_four_mask(np.array([-128, 127, 127, 1], np.int8), 0).tolist() == [True, True, False, False]
    assert two_four_mask(np.array([1, 2, -(2**63), 3], np.int64), 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("shape", "axis"), [((6,), 0), ((4, 3), 1), ((4,), 1), ((4,), -2)])
def test_what_cannot_be_grouped(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(ValueError, match="axis"):
        valid_groups(np.zeros(shape), axis)
    with pytest.raises(ValueError, match="axis"):
        two_four_mask(np.zeros(shape), axis)


def test_no_values() -> None:
    assert valid_groups(np.zeros((0, 4), np.float32), 1) == (0, 0)
    assert two_four_mask(np.zeros((0, 4), np.float32), 1).shape == (0, 4)
