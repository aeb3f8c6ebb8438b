"""repository.yaml as a person writes it, and the message for each mistake."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repo_manager.declared import json_schema, parse_declaration, read_declaration
from repo_manager.errors import InputError

DOCS = Path(__file__).parents[3] / "docs"


def problem(text: str) -> str:
    with pytest.raises(InputError) as raised:
        parse_declaration(text, name="r.yaml")
    return raised.value.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("precisoin: fp16", "r.yaml:3:5: models.m.precisoin: unknown key; did you mean 'precision'?"),
        ("precision: fp17", "r.yaml:3:5: models.m.precision: expected 'fp32', 'fp16', .*; found 'fp17'"),
        ("source: 3", "r.yaml:3:5: models.m.source: expected a path; found 3"),
        ("source: ''", "r.yaml:3:5: models.m.source: expected a non-empty text; found ''"),
        (r'source: "a\0b"', "r.yaml:3:5: models.m.source: expected"),
        ("source: {path: x, digest: abc}", r"r.yaml:3:23: models.m.source.digest: expected"),
        ("config: {max_batch_size: yes}", "r.yaml:3:14: models.m.config.max_batch_size: expected a whole number"),
        ("config: {max_batch_size: '8'}", "expected a whole number; found '8'"),
        ("config: {max_batch_size: -1}", "expected greater than or equal to 0; found -1"),
        ("config: {instance_group: {cuont: 1}}", "r.yaml:3:31: .*unknown key; did you mean 'count'?"),
        ("config: {instance_group: {kind: tpu}}", "expected 'auto', 'cpu' or 'gpu'; found 'tpu'"),
        ("config: {dynamic_batching: {max: 1}}", "unknown key; known are max_queue_delay_us, preferred_batch_sizes"),
        ("config: {dynamic_batching: 3}", "expected .*true or false; found 3"),
        ("labels: {y: [1]}", r"r.yaml:3:18: models.m.labels.y\[0\]: expected a text; found 1"),
        ("serve: true", "expected a whole number, or 'newest', or a text, or a list; found True"),
        ("serve: []", "serve is an empty list"),
        ("serve: 0", "models.m.serve"),
        ("serve: latest", "'latest' cannot be a tag"),
        ("tags: {9x: 3}", "'9x' cannot be a tag"),
        ("tags: {ok: oldest}", "expected a whole number, or 'newest'; found 'oldest'"),
        ("shapes: {x: {min: [1], opt: [2], max: [1]}}", "min <= opt <= max must hold on every axis"),
        ("shapes: {x: {min: [1], opt: [1, 2], max: [1]}}", "the same number of axes"),
        ("shapes: {x: [0, 3]}", r"models.m.shapes.x\[0\]: expected greater than or equal to 1; found 0"),
        ("convert: {max_drift: .nan}", "expected a finite number"),
        ("precision: int8\n    source: x", "precision int8 needs calibration data"),
        ("calibration: x", "calibration and sparsity: prune need a source"),
        ("serve: [1, 2]\n    targets: [grpc://a:1]", "targets take one"),
        ("serve: 010", "r.yaml:3:12: '010' is the number 8 in YAML"),
        ("serve: 1:30", "'1:30' is the number 90 in YAML"),
        ("serve: 2020-01-01", "is a date in YAML"),
        ("? [a]\n    : b", "a key has to be a text"),
        ("source: !!python/object:os.system {}", "the tag .* has no meaning here"),
        ("source: a\n    source: b", "r.yaml:4:5: the key 'source' is here a second time; the first is in line 3"),
        ("<<: 3", "`<<` takes a mapping"),
    ],
)
def test_a_mistake_is_told_with_its_place(line: str, message: str) -> None:
    assert re.search(message, problem(f"models:\n  m:\n    {line}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: expected a mapping with `models:`, found nothing"),
        ("- 1", "r.yaml:1:1: expected a mapping with `models:`, found a list"),
        ("mdels: {}", "mdels: unknown key; did you mean 'models'?"),
        ("models: {a/b: {}}", "models.a/b: 'a/b' cannot be a model's name"),
        ("models: {..: {}}", "cannot be a model's name"),
        ("models: [", "r.yaml:1:10: not valid YAML"),
        ("models:\n\ta: 1", "never with tabs"),
        ("a: 1\n---\nb: 2", "another document"),
        ("models: &x {a: *x}", "an alias inside itself"),
        ("schema_version: 2\nmodels: {}", "schema_version: expected 1; found 2"),
    ],
)
def test_a_broken_file_is_told(text: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_declaration(text, name="r.yaml")
    assert message in str(raised.value)


def test_all_mistakes_are_told_at_once_in_their_order() -> None:
    found = problem("models:\n  a:\n    precision: x\n    confg: {}\n  b:\n    sparsity: yes\n")
    assert [line.split(": ")[0].strip() for line in found.splitlines()[1:]] == [
        "r.yaml:3:5",
        "r.yaml:4:5",
        "r.yaml:6:5",
    ]


def test_mistakes_of_every_kind_are_told_together() -> None:
    """A key, a name, a tag, a number YAML reads otherwise and a doubled key: one run reports all of them."""
    found = problem(
        "modells: 1\nmodels:\n  a/b:\n    precison: fp16\n  m:\n    serve: 010\n    tags: {'..': 1}\n"
        "    precision: fp32\n    precision: fp16\n  n:\n    serve: la la\n"
    )
    assert [line.strip().split(": ")[0] for line in found.splitlines()[1:]] == [
        "r.yaml:1:1",
        "r.yaml:3:3",
        "r.yaml:4:5",
        "r.yaml:6:12",
        "r.yaml:7:12",
        "r.yaml:9:5",
        "r.yaml:11:5",
    ]


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: bytes) -> object:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return read_declaration(Path("-"))

    assert read(b"models: {m: {source: x.onnx}}") == parse_declaration("models: {m: {source: x.onnx}}", name="x")
    for content, message in (
        (b"models: 3", "standard input:1:1"),
        (b"\xff", "not UTF-8"),
        (b" " * 5_000_000, "larger than the limit of"),
    ):
        with pytest.raises(InputError, match=message):
            read(content)


def test_ten_thousand_aliases_are_refused_before_they_are_read() -> None:
    rows = ["x-0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    rows += [f"x-{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more values" in problem("\n".join(rows) + "\nmodels: {}")


def test_anchors_and_merges_are_fine() -> None:
    text = """
