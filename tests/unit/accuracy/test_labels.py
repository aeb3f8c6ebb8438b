"""Right answers, for each form of output and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repo_manager.accuracy.labels import correct_answers, labels_of
from repo_manager.errors import InputError

RNG = np.random.default_rng(0)


def right(output: Any, labels: Any) -> list[bool]:
    return list(correct_answers(np.asarray(output), labels_of(np.asarray(labels), "labels"), "output 'y'"))


CASES = {
    "scores": ([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]], [1, 1, 1], [True, False, True]),
    "whole numbers stored as floats": ([[0.1, 0.9]], [1.0], [True]),
    "rows of one 1": ([[0.1, 0.9], [0.8, 0.2]], [[0, 1], [0, 1]], [True, False]),
    "one column of labels": ([[0.1, 0.9], [0.8, 0.2]], [[1], [0]], [True, True]),
    "class numbers": ([3, 1], [3, 2], [True, False]),
    "class numbers in a column": ([[3], [1]], [3, 2], [True, False]),
    "probabilities of one class": ([[0.7], [0.2]], [1, 1], [True, False]),
    "logits of one class": ([[0.4], [-3.0]], [1, 0], [True, True]),
    "left out below 0": ([[0.1, 0.9], [0.8, 0.2]], [-1, 0], [True]),
    "NaN is no answer": ([[np.nan, 0.1]], [1], [True]),
    "tags, classes last": ([[[0.9, 0.1], [0.2, 0.8]]], [[0, 0]], [True, False]),
}


@pytest.mark.parametrize("case", CASES)
def test_right_answers(case: str) -> None:
    output, labels, wanted = CASES[case]
    assert right(output, labels) == wanted


def test_images_have_their_classes_on_the_second_axis() -> None:
    labels = RNG.integers(0, 4, (2, 4, 4))
    output = np.eye(4)[labels].transpose(0, 3, 1, 2)  # [N, C, H, W] with C == H == W
    assert all(right(output, labels))
    assert not any(right(output, (labels + 1) % 4))


REFUSED = {
    "no class numbers": ([[0.1, 0.9]], [0.5], "no class numbers"),
    "texts": ([[0.1, 0.9]], ["cat"], "no class numbers"),
    "too large a class": ([[0.1, 0.9]], [2], r"the label 2 is no class of an output of 2 \(0 to 1\)"),
    "another shape": ([[0.1, 0.9, 0.3]], [[1, 1]], r"has shape \[1, 3\], and its labels \[1, 2\]"),
    "one number for three classes": ([[0.5], [0.5]], [2, 0], "has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    output, labels, said = REFUSED[case]
    with pytest.raises(InputError, match=said):
        right(output, labels)
