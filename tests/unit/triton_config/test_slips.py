"""A slip in a config.pbtxt gets the intended word as a hint."""

from __future__ import annotations

import pytest

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.fields import set_fields
from repo_manager.triton_config.slips import meant_field


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('input { name: "a" data_type: FP32 }', "TYPE_FP32"),
        ('input { name: "a" data_type: float32 }', "TYPE_FP32"),
        ('input { name: "a" data_type: TYPE_BYTES }', "TYPE_STRING"),
        ('input { name: "a" data_type: TYPE_INT }', "TYPE_INT32"),
        ('input { name: "a" data_type: BFLOAT16 }', "TYPE_BF16"),
        ('input { name: "a" format: NCHW }', "FORMAT_NCHW"),
        ("instance_group { kind: CPU }", "KIND_CPU"),
        ("instance_group { kind: KIND_GPUS }", "KIND_GPU"),
    ],
)
def test_a_value_that_is_almost_one(text: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.hint == f"Did you mean {meant}?"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("versions: 1", "version_policy"),
        ("dynamic_batch { }", "dynamic_batching"),
        ("instance_groups { }", "instance_group"),
        ("inputs { }", "input"),
        ('input { name: "x" datatype: TYPE_FP32 }', "input.data_type"),
        ('input { name: "x" shape: 3 }', "input.dims"),
        ("dynamic_batching { max_queue_delay_us: 1 }", "dynamic_batching.max_queue_delay_microseconds"),
        ("sequence_batching { oldest { max_candidates: 1 } }", "sequence_batching.max_candidate_sequences"),
        ("sequence_batching { oldest { max_candidate_sequence: 1 } }", "sequence_batching.max_candidate_sequences"),
        ("a_field_of_a_newer_triton: 1", ""),
    ],
)
def test_a_field_that_is_almost_one(text: str, meant: str) -> None:
    (unknown,) = parse_config(text).unknown_fields
    assert meant_field(unknown) == meant


def test_a_field_to_set_that_is_almost_one() -> None:
    with pytest.raises(ConfigError) as caught:
        set_fields("", {"dynamic_batching.max_queue_delay": "1"}, where="config.pbtxt")
    assert caught.value.hint == "Did you mean dynamic_batching.max_queue_delay_microseconds?"


def test_a_byte_order_mark_is_named() -> None:
    with pytest.raises(ConfigError, match="byte order mark"):
        parse_config("\ufeffmax_batch_size: 1")
