"""Compare a model's output with labels: classes, classes at each position, or one probability.

It is separate from `evaluate.py` because it knows arrays only: no model, no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import InputError

__all__ = ["correct_answers", "labels_of"]

Array = NDArray[Any]
_HINT = "Labels are class numbers, [samples] or [samples, positions]; for anything else give --eval module:function."


def labels_of(array: Array, where: str) -> NDArray[np.int64]:
    """Return labels as class numbers. Rows of one 1 among zeros as the number of the 1.

    Raises:
        InputError: they are no class numbers.
    """
    if array.ndim > 1 and array.shape[-1] > 1 and np.isin(array, (0, 1)).all() and (array.sum(axis=-1) == 1).all():
        return np.asarray(array.argmax(axis=-1), np.int64)
    if array.dtype.kind == "f" and array.size and np.isfinite(array).all() and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub" or array.ndim == 0:
        raise InputError(f"{where}: the labels are {array.dtype}{list(array.shape)}, no class numbers", hint=_HINT)
    return array.astype(np.int64)


def correct_answers(output: Array, labels: NDArray[np.int64], where: str) -> NDArray[np.bool_]:
    """Return for each label whether the output has it. A label below 0 is left out, as frameworks ignore it.

    Args:
        output: class scores `[rows, classes, ...]` or `[rows, ..., classes]`; class numbers of the labels' shape; or
            one probability or logit a row, for the classes 0 and 1.
        labels: class numbers `[rows, ...]`, below 0 to skip a row.
        where: names the output, for a message.

    Returns:
        One truth value for each counted label, flat.

    Raises:
        InputError: the shapes do not fit, or a label is no class of the output.
    """
    if labels.ndim > 1 and labels.shape[-1] == 1 and output.ndim <= labels.ndim:
        labels = labels[..., 0]
    counted = labels >= 0
    chosen = _chosen_classes(output, labels, where)
    return np.asarray((chosen == labels)[counted])


def _chosen_classes(output: Array, labels: NDArray[np.int64], where: str) -> Array:
    classes_at = _class_axis(output, labels)
    if classes_at is not None and output.shape[classes_at] > 1:
        classes = output.shape[classes_at]
        largest = int(labels.max(initial=0))
        if largest >= classes:
            raise InputError(f"{where}: the label {largest} is no class of an output of {classes} (0 to {classes - 1})")
        return np.asarray(np.nan_to_num(output, nan=-np.inf).argmax(axis=classes_at))
    flat = output.reshape(labels.shape) if output.size == labels.size else None
    if flat is not None and output.dtype.kind in "iub":
        return np.asarray(flat.astype(np.int64))
    if flat is not None and int(labels.max(initial=0)) <= 1:
        # One number for two classes: a probability, or a logit if any value is outside 0 to 1.
        is_probability = bool(((flat >= 0) & (flat <= 1)).all())
        return np.asarray(flat > (0.5 if is_probability else 0.0)).astype(np.int64)
    raise InputError(f"{where} has shape {list(output.shape)}, and its labels {list(labels.shape)}", hint=_HINT)


def _class_axis(output: Array, labels: NDArray[np.int64]) -> int | None:
    """Return the axis of an output its labels do not have: 1 for images, else the last where both fit."""
    if output.ndim != labels.ndim + 1:
        return None
    fitting = [axis for axis in range(1, output.ndim) if output.shape[:axis] + output.shape[axis + 1 :] == labels.shape]
    if not fitting:
        return None
    return 1 if 1 in fitting and output.ndim >= 4 else fitting[-1]