x-common: &common {precision: fp16, backend: onnxruntime}
models:
  a: &a {<<: *common, source: a.onnx}
  b: {<<: [*a, *common], source: b.onnx}
"""
    models = parse_declaration(text, name="r").models
    assert [(m.source and m.source.path, m.precision, m.backend) for m in models.values()] == [
        ("a.onnx", "fp16", "onnxruntime"),
        ("b.onnx", "fp16", "onnxruntime"),
    ]


def test_nothing_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    model = parse_declaration("models: {a: {source: '$HOME/${HOME}/~/a.onnx'}}", name="r").models["a"]
    assert model.source is not None
    assert model.source.path == "$HOME/${HOME}/~/a.onnx"


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe"), lambda _: None])
def test_what_is_no_text_file_is_told(make: object, tmp_path: Path) -> None:
    path = tmp_path / "repository.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"repository\.yaml"):
        read_declaration(path)


def test_the_published_schema_is_the_one_of_the_code() -> None:
    assert json.loads((DOCS / "repository.schema.json").read_text()) == json_schema(), (
        "docs/repository.schema.json is out of date: write json_schema() there"
    )


def test_the_schema_knows_every_key_and_the_short_forms() -> None:
    schema = json_schema()
    model = schema["$defs"]["Model"]
    assert model["additionalProperties"] is False
    assert {"source", "precision", "serve", "targets", "config"} <= set(model["properties"])
    assert {"type": "string", "minLength": 1} in schema["$defs"]["FileReference"]["anyOf"]
    assert schema["$defs"]["Config"]["properties"]["max_batch_size"]["description"]


KEYS = st.sampled_from(["models", "m", "source", "precision", "serve", "tags", "config", "set", "x", "targets", "<<"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES)
@example(None, {"tags": True})
@example(None, {"tags": [1]})
def test_whatever_stands_there_is_taken_or_told(top: object, model: object) -> None:
    for value in (top, {"models": {"m": model}}):
        with contextlib.suppress(InputError):
            assert parse_declaration(json.dumps(value), name="r").models is not None


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*<>!?|'\"#%@`,.\n\t 01~=", max_size=60))
def test_whatever_characters_come_they_are_taken_or_told(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_declaration(text, name="r").models is not None


def test_the_known_keys_are_told_once() -> None:
    found = problem("models: {}\nbread: 1\nbutter: 2\n").splitlines()
    assert [line.split(": ", 1)[1] for line in found[1:]] == [
        "bread: unknown key; known are models, schema_version, targets",
        "butter: unknown key",
    ]
