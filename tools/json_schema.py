"""The JSON schema of a class of results, as `as_json` writes it, from its annotations and its docstring."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from repo_manager.cli.commands import COMMANDS
from repo_manager.types import _json_fields

__all__ = ["is_class", "properties_of", "reached", "schema_of"]

_COMMANDS = {name for entries in COMMANDS.values() for name in entries}


def properties_of(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of each key of a class."""
    hints, meanings = typing.get_type_hints(kind, localns=_deferred_names(kind)), _meanings(kind)
    arguments = _type_arguments(kind)
    found: dict[str, Any] = {}
    for name in _json_fields(kind) or ():
        found[name] = dict(schema_of(_filled(hints[name], arguments), definitions))
        if text := " ".join(meanings.get(name, "").split()).replace("`None`", "`null`"):
            found[name]["description"] = text
    return found


def _type_arguments(kind: type) -> dict[Any, Any]:
    """Return the types behind the type variables of a class's generic bases."""
    found: dict[Any, Any] = {}
    for each in kind.__mro__:
        for base in each.__dict__.get("__orig_bases__", ()):
            variables = getattr(typing.get_origin(base), "__parameters__", ())
            found |= {
                variable: found.get(arg, arg) for variable, arg in zip(variables, typing.get_args(base), strict=False)
            }
    return found


def _filled(hint: Any, arguments: Mapping[Any, Any]) -> Any:
    """Return an annotation with its type variables replaced."""
    if isinstance(hint, typing.TypeVar):
        return arguments[hint]
    parts = typing.get_args(hint)
    if not parts or not getattr(hint, "__parameters__", ()):
        return hint
    filled = tuple(_filled(part, arguments) for part in parts)
    origin = typing.get_origin(hint)
    return typing.Union[filled] if origin in (typing.Union, types.UnionType) else origin[filled]  # noqa: UP007


_PLAIN_TYPES: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},  # null: not finite
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
}


def schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an annotation, as `as_json` writes its values."""
    if isinstance(kind, str):
        return {"type": kind}
    if kind in _PLAIN_TYPES:
        return _PLAIN_TYPES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(each, definitions) for each in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1], definitions)}
    if origin is tuple and Ellipsis not in arguments:
        items = [schema_of(each, definitions) for each in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is not None and issubclass(origin, collections.abc.Iterable):
        return {"type": "array", "items": schema_of(arguments[0], definitions)}
    if hasattr(kind, "__supertype__"):
        return schema_of(kind.__supertype__, definitions)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [each.value for each in kind]}
    if is_class(kind):
        return {"$ref": f"#/$defs/{_defined(kind, definitions)}"}
    if isinstance(kind, typing.TypeVar):
        raise TypeError(f"{kind} stands for no type")
    return {"type": "string"}  # a path, a place, or another value written as text


def is_class(kind: Any) -> bool:
    """Return whether a type is a class of results, an object in JSON."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and _json_fields(kind) is not None


def _defined(kind: type, definitions: dict[str, Any]) -> str:
    """Return the name of a class's definition. A new one is added.

    A name shared with a command, or with a class of another module, gets its module: both have headings on one page.
    """
    module = kind.__module__.rpartition(".")[2]
    source = f"{kind.__module__}.{kind.__qualname__}"
    name = f"{kind.__name__}.{module}" if kind.__name__.lower() in _COMMANDS else kind.__name__
    if definitions.get(name, {}).get("$comment", source) != source:
        name = f"{kind.__name__}.{module}"
    if name not in definitions:
        definitions[name] = {"$comment": source}  # first, for a class with others of itself inside
        properties = properties_of(kind, definitions)
        definitions[name] |= {
            "type": "object",
            "description": " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()),
            "properties": properties,
            "required": list(properties),
        }
    if definitions[name]["$comment"] != source:
        raise ValueError(f"two classes of results are called {name}")
    return name


def _deferred_names(kind: type) -> dict[str, Any]:
    """Return the imports for type checkers only, by name, in the modules of a class and of its bases."""
    found: dict[str, Any] = {}
    for module in dict.fromkeys(map(inspect.getmodule, kind.__mro__)):
        if module is None or not module.__name__.startswith("repo_manager"):
            continue
        imports = [
            (node.module, alias.name)
            for block in ast.parse(inspect.getsource(module)).body
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repo_manager")
            for alias in node.names
        ]
        for path, name in imports:
            found[name] = vars(importlib.import_module(str(path))).get(name) or _submodule(str(path), name)
    return found


def _submodule(path: str, name: str) -> ModuleType:
    return importlib.import_module(f"{path}.{name}")


def _meanings(kind: type) -> dict[str, str]:
    """Return the descriptions of a class's attributes, from its docstring and those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        section = section.partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = text
    return found


def reached(value: Any, classes: Mapping[str, Any], found: set[str]) -> set[str]:
    """Return the names of all classes in a schema, direct and nested. They are in `found`."""
    if isinstance(value, list):
        for each in value:
            reached(each, classes, found)
    elif isinstance(value, dict):
        name = str(value.get("$ref", "")).rpartition("/")[2]
        if name and name not in found:
            found.add(name)
            reached(classes[name], classes, found)
        for each in value.values():
            reached(each, classes, found)
    return found
