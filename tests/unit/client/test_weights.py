"""Choosing versions by weight and by key, and how weights are written down."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.client import VersionWeights, published_name, published_weights, read_weights
from repo_manager.errors import InputError

KEYS = [f"user-{number}" for number in range(4000)]


def chosen(weights: dict[int, float], key: str | None = None, **others: object) -> int | None:
    return VersionWeights.of(weights).choose(random.Random(1), key=key, **others)  # type: ignore[arg-type]


def test_draws_follow_the_shares() -> None:
    draw, weights = random.Random(3), VersionWeights.of({1: 95, 2: 5})
    found = [weights.choose(draw) for _ in range(10_000)]
    assert 400 < found.count(2) < 600


def test_keys_follow_the_shares_and_stay() -> None:
    found = {key: chosen({1: 0.9, 2: 0.1}, key) for key in KEYS}
    assert 320 < list(found.values()).count(2) < 480
    assert found == {key: chosen({1: 0.9, 2: 0.1}, key) for key in KEYS}


def test_a_growing_share_only_draws_keys_to_it() -> None:
    before = {key: chosen({1: 0.6, 2: 0.3, 3: 0.1}, key) for key in KEYS}
    after = {key: chosen({1: 0.6, 2: 0.3, 3: 0.4}, key) for key in KEYS}
    moved = {after[key] for key in KEYS if before[key] != after[key]}
    assert moved == {3}


def test_a_key_of_a_version_that_is_gone_moves_and_no_other() -> None:
    before = {key: chosen({1: 1, 2: 1, 3: 1}, key) for key in KEYS}
    after = {key: chosen({1: 1, 2: 1, 3: 1}, key, without=[2]) for key in KEYS}
    assert {before[key] for key in KEYS if before[key] != after[key]} == {2}
    assert 2 not in after.values()


def test_bytes_and_text_are_the_same_key() -> None:
    weights = VersionWeights.of({1: 1, 2: 1})
    draw = random.Random(0)
    assert [weights.choose(draw, key=key) for key in KEYS[:50]] == [
        weights.choose(draw, key=key.encode()) for key in KEYS[:50]
    ]


def test_nothing_left_is_none() -> None:
    assert chosen({1: 1, 2: 0}, without=[1]) is None
    assert chosen({1: 1, 2: 0}, key="a") == 1


@pytest.mark.parametrize("weights", [{}, {1: 0.0}, {0: 1.0}, {1: -0.1, 2: 1.1}, {1: float("nan")}, {1: float("inf")}])
def test_weights_that_are_none(weights: dict[int, float]) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        VersionWeights.of(weights)


@given(st.dictionaries(st.integers(1, 9), st.floats(1e-3, 1), min_size=1, max_size=4), st.sampled_from(["", "cpu_0"]))
def test_published_weights_come_back(weights: dict[int, float], base: str) -> None:
    shares = VersionWeights.of(weights)
    name = published_name(published_name(base, shares), shares)
    assert name.startswith(f"{base}@")
    assert name.count("@") == 1
    found = published_weights(name)
    assert found is not None
    assert found.shares == pytest.approx(shares.shares, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["", "resnet_0", "me@home", "a@1=x", "a@1=0", "a@"])
def test_a_name_without_weights(name: str) -> None:
    assert published_weights(name) is None


def test_a_file_of_one_model_or_of_several(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text('{"1": 3, "2": 1}')
    assert read_weights(path, "m").shares == {1: 0.75, 2: 0.25}
    path.write_text('{"m": {"7": 1}, "other": {"1": 1}}')
    assert read_weights(path, "m").shares == {7: 1.0}


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 1}', '{"1": "x"}', '{"1": 0}', "{", "[" * 100_000], ids=range(7))
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.json"
    path.write_text(text)
    with pytest.raises(InputError, match="weights"):
        read_weights(path, "m")
