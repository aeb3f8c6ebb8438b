"""The 2:4 pattern itself: in every four consecutive values along an axis, at most two are not zero.

Rule: NVIDIA TensorRT documentation, "Structured Sparsity" (data formats and tensors). Mask: NVIDIA ASP
(`sparse_masklib`, m4n2_1d).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUP", "count_groups", "count_nonzero", "magnitude_prune", "nonzero", "two_four_mask", "valid_groups"]

GROUP = 4
_BLOCK_ELEMENTS = 1 << 17  # elements: one block's temporaries fit the processor's cache
_LONG_RUN = 128  # elements: in longer runs, NumPy's inner loop costs more than its start
_SIGN_FREE = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}
_UNSIGNED_ZERO_TYPES = ("fnuz", "e8m0")  # float8 types without a negative zero: its bit pattern is NaN


def nonzero(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where values are not zero: -0.0 is zero, NaN is not.

    Args:
        array: any real or integer type, ml_dtypes' included.
    """
    dtype = array.dtype
    if dtype.kind in "iub" or dtype in (np.float32, np.float64):
        return np.asarray(array != 0)
    if dtype.kind == "c":
        return np.asarray(array != 0)
    # NumPy compares float16, bfloat16 and float8 one by one, but their bits as integers in bulk.
    bits = array.view(f"u{dtype.itemsize}")
    if any(part in dtype.name for part in _UNSIGNED_ZERO_TYPES):
        return np.ones(array.shape, bool) if "e8m0" in dtype.name else np.asarray(bits != 0)
    return np.asarray((bits & bits.dtype.type(_SIGN_FREE[dtype.itemsize])) != 0)


def count_nonzero(array: NDArray[Any]) -> int:
    """Return how many values are not zero, in blocks."""
    flat = _memory_order(array, 0)[0].reshape(-1)
    return sum(
        int(np.count_nonzero(nonzero(flat[start : start + _BLOCK_ELEMENTS])))
        for start in range(0, flat.size, _BLOCK_ELEMENTS)
    )


def valid_groups(array: NDArray[Any], axis: int) -> tuple[int, int]:
    """Count the groups of four along an axis, and those of them with at most two non-zeros.

    Args:
        array: the weight, any rank from 1 and any numeric type. Zero is value 0: subtract a zero point first.
        axis: the reduction axis. Negative counts from the end. Its size must divide by 4.

    Returns:
        (valid groups, all groups).

    Raises:
        ValueError: the axis does not exist or its size does not divide by 4.
    """
    valid, groups, _ = count_groups(array, axis)
    return valid, groups


