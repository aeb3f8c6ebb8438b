from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from repo_manager.types import Backend, Precision, TensorSpec, as_json


@dataclasses.dataclass(frozen=True)
class Result:
    precision: Precision
    path: Path
    shape: tuple[int | None, ...]
    share: np.float32
    sizes: dict[Backend, int]
    tags: frozenset[str]
    heavy: object = dataclasses.field(default=None, metadata={"json": False})


def test_a_result_becomes_plain_json() -> None:
    result = Result(
        Precision.INT8, Path("/a/b"), (None, 3), np.float32(0.5), {Backend.TENSORRT: 0}, frozenset("ba"), object()
    )
    assert json.loads(json.dumps(as_json(result))) == {
        "precision": "int8",
        "path": "/a/b",
        "shape": [None, 3],
        "share": 0.5,
        "sizes": {"tensorrt": 0},
        "tags": ["a", "b"],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float64("nan")])
def test_what_json_cannot_hold_becomes_null(value: float) -> None:
    assert as_json(value) is None


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        as_json(object())


@pytest.mark.parametrize(
    ("shape", "text"),
    [((None, "n", 3), "x: int64[?, n, 3]"), ((), "x: int64[]"), (None, "x: int64[unknown rank]")],
)
def test_a_tensor_spec_reads_well(shape: tuple[int | str | None, ...] | None, text: str) -> None:
    assert str(TensorSpec("x", "int64", shape)) == text


def test_a_precision_is_its_text_and_carries_what_follows_from_it() -> None:
    assert [Precision(str(each)) for each in Precision] == list(Precision)
    assert (Precision.INT8_FP16, f"{Precision.FP16}", json.dumps([Precision.BF16])) == ("int8+fp16", "fp16", '["bf16"]')
    assert [each for each in Precision if each.facts.quantizes] == [Precision.INT8, Precision.INT8_FP16]
    assert {each.facts.low for each in Precision} == {None, "float16", "bfloat16"}
    assert pickle.loads(pickle.dumps(Precision.INT8)) is Precision.INT8
    with pytest.raises(ValueError, match="fp8"):
        Precision("fp8")
