from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import ModelConfig, format_config, parse_config, read_config
from repo_manager.triton_config.version_policy import (
    replace_version_policy,
    served_versions,
    version_policy,
    with_version_policy,
)
from repo_manager.types import as_json


def test_a_max_batch_size_of_0_is_written_out() -> None:
    config = parse_config('name: "m" backend: "onnxruntime"')
    assert format_config(config) == 'name: "m"\nmax_batch_size: 0\nbackend: "onnxruntime"\n'
    assert format_config(parse_config("")) == "max_batch_size: 0\n"


def test_the_stand_in_for_0_cannot_be_met_inside_a_string() -> None:
    message = model_config_pb2.ModelConfig(name="\nmax_batch_size: -2147483648\n")
    config = ModelConfig.from_message(message)
    assert parse_config(config.text).message() == message
    assert config.text.count("max_batch_size: 0\n") == 1


def test_equal_configurations_have_equal_texts_and_are_json() -> None:
    a = parse_config('parameters { key: "b" value { string_value: "1" } } parameters { key: "a" } name: "m"')
    b = parse_config('name: "m" parameters { key: "a" } parameters { key: "b" value { string_value: "1" } }')
    assert a == b
    assert json.loads(json.dumps(as_json(a)))["text"] == a.text


def test_the_message_is_a_copy() -> None:
    config = parse_config('name: "m"')
    config.message().name = "other"
    assert config.name == "m"


def test_the_backend_of_an_old_platform() -> None:
    assert parse_config('platform: "onnxruntime_onnx"').backend == "onnxruntime"
    assert parse_config('platform: "tensorrt_plan"').model_filename == "model.plan"
    assert parse_config('backend: "python"').model_filename == ""


def test_fields_of_a_newer_triton_are_named() -> None:
    text = 'name: "m"\nfuture_field { x: 1 }\nmax_batch_size: 4\ninstance_group { count: 2 future: 1 }\n'
    config = parse_config(text)
    assert config.unknown_fields == ("future_field", "instance_group.future")
    assert config.max_batch_size == 4
    assert config.message().instance_group[0].count == 2
    with pytest.raises(ConfigError, match="max_batch_size"):
        parse_config('future { } max_batch_size: "x"')


@pytest.mark.parametrize(
    "text",
    ["name: 3", 'name: "m" max_batch_size: "x"', "name: 'm' }", "\x00", "input { data_type: X }"],
)
def test_what_is_no_configuration_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here/config\.pbtxt"):
        parse_config(text, where="here/config.pbtxt")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("instance_group { kind: 9 }", "instance_group[0].kind"),
        ("input { data_type: 99 }", "input[0].data_type"),
        ("dynamic_batching { priority_queue_policy { key: 1 value { timeout_action: 7 } } }", "1.timeout_action"),
        ("batch_input { kind: 9 }", "batch_input[0].kind"),
    ],
)
def test_a_number_that_is_no_value_of_its_field_is_refused(text: str, path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(path)):
        parse_config(text)
    parse_config("input { data_type: 11 } parameters { key: 'a' value { string_value: 'b' } }")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_config("optimization { " * 5000)


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_clear_error(text: str) -> None:
    try:
        config = parse_config(text)
    except ConfigError:
        return
    assert parse_config(format_config(config)).message() == config.message()


def test_reading_a_missing_or_binary_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.pbtxt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "policy", "served"),
    [
        ("", "latest:1", (7,)),
        ("version_policy { latest { num_versions: 2 } }", "latest:2", (3, 7)),
        ("version_policy { latest { } }", "latest:0", ()),
        ("version_policy { all { } }", "all", (1, 3, 7)),
        ("version_policy { specific { versions: [3, 1, 9] } }", (1, 3, 9), (1, 3)),
        ("version_policy { specific { versions: 7 versions: 7 } }", (7,), (7,)),
    ],
)
def test_policies(text: str, policy: object, served: tuple[int, ...]) -> None:
    config = parse_config(text)
    assert version_policy(config) == policy
    assert served_versions(config, (7, 1, 3)) == served


def test_a_policy_change_keeps_all_else() -> None:
    text = '# keep me\nname: "m"\nfuture { x: 1 }\n'
    text += "version_policy: { latest { num_versions: 1 } }  # and me\nmax_batch_size:2"
    new = replace_version_policy(text, (2, 1), where="f")
    assert version_policy(parse_config(new)) == (1, 2)
    assert new.startswith('# keep me\nname: "m"\nfuture { x: 1 }\n')
    assert new.endswith("  # and me\nmax_batch_size:2")
    assert replace_version_policy(new, (1, 2), where="f") == new


def test_a_policy_is_added_where_there_is_none() -> None:
    assert version_policy(parse_config(replace_version_policy('name: "m" # x', (4,), where="f"))) == (4,)


@pytest.mark.parametrize("versions", [(), (0,), (-1,)])
def test_no_version_or_a_version_below_1_cannot_be_served(versions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        with_version_policy(parse_config(""), versions)
