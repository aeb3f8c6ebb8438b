"""The `--json` documents: a JSON schema for each command, and the page with their list.

Both come from the classes of the results, so they agree with the code.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from json_schema import is_class, properties_of, reached, schema_of
from schema_page import property_rows, type_of

from repo_manager.cli.commands import COMMANDS

__all__ = ["JSON_VERSION", "WRITTEN", "json_page", "json_paths", "json_schemas"]

JSON_VERSION = 1
"""Version of the documents. It rises when a key is removed or changes its type; a new key does not raise it."""

ROOT = Path(__file__).parents[1]


class _Form(NamedTuple):
    """One form of a command's `--json` document.

    Attributes:
        when: the options for this form. Empty for the usual one.
        parts: key of the document -> the function of `repo_manager/cli/` whose result is below it, or a class. The key
            `""` is a result that is the document itself. `MODULE.name` names another module, `#1` one of several
            results, `?` one that may be null, `:NAME` a method of the result that makes the document, and `:string`
            alone a plain value.
    """

    when: str
    parts: Mapping[str, str]


_ROLLOUT = {"deploy": "deploy", "rollback": "rollback", "undeploy": "undeploy"}
_COPY = (_Form("", {"": "CopiedVersion"}),)
_DOCUMENTS: Mapping[str, tuple[_Form, ...]] = {
    "quickstart": (_Form("", {"result": "quickstart", "report": ":string"}),),
    "doctor": (_Form("", {"": "examine_machine"}),),
    "inspect": (_Form("", {"": "inspect_model"}),),
    "prune": (_Form("", {"": "prune_with_data#1"}),),
    "calibrate": (_Form("`calibrate make`", {"": "make_calibration"}),),
    "convert": (_Form("", {"": "convert"}),),
    "add": (
        _Form("a converted ONNX file", {"": "add"}),
        _Form("files published unchanged", {"": "add_files"}),
        _Form("`--preprocess`", {"": "add_with_images"}),
    ),
    "ensemble": (_Form("", {"": "make_ensemble"}),),
    "list": (_Form("", {"": "ModelListing"}),),
    "show": (
        _Form("`show NAME`", {"model": "find_model", "state": "model_state"}),
        _Form("`show NAME:VERSION`", {"": "ShownVersion"}),
    ),
    "history": (_Form("", {"": "History"}),),
    "report": (_Form("", {"": "WrittenCards"}),),
    "verify": (_Form("", {"repairs": "repair", "signatures": "signing.check_signatures#0", "problems": "verify"}),),
    "diff": (_Form("", {"": "MeasuredDifference"}),),
    "config": (_Form("", {"": "change_config"}),),
    "labels": (_Form("with `--file`", {"": "set_labels"}), _Form("without `--file`", {"": "read_labels"})),
    "tag": (_Form("", {"": "Tagging"}),),
    "copy": _COPY,
    "promote": _COPY,
    "remove": (_Form("", {"": "remove"}),),
    "gc": (_Form("of versions", {"": "gc"}), _Form("`--snapshots`", {"": "SnapshotRemovals"})),
    "adopt": (_Form("", {"repository": ":string", "adopted": "adopt"}),),
    "sign": (_Form("", {"": "sign_version"}),),
    "apply": (
        _Form("", {"": "carry_out"}),
        _Form("`--check`, `--dry-run`, or nothing to change", {"changes": ":boolean", "models": "plan_declaration"}),
    ),
    "snapshot": (_Form("", {"": "snapshot"}),),
    "fetch": (_Form("", {"": "fetch"}),),
    "serve": (
        _Form("in the foreground", {"": "ReadyServer"}),
        _Form("`--detach`", {"": "start_detached"}),
        _Form("`--stop`", {"stopped": "stop_running"}),
    ),
    **{command: (_Form("", {"rollout": function}),) for command, function in _ROLLOUT.items()},
    "traffic": (_Form("", {"": "shift_traffic"}),),
    "status": (_Form("", {"": "status"}),),
    "infer": (_Form("", {"": "infer:document"}),),
    "logs": (_Form("", {"": "ShownLog"}),),
    "loadtest": (_Form("", {"": "run_load_test", "verdict": "load_options.judge?"}),),
    "compare": (_Form("", {"comparisons": "compare_all"}),),
    "tune": (_Form("", {"": "tune"}),),
}
WRITTEN = {"export": "repository"}
"""Command -> the schema of its document in docs/."""


def _names() -> list[str]:
    return [name for entries in COMMANDS.values() for name in entries]


def _parts(command: str, form: _Form) -> list[tuple[str, Any]]:
    """Return a form's keys, each with the type of its value (a text: a plain value).

    Raises:
        ValueError: the command's module does not name the key.
    """
    own = next(names[command].module for names in COMMANDS.values() if command in names)
    found: list[tuple[str, Any]] = []
    for key, source in form.parts.items():
        if source.startswith(":"):
            found.append((key, source[1:]))
        else:
            path, _, index = source.removesuffix("?").partition("#")
            path, _, method = path.partition(":")
            module, _, name = path.rpartition(".")
            named = getattr(importlib.import_module(f"repo_manager.cli.{module or own}"), name)
            kind = named if isinstance(named, type) else typing.get_type_hints(named)["return"]
            if typing.get_origin(kind) is collections.abc.Iterator:  # a context manager gives one result
                (kind,) = typing.get_args(kind)
            kind = typing.get_args(kind)[int(index)] if index else kind
            kind = typing.get_type_hints(getattr(kind, method))["return"] if method else kind
            found.append((key, kind | None if source.endswith("?") else kind))
        modules = {own, *(part.partition(".")[0] for part in form.parts.values() if "." in part)}
        texts = (inspect.getsource(importlib.import_module(f"repo_manager.cli.{name}")) for name in modules)
        if key and not any(f'"{key}":' in text for text in texts):
            raise ValueError(f"{command}: no module of {sorted(modules)} has the key {key!r}")
    return found


# The schemas.


@functools.cache
def json_schemas() -> Mapping[str, dict[str, Any]]:
    """Return command -> the JSON schema of its documents: each form of its result, and the error in place of one.

    A class has the same name in all of them.
    """
    classes: dict[str, Any] = {}
    return {name: _command_schema(name, classes) for name in _names()}


def _command_schema(command: str, classes: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a command; new classes are added to `classes`."""
    start = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:repo-manager:json:v{JSON_VERSION}:{command}",
        "title": f"repo-manager {command} --json",
    }
    if command in WRITTEN:
        written = json.loads((ROOT / f"docs/{WRITTEN[command]}.schema.json").read_text(encoding="utf-8"))
        definitions = written.pop("$defs", {})
        forms = [{key: value for key, value in written.items() if not key.startswith("$")}]
    else:
        forms = [_form_schema(command, form, classes) for form in _DOCUMENTS[command]]
        definitions = {name: classes[name] for name in sorted(reached(forms, classes, set()))}
    definitions["Error"] = _ERROR
    return {**start, "anyOf": [*forms, {"$ref": "#/$defs/Error"}], "$defs": definitions}