def count_groups(array: NDArray[Any], axis: int) -> tuple[int, int, int]:
    """As `valid_groups`, and third the number of non-zero values, in the same pass."""
    _check_axis(array, axis)
    groups = array.size // GROUP
    if groups == 0:
        return 0, 0, 0
    ordered, axis = _memory_order(array, axis)
    run = math.prod(ordered.shape[axis + 1 :])
    flat = ordered.reshape(-1, GROUP, run)
    step = max(1, _BLOCK_ELEMENTS // (GROUP * run))
    bad = filled = 0
    for start in range(0, flat.shape[0], step):
        block_bad, block_filled = _count_block(nonzero(flat[start : start + step]))
        bad += block_bad
        filled += block_filled
    return groups - bad, groups, filled


def _count_block(filled: NDArray[np.bool_]) -> tuple[int, int]:
    """Count groups with more than two set, and all set values, in `[groups, 4, run]`."""
    run = filled.shape[2]
    ones = filled.view(np.uint8)
    if run == 1:
        # A group's four bytes are one word. The product's top byte is their sum.
        words = ones.reshape(-1).view(np.uint32)
        sums = (words * np.uint32(0x01010101)) >> np.uint32(24)
        return int(np.count_nonzero(sums > 2)), int(np.count_nonzero(filled))
    if run >= _LONG_RUN:
        sums8 = ones[:, 0] + ones[:, 1]
        sums8 += ones[:, 2]
        sums8 += ones[:, 3]
        return int(np.count_nonzero(sums8 > 2)), int(np.count_nonzero(filled))
    # Short runs (3x3 kernels): add the whole block to itself shifted, then read only the group starts.
    line = ones.reshape(-1)
    length = line.size - 3 * run
    sums8 = line[:length] + line[run : run + length]
    sums8 += line[2 * run : 2 * run + length]
    sums8 += line[3 * run : 3 * run + length]
    starts = np.zeros((filled.shape[0], GROUP * run), bool)
    starts[:, :run] = True
    over = (sums8 > 2) & starts.reshape(-1)[:length]
    return int(np.count_nonzero(over)), int(np.count_nonzero(filled))


def two_four_mask(array: NDArray[Any], axis: int) -> NDArray[np.bool_]:
    """Return the mask of the values a 2:4 magnitude pruning keeps.

    Per group of four, of the six pairs the one with the largest sum of magnitudes. On a tie the first pair of (0,1)
    (0,2) (0,3) (1,2) (1,3) (2,3). It is the two largest magnitudes, the lower index first among equals. NaN counts as
    infinitely large, so it stays visible.

    Args:
        array: the weight, any numeric type.
        axis: the reduction axis. Its size must divide by 4.

    Returns:
        `True` where a value is kept, exactly two in each group. Shape of `array`.

    Raises:
        ValueError: the axis does not exist or its size does not divide by 4.
    """
    _check_axis(array, axis)
    mask = np.empty(array.shape, bool)
    if array.size == 0:
        return mask
    ordered, place = _memory_order(array, axis)
    target, _ = _memory_order_like(mask, array)
    run = math.prod(ordered.shape[place + 1 :])
    values = ordered.reshape(-1, GROUP, run)
    kept = np.empty(values.shape, bool)
    step = max(1, _BLOCK_ELEMENTS // (GROUP * run))
    for start in range(0, values.shape[0], step):
        kept[start : start + step] = _mask_block(values[start : start + step])
    target[...] = kept.reshape(ordered.shape)
    return mask


def magnitude_prune(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], int, float]:
    """Prune to 2:4 in one pass.

    Args:
        array: the weight, C-contiguous, any numeric type.
        axis: the reduction axis. Its size must divide by 4.

    Returns:
        (a new array, how many non-zeros became zero, their share of the sum of magnitudes; 0 when the sum is not
        finite).

    Raises:
        ValueError: the axis does not exist or its size does not divide by 4.
    """
    _check_axis(array, axis)
    run = math.prod(array.shape[axis % array.ndim + 1 :])
    values = array.reshape(-1, GROUP, run)
    new = np.empty_like(values)
    bits = f"u{array.dtype.itemsize}"
    step = max(1, _BLOCK_ELEMENTS // (GROUP * run)) if run else 1
    count, kept, total = 0, 0.0, 0.0
    for start in range(0, values.shape[0], step):
        block, target = values[start : start + step], new[start : start + step]
        filled = nonzero(block)
        keep = _mask_block(block) | ~filled
        # Multiplying bits by 0 or 1 is many times faster than a branch per value, because no processor predicts it.
        np.multiply(block.view(bits), keep.view(np.uint8), out=target.view(bits))
        count += int(np.count_nonzero(keep < filled))
        with np.errstate(over="ignore", invalid="ignore"):
            total += float(np.abs(block.astype(np.float32, copy=False)).sum())
            kept += float(np.abs(target.astype(np.float32, copy=False)).sum())
    lost = (total - kept) / total if count and total and math.isfinite(total) else 0.0
    return new.reshape(array.shape), count, lost


def _mask_block(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Keep the two largest of each four in `[groups, 4, run]`: those with fewer than two ahead of them."""
    sizes = [np.ascontiguousarray(part) for part in np.moveaxis(_magnitude(values), 1, 0)]
    ahead = np.zeros((GROUP, *sizes[0].shape), np.uint8)
    for first in range(GROUP):
        for second in range(first + 1, GROUP):
            later_wins = sizes[second] > sizes[first]
            ahead[first] += later_wins
            ahead[second] += ~later_wins
    return np.moveaxis(ahead < 2, 0, 1)


def _magnitude(values: NDArray[Any]) -> NDArray[Any]:
    """Return comparable magnitudes. For every float type, their bits without the sign sort like their size."""
    dtype = values.dtype
    if dtype.kind == "u" or dtype.kind == "b":
        return values
    if dtype.kind == "i":
        return np.abs(values.astype(np.int64)) if dtype.itemsize < 8 else np.abs(values.astype(np.float64))
    if dtype.kind == "c":
        return np.asarray(np.abs(values))
    bits = values.view(f"u{dtype.itemsize}")
    if any(part in dtype.name for part in _UNSIGNED_ZERO_TYPES):
        magnitude = values.astype(np.float32)
        return np.where(np.isnan(magnitude), np.float32(np.inf), np.abs(magnitude))
    return np.asarray(bits & bits.dtype.type(_SIGN_FREE[dtype.itemsize]))


def _check_axis(array: NDArray[Any], axis: int) -> None:
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis {axis} does not exist in an array of rank {array.ndim}")
    if array.shape[axis] % GROUP:
        raise ValueError(f"axis {axis} has size {array.shape[axis]}, which does not divide by {GROUP}")


def _order(array: NDArray[Any]) -> list[int]:
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def _memory_order(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], int]:
    """Return the array with its axes as they are in memory (no copy for a transposed view), and where `axis` went."""
    if array.ndim == 0 or array.flags.c_contiguous:
        return array, axis % max(array.ndim, 1)
    order = _order(array)
    return np.ascontiguousarray(array.transpose(order)), order.index(axis % array.ndim)


def _memory_order_like(array: NDArray[Any], pattern: NDArray[Any]) -> tuple[NDArray[Any], list[int]]:
    """Return a view of `array` with its axes in the memory order of `pattern`."""
    order = list(range(pattern.ndim)) if pattern.flags.c_contiguous else _order(pattern)
    return array.transpose(order), order
