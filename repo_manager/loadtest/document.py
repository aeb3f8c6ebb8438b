"""Reads a load test's JSON back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError
from repo_manager.loadtest.result import SCHEMA_VERSION, LoadTestReport

__all__ = ["read_report", "report_from_json"]


def read_report(path: Path) -> LoadTestReport:
    """Read the JSON that `loadtest --json` or `--report` wrote.

    Raises:
        InputError: unreadable, no such report, or of a schema that is not understood.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"{path} cannot be read as a load test's report: {exc}") from exc
    return report_from_json(document, where=str(path))


def report_from_json(document: Any, *, where: str = "the report") -> LoadTestReport:
    """Return the report that `as_json` made `document` of; unknown fields are left out.

    Raises:
        InputError: it is none, or of another schema version.
    """
    hint = "Write one with: repo-manager loadtest ... --report FILE."
    if not isinstance(document, Mapping) or "points" not in document:
        raise InputError(f"{where} is no report of a load test", hint=hint)
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise InputError(f"{where} has the schema version {found}, expected {SCHEMA_VERSION}", hint=hint)
    try:
        report: LoadTestReport = _restored(LoadTestReport, document)
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{where} is a damaged report of a load test: {exc!r}", hint=hint) from exc
    return report


def _restored(kind: Any, value: Any) -> Any:
    """Turn plain JSON into the annotated type: dataclasses, tuples, mappings, optional values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _restored(next(item for item in arguments if item is not types.NoneType), value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return kind(**{name: _restored(hints[name], value[name]) for name in names})
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_restored(arguments[0], item) for item in value)
        return tuple(_restored(item, part) for item, part in zip(arguments, value, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {_key(arguments[0], key): _restored(arguments[1], item) for key, item in value.items()}
    return value


def _hints(kind: type) -> dict[str, Any]:
    """Return a dataclass's field types; those that a generic base leaves open as this class fills them in."""
    filled = tuple(argument for base in getattr(kind, "__orig_bases__", ()) for argument in typing.get_args(base))
    hints = typing.get_type_hints(kind)
    return {name: hint[filled] if getattr(hint, "__parameters__", ()) else hint for name, hint in hints.items()}


def _key(kind: Any, key: str) -> Any:
    return int(key) if kind is int else key
