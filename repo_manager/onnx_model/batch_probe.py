"""Find out by running whether the samples of a batch depend on each other.

A batch of one size runs by the same kernels in the same order for all numbers. So a sample's rows must come out the
same, to the last bits, beside every neighbour: a quiet one and a loud one, zeros, the type's extremes. Only a batch of
another size may round otherwise.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.session import Session

__all__ = ["BatchProbe", "neighbours_of", "probe_together"]

Arrays = Mapping[str, NDArray[Any]]
_TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2}  # share of the largest magnitude; 1e-3 for other types
_ROUNDING_AT_MOST = 0.05  # share of the largest magnitude; a larger change is not rounding
_PLACES = {"float16": 4e-3, "bfloat16": 3e-2}  # rounding of kernels, as a share of the largest magnitude; others 2e-5
_SAME_KERNELS = 4  # units in the last place: threads may split a sum differently
_BUDGET_S = 20.0
_LARGER = 8
"""A batch size that is probed too: the default of `max_batch_size`."""


@dataclass(frozen=True)
class BatchProbe:
    """Two samples, each alone and beside others.

    Attributes:
        session: runs the model, by one thread.
        first: a sample, inputs of one row.
        second: another sample, inputs of one row.
        neighbours: samples to put beside them, of very different sizes.
    """

    session: Session
    first: Arrays
    second: Arrays
    neighbours: Sequence[Arrays]


@dataclass(frozen=True)
class Finding:
    """The evidence of a run.

    Attributes:
        reason: how samples depend on each other, or why no run could tell, in words.
        stackable: the outputs' shapes are those of samples in a row all the same.
    """

    reason: str
    stackable: bool = True


def probe_together(probe: BatchProbe) -> Finding | None:
    """Return how samples depend on each other, or `None` when no run shows it."""
    session = probe.session
    try:
        alone = [session.run(probe.first), session.run(probe.second)]
        again = session.run(probe.first)
    except ModelError as exc:
        return Finding(f"it could not be tried out on made inputs: {exc.message}")
    random = next((name for name, value in again.items() if not same_bits(value, alone[0][name])), None)
    if random is not None:
        return Finding(f"output '{random}' differs from run to run for the same input")
    try:
        together = session.run(_stacked([probe.first, probe.second]))
    except ModelError as exc:
        return Finding(f"it fails on two samples stacked: {exc.message}", stackable=False)
    for name, value in together.items():
        reason = _shape_reason(name, value, [result[name] for result in alone])
        if reason is not None:
            return Finding(reason, stackable=False)
    for name, value in together.items():
        if not _close(value, np.concatenate([result[name] for result in alone]), _ROUNDING_AT_MOST):
            return Finding(f"output '{name}' changes when two samples are stacked")
    reason = (
        _beside_neighbours(probe)
        or _on_another_place(probe, session.output_names)
        or _against_one(probe, together, alone)
    )
    return None if reason is None else Finding(reason)


def neighbours_of(sample: Arrays, others: Sequence[Arrays], limits: Mapping[str, int]) -> list[Arrays]:
    """Return valid inputs of very different sizes: scaled, zero, and the extremes of each type.

    Args:
        sample: input name -> array of one row. Shapes and types stay.
        others: more samples. Integers without a known limit are taken from them.
        limits: integers of these inputs stay below this number (`index_limits`).
    """
    kinds = ("loud", "quiet", "zero", "largest", "smallest")
    made = [{name: _neighbour(array, kind, limits.get(name)) for name, array in sample.items()} for kind in kinds]
    return [*others, *made]


def _neighbour(array: NDArray[Any], kind: str, limit: int | None) -> NDArray[Any]:
    dtype = array.dtype
    if dtype.kind == "f" or dtype.name in ("bfloat16",):
        largest = float(np.finfo(dtype).max if dtype.kind == "f" else ml_dtypes.finfo(dtype).max)
        wide = array.astype(np.float64)
        with np.errstate(all="ignore"):
            changed = {
                "loud": np.clip(wide * 1e3, -largest, largest),
                "quiet": wide * 1e-3,
                "zero": np.zeros_like(wide),
                "largest": np.where(wide < 0, -largest, largest),
                "smallest": np.full_like(wide, -largest),
            }[kind]
            return changed.astype(dtype)
    if dtype.kind == "c":
        return (array * {"loud": 1e3, "quiet": 1e-3, "zero": 0}.get(kind, 1e6)).astype(dtype)
    if dtype.kind == "b":
        return np.full_like(array, kind in ("loud", "largest"))
    if dtype.kind in "iu":
        # Without a known limit, stay small: a length of this size must not fill the memory. Invalid indices fail the
        # run.
        largest = int(np.iinfo(dtype).max) if dtype.itemsize == 1 else 1000
        high = largest if limit is None else max(0, min(limit - 1, int(np.iinfo(dtype).max)))
        return np.full_like(array, {"zero": 0, "smallest": 0, "quiet": 1, "loud": high // 2}.get(kind, high))
    if dtype.kind == "O":
        words = {"loud": "zzzz" * 16, "quiet": "a", "zero": "", "largest": "0", "smallest": "def"}
        return np.full_like(array, words[kind])
    return array


def same_bits(one: NDArray[Any], other: NDArray[Any], *, units: int = 0) -> bool:
    """Whether two arrays are equal, NaN to NaN, except for some units in the last place.

    Args:
        one: the first array to compare.
        other: the second array, of the same shape.
        units: accepted difference, in units in the last place.
    """
    if one.shape != other.shape:
        return False
    if one.dtype.kind in "OUSbiu":
        return bool(np.array_equal(one, other))
    kind = np.complex128 if one.dtype.kind == "c" else np.float64
    a, b = one.astype(kind), other.astype(kind)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    if equal.all() or not units:
        return bool(equal.all())
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}.get(one.dtype.name, 2.0**-23)
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= units * step * np.maximum(np.abs(a), np.abs(b))
    return bool((equal | near).all())


def _stacked(samples: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def _beside_neighbours(probe: BatchProbe) -> str | None:
    """Hold each sample's rows beside one neighbour against those beside another, in a batch of the same size."""
    started = time.monotonic()
    seen: dict[tuple[int, int, int], dict[str, NDArray[Any]]] = {}
    for key, batch in _batches(probe):
        if seen and time.monotonic() - started > _BUDGET_S:
            break
        try:
            results = probe.session.run(_stacked(batch))
        except ModelError:
            continue  # not every neighbour is a valid input
        place = key[2]
        rows = {name: value[place : place + 1] for name, value in results.items()}
        before = seen.setdefault(key, rows)
        for name, value in rows.items():
            if not same_bits(value, before[name], units=_SAME_KERNELS):
                return f"output '{name}' of a sample changes with the sample stacked beside it"
    return None


