from __future__ import annotations

import pytest

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.fields import get_field, set_field, set_fields

ENSEMBLE = 'platform: "ensemble" ensemble_scheduling { step { model_name: "part" } }\n'
SEQUENCE = 'backend: "x" sequence_batching { direct { } }\n'
POLICY = 'backend: "x" version_policy { all { } }\n'


@pytest.mark.parametrize(
    ("text", "field", "value", "lost"),
    [
        (ENSEMBLE, "dynamic_batching.max_queue_delay_microseconds", "100", "ensemble_scheduling"),
        (ENSEMBLE, "dynamic_batching", "{}", "ensemble_scheduling"),
        (SEQUENCE, "dynamic_batching", "{}", "sequence_batching"),
        (SEQUENCE, "sequence_batching.oldest.max_candidate_sequences", "4", "sequence_batching.direct"),
    ],
)
def test_a_change_removes_nothing_that_it_does_not_name(text: str, field: str, value: str, lost: str) -> None:
    with pytest.raises(ConfigError, match=f"would remove {lost}: ") as caught:
        set_fields(text, {field: value}, where="f")
    assert f"--clear {lost}" in (caught.value.hint or "")
    changed = parse_config(set_fields(text, {field: value, lost: None}, where="f")).message()
    assert changed != parse_config(text).message()


def test_a_change_within_the_chosen_field_is_free() -> None:
    text = set_fields(SEQUENCE, {"sequence_batching.direct.minimum_slot_utilization": "0.5"}, where="f")
    assert parse_config(text).message().sequence_batching.direct.minimum_slot_utilization == 0.5
    assert set_fields(ENSEMBLE, {"dynamic_batching": None}, where="f") == ENSEMBLE
    policy = set_fields(POLICY, {"version_policy.latest.num_versions": "2"}, where="f")
    assert parse_config(policy).message().version_policy.latest.num_versions == 2


WRITTEN = """\
# head
instance_group [
  {
    count: 1  # one per GPU
    kind: KIND_GPU  # not KIND_CPU
    future: 3
  },
  { count: 2 kind: KIND_CPU }  # the second
]
parameters: {
  key: "A"  # the first
  value: { string_value: "1" }
}
# between
parameters { key: "B" value { string_value: "a  b" } }
metric_tags [ { key: "team" value: "a" } ]
dynamic_batching {  # batching
  preferred_batch_size: [ 4, 8 ]
  # no longer
  max_queue_delay_microseconds: 100
}
newer_field: 1
"""


@pytest.mark.parametrize(
    ("field", "value", "old", "new"),
    [
        ("instance_group.count", "4", "count: 1  #", "count: 4  #"),
        ("instance_group[1].count", "3", "count: 2 kind", "count: 3 kind"),
        ("instance_group[1].gpus", "[0, 1]", "KIND_CPU }", "KIND_CPU gpus: [0, 1] }"),
        ("instance_group[2].count", "3", "KIND_CPU }", "KIND_CPU },\n  {\n    count: 3\n  }"),
        ("parameters.A", "x", '"1"', '"x"'),
        ("parameters.B", None, 'parameters { key: "B" value { string_value: "a  b" } }\n', ""),
        (
            "parameters.C",
            "y",
            '"a  b" } }\n',
            '"a  b" } }\nparameters {\n  key: "C"\n  value {\n    string_value: "y"\n  }\n}\n',
        ),
        ("dynamic_batching.max_queue_delay_microseconds", None, "  max_queue_delay_microseconds: 100\n", ""),
        ("dynamic_batching.preferred_batch_size", "[2]", "[ 4, 8 ]", "[2]"),
        (
            "dynamic_batching.default_queue_policy.max_queue_size",
            "9",
            "microseconds: 100\n",
            "microseconds: 100\n  default_queue_policy {\n    max_queue_size: 9\n  }\n",
        ),
        ("metric_tags", '[{ key: "team" value: "b" }]', '"a" }', '"b" }'),
    ],
)
def test_only_the_value_that_changes_is_written_anew(field: str, value: str | None, old: str, new: str) -> None:
    assert WRITTEN.count(old) == 1
    assert set_fields(WRITTEN, {field: value}, where="f") == WRITTEN.replace(old, new)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("instance_group { count: 1 } instance_group [ ]", "instance_group", "[{ count: 2 }]"),
        ("instance_group [ { count: 1 }, { count: 2 } ]", "instance_group", "[{ count: 2 }]"),
        ('parameters [ { key: "A" }, { key: "B" } ]', "parameters.A", None),
        ('parameters { key: "A" } parameters { key: "A" value { string_value: "2" } }', "parameters.A", "3"),
        ("input { dims: 1 dims: 2 }", "input.dims", "[3]"),
        ("optimization < graph < level: 1 > >", "optimization.graph.level", "-1"),
    ],
)
def test_text_in_any_form_comes_to_say_what_is_set(text: str, field: str, value: str | None) -> None:
    changed = parse_config(set_fields(text, {field: value}, where="f")).message()
    expected = parse_config(text).message()
    set_field(expected, field, value)
    assert changed == expected != parse_config(text).message()


MAPS = """backend: "onnxruntime"
model_warmup { name: "w" batch_size: 1  # first
  inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 4 ] random_data: true } }
  inputs { key: "a.b" value { data_type: TYPE_FP32 dims: [ 4 ] zero_data: true } }
}
dynamic_batching { priority_levels: 2 default_priority_level: 1
  priority_queue_policy { key: 1 value { max_queue_size: 3 } } }
"""


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        (
            {"model_warmup.inputs.x.zero_data": "true", "model_warmup.inputs.x.random_data": None},
            "random_data: true",
            " zero_data: true",
        ),
        (
            {"model_warmup.inputs.a.b.data_type": "TYPE_INT8"},
            "TYPE_FP32 dims: [ 4 ] zero",
            "TYPE_INT8 dims: [ 4 ] zero",
        ),
        ({"dynamic_batching.priority_queue_policy.1.max_queue_size": "9"}, "size: 3", "size: 9"),
        ({"model_warmup.inputs.x": None}, MAPS.splitlines()[2].strip(), ""),
        (
            {"cc_model_filenames.8.6": "m.plan"},
            "priority_queue_policy { key: 1 value { max_queue_size: 3 } } }\n",
            "priority_queue_policy { key: 1 value { max_queue_size: 3 } } }\n"
            'cc_model_filenames {\n  key: "8.6"\n  value: "m.plan"\n}\n',
        ),
    ],
)
def test_entries_of_maps_are_set_by_key(changes: dict[str, str | None], old: str, new: str) -> None:
    written = set_fields(MAPS, changes, where="c")
    assert parse_config(written).message() == parse_config(MAPS.replace(old, new, 1)).message()
    assert "# first" in written
    for path, value in changes.items():
        if value is not None:
            assert get_field(parse_config(written), path) == {"true": "True"}.get(value, value)


@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        ("model_warmup.inputs.x.zero_data", "true", "would remove model_warmup.inputs.x.random_data"),
        ("model_warmup.inputs.x", "{ }", "is a whole entry"),
        ("model_warmup.inputs.x.none", "1", "Input has no field 'none'"),
        ("dynamic_batching.priority_queue_policy.high.max_queue_size", "1", "the keys of .* are numbers, and 'high'"),
        ("dynamic_batching.priority_queue_policy.99999999999.max_queue_size", "1", "the keys of .* are numbers"),
        ("parameters", "{}", "parameters = '{}' has no key"),
    ],
)
def test_an_entry_that_cannot_be_set_is_named(path: str, value: str, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        set_fields(MAPS, {path: value}, where="c")
