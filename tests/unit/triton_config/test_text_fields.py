from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.errors import ConfigError
from repo_manager.triton_config.text_fields import canonical_values, replace_field, top_level_fields

TEXT = """# made by hand
name: "m" # a comment with { and "
max_batch_size:8; backend : 'onnx' "runtime",
input [ { name: "a" dims: [ 1, 2 ] }, # x
        { name: "}" } ]
version_policy < latest { num_versions: 2 } >
parameters { key: "k" value { string_value: "\\"}" } }
input { name: "b" }
"""


def test_finds_every_field_with_its_value() -> None:
    fields = top_level_fields(TEXT, where="f")
    assert [field.name for field in fields] == [
        "name",
        "max_batch_size",
        "backend",
        "input",
        "version_policy",
        "parameters",
        "input",
    ]
    values = {field.name: field.value(TEXT) for field in fields}
    assert values["max_batch_size"] == "8"
    assert values["backend"] == "'onnx' \"runtime\""
    assert values["version_policy"] == "< latest { num_versions: 2 } >"
    assert values["parameters"].endswith('"\\"}" } }')


def test_replacing_one_field_keeps_every_other_character() -> None:
    new = replace_field(TEXT, "version_policy", "version_policy { all { } }", where="f")
    assert new == TEXT.replace("version_policy < latest { num_versions: 2 } >", "version_policy { all { } }")


def test_replacing_a_repeated_field_leaves_one() -> None:
    new = replace_field(TEXT, "input", "input { }", where="f")
    assert [field.name for field in top_level_fields(new, where="f")].count("input") == 1
    assert "# made by hand" in new


def test_a_missing_field_is_appended_on_its_own_line() -> None:
    assert (
        replace_field('name: "m"', "max_batch_size", "max_batch_size: 1", where="f") == 'name: "m"\nmax_batch_size: 1\n'
    )


def test_removing_takes_the_line() -> None:
    assert replace_field("a: 1\nb: 2\nc: 3\n", "b", "", where="f") == "a: 1\nc: 3\n"
    assert replace_field("a: 1, b: 2 # why\n", "b", "", where="f") == "a: 1,  # why\n"
    assert replace_field("a: 1\n", "b", "", where="f") == "a: 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb {", "line 2: '}' is missing"),
        ("a }", "line 1: '}' closes nothing"),
        ('\n\na: "x', "line 3: a string"),
        ("a", "'a' has no value"),
        (": 1", "a field's name was expected"),
        ("a b", "expected ':'"),
        ("a { ]", "']' closes nothing"),
    ],
)
def test_broken_text_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        top_level_fields(text, where="f")


@given(st.text(alphabet="ab:{}[]<>\"'#\\\n ,;1", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        fields = top_level_fields(text, where="f")
    except ConfigError:
        return
    assert all(text[f.start : f.start + len(f.name)] == f.name and f.start < f.value_start < f.end for f in fields)


PRINTED = """name: "m"
version_policy {
  specific {
    versions: [1, 2]
  }
}
parameters {
  key: "k"
  value {
    string_value: "a { } \\"b\\" # c"
  }
}
dynamic_batching {
}
backend: "x"
"""


def last_values(text: str) -> dict[str, str]:
    return {field.name: field.value(text) for field in top_level_fields(text, where="f")}


def test_what_protobuf_prints_is_read_in_one_go() -> None:
    assert canonical_values(PRINTED) == last_values(PRINTED)
    assert canonical_values("") == {}


@pytest.mark.parametrize(
    "text",
    [
        "# mine\n" + PRINTED,
        PRINTED.replace("backend:", "  backend:"),
        PRINTED.replace('"x"', '"x" # mine'),
        PRINTED.rstrip("\n"),
        'input {\n  name: "a" } backend: "y" output {\n}\n',
        'input {\n  name: "a"\n  }\n  backend: "y"\n  output {\n}\n',
        'input {\n    name: "a"\n}\n',
        "a: 1; b: 2\n",
    ],
)
def test_any_other_layout_is_left_to_the_full_reader(text: str) -> None:
    assert canonical_values(text) is None


LINES = st.sampled_from(["a: 1", "b {", "}", 'c: "{"', "  a: 2", "  b {", "  }", "    d: [1]", "# x", "a: 1 # x", ""])


@given(st.lists(LINES, max_size=12).map(lambda lines: "".join(line + "\n" for line in lines)))
def test_both_readers_agree(text: str) -> None:
    values = canonical_values(text)
    assert values is None or values == last_values(text)
