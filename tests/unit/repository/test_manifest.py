from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.errors import RepositoryError
from repo_manager.repository.manifest import FileRecord, Manifest, manifest_text, parse_manifest, read_manifest
from repo_manager.repository.state_file import read_states
from repo_manager.types import Digest

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "manifest.schema.json").read_text())
DIGEST = Digest("sha256:" + "0" * 64)
MINIMAL = {"schema_version": 1, "model": "m", "version": 1, "created": "", "backend": "", "files": {}}
TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "string": (str,), "object": (dict,), "null": (type(None),)}


def conforms(document: dict[str, Any]) -> None:
    """Check the parts of JSON Schema used in our schema."""
    assert set(SCHEMA["required"]) <= set(document)
    for key, value in document.items():
        kinds = SCHEMA["properties"].get(key, {}).get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        assert not kinds or any(isinstance(value, TYPES[kind]) for kind in kinds), key
    record = SCHEMA["properties"]["files"]["additionalProperties"]
    for entry in document["files"].values():
        assert set(record["required"]) <= set(entry)
        assert re.match(record["properties"]["sha256"]["pattern"], entry["sha256"])


def test_the_schema_has_every_field_and_what_is_written_conforms() -> None:
    fields = {field.name for field in dataclasses.fields(Manifest)} - {"extra"}
    assert fields <= set(SCHEMA["properties"])
    manifest = Manifest(1, "m", 2, "2026-01-01T00:00:00Z", "onnxruntime", "fp16", {"é.onnx": FileRecord(DIGEST, 3)})
    conforms(json.loads(manifest_text(manifest)))
    conforms(MINIMAL)


def test_written_and_read_again_it_is_the_same() -> None:
    manifest = Manifest(
        1, "m", 2, "t", "b", None, {"f": FileRecord(DIGEST, 0)}, tools={"onnx": "1"}, extra={"later": [1, {"x": None}]}
    )
    assert parse_manifest(manifest_text(manifest), where="w") == manifest


def test_unknown_fields_never_hide_known_ones() -> None:
    manifest = Manifest(1, "m", 2, "t", "b", None, {}, extra={"model": "evil"})
    assert json.loads(manifest_text(manifest))["model"] == "m"


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "1"},
        {"schema_version": True},
        {"version": None},
        {"version": 1.5},
        {"files": []},
        {"files": {"f": {}}},
        {"files": {"f": {"sha256": 1, "size_bytes": 1}}},
        {"files": {"f": {"sha256": "x", "size_bytes": "1"}}},
        {"files": {"../f": {"sha256": "x", "size_bytes": 1}}},
        {"files": {"/f": {"sha256": "x", "size_bytes": 1}}},
        {"tools": []},
        {"config": 3},
    ],
)
def test_a_wrong_type_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(RepositoryError, match=r"place"):
        parse_manifest(json.dumps({**MINIMAL, **change}), where="place")


@pytest.mark.parametrize("missing", sorted(MINIMAL))
def test_a_missing_field_is_named(missing: str) -> None:
    document = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(RepositoryError, match=missing):
        parse_manifest(json.dumps(document), where="place")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*MINIMAL, "tools", "source", "extra"]), JSON))
def test_any_json_is_a_manifest_or_a_clear_error(change: dict[str, Any]) -> None:
    try:
        manifest = parse_manifest(json.dumps({**MINIMAL, **change}), where="place")
    except RepositoryError:
        return
    assert parse_manifest(manifest_text(manifest), where="place") == manifest


@given(st.binary(max_size=50))
def test_any_bytes_are_a_manifest_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("m")
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(RepositoryError):
        read_manifest(folder)


@given(st.dictionaries(st.sampled_from(["schema_version", "models"]), JSON | st.just({"m": {"tags": {"a": 1}}})))
def test_any_state_is_read_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    folder = tmp_path_factory.mktemp("s")
    (folder / ".repo-manager.json").write_text(json.dumps(document))
    try:
        states = read_states(folder)
    except RepositoryError:
        return
    assert all(isinstance(state.highest_version, int) for state in states.values())


def test_the_digest_is_of_content_not_of_number() -> None:
    one = Manifest(1, "m", 1, "t", "b", None, {"a": FileRecord(DIGEST, 1), "b": FileRecord(DIGEST, 2)})
    two = Manifest(1, "n", 2, "u", "b", "int8", {"b": FileRecord(DIGEST, 2), "a": FileRecord(DIGEST, 1)})
    assert one.digest == two.digest
    assert one.digest != dataclasses.replace(one, files={"a": FileRecord(DIGEST, 1)}).digest
    assert one.size_bytes == 3