_ERROR = {
    "type": "object",
    "description": "What a command prints in place of its result when it fails.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "description": "the class of the error in `repo_manager.errors`."},
                "message": {"type": "string", "description": "what was found, and what was expected."},
                "hint": {"type": ["string", "null"], "description": "the next step; `null` if there is none to name."},
                "exit_code": {"type": "integer", "description": "the exit code of the command."},
            },
            "required": ["type", "message", "hint", "exit_code"],
        }
    },
    "required": ["error"],
}


def _form_schema(command: str, form: _Form, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one form; the classes of its values are added to `definitions`."""
    properties: dict[str, Any] = {}
    whole: dict[str, Any] | None = None
    for key, kind in _parts(command, form):
        if key:
            properties[key] = schema_of(kind, definitions)
        elif is_class(kind):
            properties |= properties_of(kind, definitions)
        else:
            whole = schema_of(kind, definitions)
    title = {"title": form.when} if form.when else {}
    if whole is not None:
        return {**title, **whole}
    return {**title, "type": "object", "properties": properties, "required": list(properties)}


# The page, and the file later versions are compared with.


def json_page() -> str:
    """Return the page of the keys of `--json` documents."""
    folder = f"json/v{JSON_VERSION}"
    lines = [
        "# JSON documents\n",
        "`--json` prints one document to stdout. The tables list its keys. Each command has a",
        "[JSON schema](https://json-schema.org), and the tests of this project validate real output with it. The",
        "classes of nested values follow [below](#classes).\n",
        f"These are the documents of version {JSON_VERSION}. A new release may add keys. It removes a key, or changes",
        "its type, only with a new version ([deprecation policy](../deprecation.md#json-documents)).\n",
        "- A key is always there. A value that is not known is `null`, and so is a float that is not finite.",
        "- Most units are in the names: `latency_ns`, `workspace_bytes`.",
        "- `status --watch` prints one document a line.",
        "- With a [context](../contexts.md), a document also has the key `context`.",
        "- An error is a document, too ([exit codes](../exit-codes.md)):\n",
        *property_rows(_ERROR["properties"]["error"]),  # type: ignore[index]
        "",
    ]
    classes: dict[str, Any] = {}
    for name, schema in json_schemas().items():
        lines += [f"## {name}\n", f"[{name}.schema.json]({folder}/{name}.schema.json)\n"]
        if name in WRITTEN:
            lines.append(f"The keys are those of [repository.yaml]({WRITTEN[name]}.md).\n")
            continue
        for form in schema["anyOf"][:-1]:
            when = form.get("title", "")
            lines += [f"{when[0].upper()}{when[1:]}:\n"] if when else []
            lines += [*property_rows(form), ""] if "properties" in form else [f"A {type_of(form)}.\n"]
        classes |= schema["$defs"]
    lines.append("## Classes\n")
    for key in sorted(set(classes) - {"Error"}):
        lines += [f"### {key}\n", f"{classes[key]['description']}\n", *property_rows(classes[key]), ""]
    return "\n".join(lines) + "\n"


def json_paths(command: str) -> dict[str, str]:
    """Return every key of a command's documents, with those of nested objects: `number: key.inner[]` -> its type.

    The number is that of the form, where a command has several.
    """
    schema = json_schemas()[command]
    found: dict[str, str] = {}
    for number, form in enumerate(schema["anyOf"][:-1]):
        start = f"{number}: " if "title" in form else ""
        for path, kind in _walk(form, schema["$defs"], "", ()):
            found[f"{start}{path}"] = kind
    return found


def _walk(value: Mapping[str, Any], defs: Mapping[str, Any], path: str, seen: tuple[str, ...]) -> Iterator[Any]:
    """Yield each path below a value with the names of its JSON types; a class within itself is not entered again."""
    parts = value.get("anyOf", [value])
    kinds: set[str] = set()
    inner: list[Iterator[Any]] = []
    for part in parts:
        name = part.get("$ref", "").rpartition("/")[2]
        entered, part = ((*seen, name), defs[name]) if name else (seen, part)
        kind = part.get("type", "enum" if "enum" in part else "any")
        kinds |= set(kind) if isinstance(kind, list) else {kind}
        if seen.count(name) and name:
            continue
        for key, each in part.get("properties", {}).items():
            inner.append(_walk(each, defs, f"{path}.{key}" if path else key, entered))
        if isinstance(part.get("additionalProperties"), dict):
            inner.append(_walk(part["additionalProperties"], defs, f"{path}.*", entered))
        for each in (*part.get("prefixItems", ()), *([part["items"]] if "items" in part else ())):
            inner.append(_walk(each, defs, f"{path}[]", entered))
    if path:
        yield path, " or ".join(sorted(kinds))
    for each in inner:
        yield from each
