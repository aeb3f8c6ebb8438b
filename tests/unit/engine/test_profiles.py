from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import onnx_models

from repo_manager.engine.profiles import DimRange, ShapeRange, derive_profile, find_dim_ranges, parse_shape_range
from repo_manager.errors import ModelError, UsageError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.types import Dim, TensorSpec


def signature(*shapes: tuple[Dim, ...] | None) -> Signature:
    specs = tuple(TensorSpec(f"x{i}", "float32", shape) for i, shape in enumerate(shapes))
    return Signature(specs, specs, 17, 9, {"": 17})


def test_the_batch_runs_from_one_to_the_maximum_and_is_tuned_for_it() -> None:
    profile = derive_profile(signature(("N", 3), (None, 5)), batched=True, max_batch_size=32)
    assert profile["x0"] == ShapeRange((1, 3), (32, 3), (32, 3))
    assert profile["x1"] == ShapeRange((1, 5), (32, 5), (32, 5))


@pytest.mark.parametrize("size", [None, 0])
def test_without_a_maximum_the_batch_goes_to_eight(size: int | None) -> None:
    assert derive_profile(signature(("N", 3)), batched=True, max_batch_size=size)["x0"].max == (8, 3)


def test_a_batch_of_one_is_one_shape() -> None:
    assert derive_profile(signature(("N", 3)), batched=True, max_batch_size=1)["x0"].is_fixed


def test_a_symbol_has_one_range_wherever_it_stands() -> None:
    free = {"L": DimRange(1, 16, 64)}
    profile = derive_profile(signature(("N", "L"), ("N", "L", 2)), batched=True, max_batch_size=4, free=free)
    assert profile["x1"] == ShapeRange((1, 1, 2), (4, 16, 2), (4, 64, 2))


def test_a_dynamic_axis_without_a_range_names_input_and_axis() -> None:
    with pytest.raises(ModelError, match=r"x0.*axis 2 is dynamic") as caught:
        derive_profile(signature(("N", 3, None)), batched=True)
    assert "--shape-range x0:MIN:OPT:MAX" in str(caught.value)


def test_an_unknown_rank_needs_an_override() -> None:
    with pytest.raises(ModelError, match="no known rank"):
        derive_profile(signature(None), batched=False)
    given_range = ShapeRange((1,), (2,), (3,))
    assert derive_profile(signature(None), batched=False, overrides={"x0": given_range})["x0"] == given_range


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("y", ShapeRange((1,), (1,), (1,)), "no such input; the model has x0"),
        ("x0", ShapeRange((1,), (1,), (1,)), "1 sizes given"),
        ("x0", ShapeRange((1, 4), (1, 4), (1, 4)), "axis 1 is fixed to 3"),
        ("x0", ShapeRange((2, 3), (1, 3), (4, 3)), "min <= opt <= max, found 2, 1, 4"),
        ("x0", ShapeRange((1, 3), (1, 3, 1), (1, 3)), "different numbers"),
    ],
)
def test_an_override_that_contradicts_the_model_is_refused(name: str, shape: ShapeRange, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        derive_profile(signature(("N", 3)), batched=True, overrides={name: shape})


def test_an_override_wins() -> None:
    override = ShapeRange((2, 3), (2, 3), (64, 3))
    assert derive_profile(signature(("N", 3)), batched=True, max_batch_size=4, overrides={"x0": override}) == {
        "x0": override
    }


def test_ranges_are_read_from_text() -> None:
    assert parse_shape_range("a:b:1,3:4,3:8,3") == ("a:b", ShapeRange((1, 3), (4, 3), (8, 3)))
    assert parse_shape_range("x:2,8") == ("x", ShapeRange((2, 8), (2, 8), (2, 8)))


@pytest.mark.parametrize("text", ["x", "x:", ":1,2", "x:1,a", "x:-1", "x:4:2:1", "x:1:1,2:1"])
def test_other_text_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shape_range(text)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_text_goes_there_and_back(sizes: list[tuple[int, int, int]]) -> None:
    low, opt, high = (tuple(sorted(triple)[i] for triple in sizes) for i in range(3))
    text = ":".join(["in", *(",".join(map(str, shape)) for shape in (low, opt, high))])
    assert parse_shape_range(text) == ("in", ShapeRange(low, opt, high))


def test_free_axes_are_proven_by_running_the_model(tmp_path: Path) -> None:
    model = load_model(onnx_models.save(onnx_models.cnn(size=None), tmp_path / "m.onnx"))
    ranges = find_dim_ranges(model, signature_of(model), batched=True)
    assert ranges, "height and width are dynamic"
    for found in ranges.values():
        assert found.min <= found.opt <= found.max
        assert found.opt > 0
    profile = derive_profile(signature_of(model), batched=True, max_batch_size=2, free=ranges)
    assert all(r.min[0] == 1 and r.max[0] == 2 for r in profile.values())


def test_a_model_without_free_axes_is_not_run(tmp_path: Path) -> None:
    model = load_model(onnx_models.save(onnx_models.mlp(), tmp_path / "m.onnx"))
    assert find_dim_ranges(model, signature_of(model), batched=True) == {}


def test_a_sample_decides_what_the_engine_is_tuned_for(tmp_path: Path) -> None:
    model = load_model(onnx_models.save(onnx_models.cnn(size=None), tmp_path / "m.onnx"))
    (spec,) = signature_of(model).inputs
    assert spec.shape is not None
    channels = spec.shape[1]
    assert isinstance(channels, int)
    ranges = find_dim_ranges(model, signature_of(model), batched=True, sample={spec.name: (1, channels, 24, 40)})
    profile = derive_profile(signature_of(model), batched=True, max_batch_size=2, free=ranges)[spec.name]
    assert profile.opt == (2, channels, 24, 40)
    assert profile.max[2:] == (96, 160)
