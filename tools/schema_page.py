"""Pages about a JSON schema, and the cells of their tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["cell", "plain_text", "property_rows", "schema_page", "type_of"]

_MARKUP = re.compile(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)\]")


def schema_page(schema: Mapping[str, Any], title: str) -> str:
    """Return the page of a schema in docs/: a table for it, and one for each definition."""
    lines = [f"# {title}\n", f"{schema.get('description', '')}\n", "The same as a [JSON schema](../"]
    lines[-1] += f"{'repository' if title == 'repository.yaml' else 'manifest'}.schema.json).\n"
    for name, part in ((None, schema), *schema.get("$defs", {}).items()):
        properties = part.get("properties", {})
        if name is not None:
            lines += [f"## {name}\n", f"{cell(part.get('description', ''))}\n"]
        if not properties:
            continue
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, value in properties.items():
            needed = " (required)" if key in part.get("required", ()) else ""
            default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
            lines.append(f"| `{key}`{needed} | {type_of(value)} | {default} | {cell(value.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def property_rows(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of an object's keys, each with its type and meaning."""
    yield "| key | type | meaning |"
    yield "|---|---|---|"
    for key, value in schema.get("properties", {}).items():
        yield f"| `{key}` | {type_of(value)} | {cell(value.get('description', ''))} |"


def type_of(value: Mapping[str, Any]) -> str:
    """Name a schema's type; a definition becomes a link to its heading."""
    if reference := value.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower().replace('.', '')})"
    for word in ("anyOf", "oneOf"):
        if word in value:
            return " or ".join(dict.fromkeys(type_of(each) for each in value[word]))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value.get("enum", [value.get("const")]))
    kind = value.get("type", "any")
    if "prefixItems" in value:
        return f"[{', '.join(type_of(each) for each in value['prefixItems'])}]"
    if kind == "array":
        return f"list of {type_of(value.get('items', {}))}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {type_of(value['additionalProperties'])}"
    if kind == ["number", "null"]:  # null: not finite
        return "number"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def plain_text(text: str) -> str:
    """Return a help text as Markdown."""
    return _MARKUP.sub("", text).replace("\x08", "").replace("\\[", "[")


def cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return " ".join(plain_text(str(text)).split()).replace("|", "\\|").replace("<", "&lt;")
