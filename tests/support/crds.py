"""Custom resources held to the schemas of their CRDs, as strictly as `kubectl apply --validate=strict` holds them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema

_FOLDER = Path(__file__).parents[1] / "data" / "crds"
_QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


@functools.cache
def _schemas() -> dict[tuple[str, str], Any]:
    """Return the schemas by apiVersion and kind."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.json")))
    return {(each["apiVersion"], each["kind"]): _strict(each["schema"]) for each in found}


def kinds() -> set[str]:
    """Return the kinds with a schema."""
    return {kind for _, kind in _schemas()}


def _strict(schema: Any) -> Any:
    """Return a structural schema as JSON Schema, with unknown fields refused."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return _QUANTITY
    found = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    for key in ("items", "additionalProperties", "not", "anyOf", "oneOf", "allOf"):
        if key in found:
            found[key] = _strict(found[key])
    if str(found.get("pattern", "")).startswith("^(?i)"):  # Go takes flags anywhere, Python at the beginning only
        found["pattern"] = "(?i)^" + found["pattern"].removeprefix("^(?i)")
    if "properties" in found:
        found["properties"] = {name: _strict(value) for name, value in found["properties"].items()}
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in found
        if "type" in found and not open_ended:
            found["additionalProperties"] = False
    if found.pop("nullable", False) and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found


def check_custom(item: dict[str, Any]) -> None:
    """Hold an object to its CRD.

    Raises:
        jsonschema.ValidationError: it would be refused, or a field of it would be dropped.
        KeyError: the CRD of its kind is not here.
    """
    schema = _schemas()[item["apiVersion"], item["kind"]]
    properties = {**schema["properties"], "metadata": {"type": "object"}}
    jsonschema.validate(item, {**schema, "properties": properties})