def _batches(probe: BatchProbe) -> Iterator[tuple[tuple[int, int, int], list[Arrays]]]:
    """Yield (sample, size, its place) and the batch.

    Both samples come at both ends, in batches of 2, 3 and 8. Then the neighbours differ: a quiet one shows effects
    hidden by a sample with large values of its own.
    """
    samples = (probe.first, probe.second, *probe.neighbours)
    beside = (probe.second, probe.first, *probe.neighbours)
    for which, neighbour, place in itertools.product((0, 1), beside, (0, 1)):
        yield (which, 2, place), _batch(samples[which], neighbour, 2, place)
    for size, which, neighbour in itertools.product((3, _LARGER), (0, 1), beside):
        place = (size - 1) * which
        yield (which, size, place), _batch(samples[which], neighbour, size, place)
    for which, neighbour in itertools.product(range(2, len(samples)), beside):
        yield (which, 2, which % 2), _batch(samples[which], neighbour, 2, which % 2)


def _batch(sample: Arrays, neighbour: Arrays, size: int, place: int) -> list[Arrays]:
    batch = [neighbour] * size
    batch[place] = sample
    return batch


def _on_another_place(probe: BatchProbe, names: Sequence[str]) -> str | None:
    """Compare the rows of a sample put into a batch twice: only their rounding may differ."""
    twice = probe.session.run(_stacked([probe.first, probe.first]))
    for name in names:
        if not _close(twice[name][1:], twice[name][:1], _PLACES.get(twice[name].dtype.name, 2e-5)):
            return f"output '{name}' changes with the place of a sample in the batch"
    return None


def _against_one(probe: BatchProbe, together: Arrays, alone: Sequence[Arrays]) -> str | None:
    """Tell rounding apart from a dependence on the number of samples, for outputs changed beside another sample.

    Another batch size takes other kernels, and a model can blow their rounding up (a normalisation over nearly constant
    values). Then at least a sample's rows are the same beside itself and beside another.
    """
    for name, value in together.items():
        if _close(value, np.concatenate([result[name] for result in alone]), None):
            continue
        twice = probe.session.run(_stacked([probe.first, probe.first]))[name]
        if not _close(twice[1:], twice[:1], 1e-6) or not _close(twice[:1], value[:1], 1e-6):
            return f"output '{name}' changes with the place of a sample in the batch"
    return None


def _shape_reason(name: str, together: NDArray[Any], alone: Sequence[NDArray[Any]]) -> str | None:
    """Return why an output's shapes contradict stacked samples, or `None`."""
    if any(value.ndim == 0 for value in (together, *alone)):
        return f"output '{name}' is a scalar"
    if any(value.shape[0] != 1 for value in alone):
        return f"output '{name}' has {alone[0].shape[0]} rows for one sample"
    if together.shape != (2, *alone[0].shape[1:]) or alone[0].shape != alone[1].shape:
        return f"output '{name}' has shape {list(together.shape)} for two samples, {list(alone[0].shape)} for one"
    return None


def _close(found: NDArray[Any], expected: NDArray[Any], tolerance: float | None) -> bool:
    """Compare two outputs of one shape. `tolerance` is a share of the largest magnitude, `None` the type's own."""
    if found.dtype.kind in "OUSb":
        return bool(np.array_equal(found, expected))
    wide = np.complex128 if found.dtype.kind == "c" else np.float64
    found_wide, wanted = found.astype(wide), expected.astype(wide)
    finite = np.isfinite(wanted)
    if not np.array_equal(found_wide[~finite], wanted[~finite], equal_nan=True):
        return False
    if not finite.any():
        return True
    if tolerance is None:
        tolerance = _TOLERANCE.get(found.dtype.name, 1e-3)
    error = float(np.abs(found_wide[finite] - wanted[finite]).max())
    return error <= tolerance * max(float(np.abs(wanted[finite]).max()), 1e-6)
