"""Triton's feeds beside a model's inputs, compared with the model's own: one description for every check."""

from __future__ import annotations

import pytest

from repo_manager.triton_config.compare import check_config, same_signature
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Dim, TensorSpec


def spec(name: str, *shape: Dim, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


X, Y = spec("x", "N", 1), spec("y", "N", 1)
INPUT = 'input { name: "x" data_type: TYPE_FP32 dims: 1 }'
OUTPUT = 'output { name: "y" data_type: TYPE_FP32 dims: 1 }'
PLAIN = f'backend: "onnxruntime" max_batch_size: 4 {INPUT} {OUTPUT} '
START = "control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }"
CORRID = "control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }"
STATE = 'state { input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: 1 }'
RAGGED = (
    'backend: "onnxruntime" max_batch_size: 4 '
    'input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true } '
    'batch_input { kind: BATCH_ELEMENT_COUNT target_name: "n" data_type: TYPE_FP32 source_input: "x" } '
)
WIDE = 'output { name: "y" data_type: TYPE_FP32 dims: -1 } '


def signature(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (Y,), **more: object) -> ServedSignature:
    return ServedSignature(inputs, outputs, **more)  # type: ignore[arg-type]


def sequence(*parts: str) -> str:
    return f"sequence_batching {{ {' '.join(parts)} }}"


def control(name: str, kind: str = START) -> str:
    return f'control_input {{ name: "{name}" {kind} }}'


SCATTER = 'batch_output { target_name: "y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }'
OPTIONAL = (
    'backend: "onnxruntime" max_batch_size: 0 input { name: "x" data_type: TYPE_FP32 dims: [ -1, 1 ] } '
    'input { name: "b" data_type: TYPE_FP32 dims: 4 optional: true } '
    'output { name: "y" data_type: TYPE_FP32 dims: [ -1, 1 ] }'
)
BIAS = (spec("b", 4),)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (PLAIN + sequence(control("start")), signature(X, spec("start", "N", 1))),
        (PLAIN + sequence(control("id", CORRID)), signature(X, spec("id", "N", 1, dtype="uint64"))),
        (PLAIN + sequence(STATE), signature(X, spec("s", "N", 1), outputs=(Y, spec("t", "N", 1)))),
        (RAGGED + WIDE, signature(spec("x", "L"), spec("n", "B"), outputs=(spec("y", "B", "M"),))),
        (RAGGED + WIDE + SCATTER, signature(spec("x", "L"), spec("n", "B"), outputs=(spec("y", "L"),))),
        (OPTIONAL, signature(X, initializers=BIAS)),
        (
            OPTIONAL.replace('input { name: "b" data_type: TYPE_FP32 dims: 4 optional: true }', ""),
            signature(X, initializers=BIAS),
        ),
    ],
    ids=["control", "id", "state", "ragged", "scattered", "initializer", "initializer left out"],
)
def test_what_is_fed_in_another_way_need_not_be_listed(text: str, model: ServedSignature) -> None:
    assert check_config(parse_config(text), model) == []


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        (PLAIN + sequence(control("begin")), signature(X, spec("start", "N", 1)), "control_input 'begin' is not in"),
        (PLAIN + sequence(control("start")), signature(X), "control_input 'start' is not in the model; it has 'x'"),
        (PLAIN + sequence(control("start")), signature(X, spec("start", "N", 2)), "needs shape [-1,1] in the model"),
        (
            PLAIN + sequence(control("start")),
            signature(X, spec("start", "N", 1, dtype="int32")),
            "'start' is TYPE_FP32",
        ),
        (PLAIN + sequence(control("x")), signature(X), "'x' is fed twice: as input and as control"),
        (PLAIN + sequence(STATE), signature(X, spec("s", "N", 1)), "state's output 't' is not in the model"),
        (
            PLAIN + sequence(STATE),
            signature(X, outputs=(Y, spec("t", "N", 1))),
            "state's input 's' is not in the model",
        ),
        (
            PLAIN + sequence(STATE),
            signature(X, spec("s", "N", 2), outputs=(Y, spec("t", "N", 1))),
            "state's input 's': max_batch_size > 0 adds a first dimension to dims [1]",
        ),
        (PLAIN, signature(X, spec("start", "N", 1)), "'start' are not listed"),
        (RAGGED + WIDE, signature(spec("x", "N", "L"), spec("n", "B"), outputs=(spec("y", "B", "M"),)), "joined flat"),
        (RAGGED + WIDE, signature(spec("x", "L"), outputs=(spec("y", "B", "M"),)), "batch_input 'n' is not in"),
        (RAGGED + WIDE, signature(spec("x", "L"), spec("n", "B"), outputs=(spec("y", "L"),)), "do not fit"),
        (OPTIONAL, signature(X, spec("b", 4)), "input 'b' is optional, and the model has no default for it"),
        (OPTIONAL.replace("optional: true", ""), signature(X, initializers=BIAS), "takes it with optional: true only"),
        (
            OPTIONAL.replace("max_batch_size: 0", "max_batch_size: 4").replace("[ -1, 1 ]", "1"),
            signature(X, initializers=BIAS),
            "does not allow with max_batch_size above 0",
        ),
    ],
)
def test_what_does_not_fit_is_named_by_what_it_is(text: str, model: ServedSignature, message: str) -> None:
    errors = [each for each in check_config(parse_config(text), model) if each.severity is Severity.ERROR]
    assert any(message in each.what for each in errors), errors


def test_a_published_input_may_become_a_control_or_a_state() -> None:
    derived = parse_config(
        PLAIN + 'input { name: "s" data_type: TYPE_FP32 dims: 1 } output { name: "t" data_type: TYPE_FP32 dims: 1 }'
    )
    assert same_signature(parse_config(PLAIN + sequence(STATE)), derived) == ()
    assert same_signature(parse_config(PLAIN + sequence(control("s"))), derived) == (
        "output 't' is only in the new version",
    )
