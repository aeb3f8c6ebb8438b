"""Permute channels to spread large weights over groups of four (Pool and Yu, "Channel Permutations for N:M Sparsity",
2021).

The producers of a layer's input channels absorb the permutation, so the graph stays as it is and only stored tensors
change. The model's answers stay the same except for the order of sums. Running both proves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.onnx_model.draft import Draft, Weight, weight_of_array
from repo_manager.pruning.channels import Channels, channels_of
from repo_manager.sparsity.pattern import GROUP

__all__ = ["Permuted", "permuted"]

Array = NDArray[Any]

_ROWS = 512  # rows that represent all rows
_PASSES = 32
_PATIENCE = 8  # passes without a gain
_SPLITS = [(0, *rest) for rest in itertools.combinations(range(1, 2 * GROUP), GROUP - 1)]
"""Ways to part eight channels in two groups."""


@dataclass(frozen=True)
class Permuted:
    """A permutation of channels.

    Attributes:
        weights: the changed constants, by name.
        channels: how many channels are in classes permuted.
        kept_before: share of magnitude 2:4 keeps in the layers with permuted inputs, before the permutation. 1 without
            any.
        kept_after: the same after the permutation.
        layers: the tensors of these layers.
    """

    weights: Mapping[str, Weight]
    channels: int
    kept_before: float
    kept_after: float
    layers: tuple[str, ...]


def permuted(draft: Draft, pruned: Sequence[str], seed: int = 0) -> Permuted:
    """Permute the channels the layers to prune read, where the graph lets their producers absorb it.

    Args:
        draft: the dense model, not changed. The new weights are in the result.
        pruned: names of the tensors to make 2:4.
        seed: seed of the random numbers. Equal seeds give equal results.
    """
    channels = channels_of(draft)
    wanted = [axis for axis in channels.axes if axis.reduces and axis.weight in set(pruned)]
    orders = {number: np.arange(size) for number, size in enumerate(channels.sizes)}
    random, changed = np.random.default_rng(seed), set[int]()
    for number in dict.fromkeys(channels.root(one) for axis in wanted for one in axis.classes):
        if not channels.is_free(number):
            continue
        parts = []
        for axis in wanted:
            start = 0
            for one in axis.classes:
                size = channels.sizes[one]
                if channels.root(one) == number and start % GROUP == 0 and size % GROUP == 0:
                    values = np.moveaxis(draft.weights[axis.weight].load(), axis.axis, -1)[..., start : start + size]
                    parts.append(np.abs(values.reshape(-1, size)).astype(np.float32))
                start += size
        if parts:
            orders[number] = _search(np.concatenate(parts), random)
            if (orders[number] != np.arange(len(orders[number]))).any():
                changed.add(number)
    weights = _apply(draft, channels, orders, changed)
    layers = tuple(axis.weight for axis in wanted if any(channels.root(one) in changed for one in axis.classes))
    places = {axis.weight: axis.axis for axis in wanted}
    before, after = ([_kept(table[name].load(), places[name]) for name in layers] for table in (draft.weights, weights))
    return Permuted(
        weights=weights,
        channels=sum(channels.sizes[number] for number in changed),
        kept_before=_share(before),
        kept_after=_share(after),
        layers=layers,
    )


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    total = sum(whole for _, whole in pairs)
    return sum(kept for kept, _ in pairs) / total if total else 1.0


def _kept(values: Array, axis: int) -> tuple[float, float]:
    sizes = np.abs(np.moveaxis(values, axis, -1)).astype(np.float64).reshape(-1, GROUP)
    return float(np.sort(sizes, axis=1)[:, GROUP // 2 :].sum()), float(sizes.sum())


def _apply(draft: Draft, channels: Channels, orders: Mapping[int, Array], changed: set[int]) -> dict[str, Weight]:
    """Return the constants in their new order."""
    found: dict[str, Weight] = {}
    for axis in channels.axes:
        if not any(channels.root(number) in changed for number in axis.classes):
            continue
        places, start = [], 0
        for number in axis.classes:
            places.append(start + orders[channels.root(number)])
            start += channels.sizes[number]
        before = found.get(axis.weight, draft.weights[axis.weight])
        values = np.ascontiguousarray(np.take(before.load(), np.concatenate(places), axis.axis))
        found[axis.weight] = weight_of_array(values, before.data_type)
    return found


def _search(sizes: Array, random: np.random.Generator) -> Array:
    """Return an order of the columns with more kept by 2:4: pairs of groups exchange columns as long as this gains.

    Args:
        sizes: magnitudes, `[rows, columns]`. Of many rows, some drawn ones represent all.
        random: draws pairs, and the rows to represent all.
    """
    columns = sizes.shape[1]
    groups = columns // GROUP
    order = np.arange(columns)
    if groups < 2:
        return order
    if len(sizes) > _ROWS:
        sizes = sizes[random.choice(len(sizes), _ROWS, replace=False)]
    columns_first = np.ascontiguousarray(sizes.T)
    least, idle = 1e-6 * float(sizes.sum()), 0
    for _ in range(_PASSES):
        pairs = random.permutation(groups)[: groups // 2 * 2].reshape(-1, 2)
        gained = 0.0
        for first, second in pairs:
            at = np.r_[first * GROUP : (first + 1) * GROUP, second * GROUP : (second + 1) * GROUP]
            kept = _kept_by_split(columns_first[order[at]])
            best = int(kept.argmax())
            gain = float(kept[best] - kept[0])
            if gain > least / groups:
                left = list(_SPLITS[best])
                right = [place for place in range(2 * GROUP) if place not in left]
                order[at] = order[at][left + right]
                gained += gain
        idle = 0 if gained > least else idle + 1
        if idle >= _PATIENCE:
            break
    return order


def _kept_by_split(sizes: Array) -> Array:
    """Return the magnitude 2:4 keeps of eight columns `[8, rows]`, for each way to part them."""
    low, high = np.empty((8, 8), object), np.empty((8, 8), object)
    for one, other in itertools.combinations(range(2 * GROUP), 2):
        low[one, other] = np.minimum(sizes[one], sizes[other])
        high[one, other] = np.maximum(sizes[one], sizes[other])

    def kept(a: int, b: int, c: int, d: int) -> float:
        second = np.maximum(np.minimum(high[a, b], high[c, d]), np.maximum(low[a, b], low[c, d]))
        return float(np.maximum(high[a, b], high[c, d]).sum() + second.sum())

    found = []
    for left in _SPLITS:
        right = [place for place in range(2 * GROUP) if place not in left]
        found.append(kept(*left) + kept(right[0], right[1], right[2], right[3]))
    return np.array(found)
