"""Real `--json` documents against the published schemas."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from repo_manager.report.terminal import Terminal
from repo_manager.types import as_json

__all__ = ["check_document", "check_results", "tool"]

TOOLS = Path(__file__).parents[2] / "tools"
# Each command's function has the command's name, except these.
_COMMAND_OF = {"make": "calibrate"}


@functools.cache
def tool(name: str) -> Any:
    """Return a file of tools/ as a module."""
    sys.path.append(str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


@functools.cache
def _validator(command: str) -> jsonschema.Draft202012Validator:
    """Return a validator of a command's documents. Keys outside the schema are refused."""
    schema = copy.deepcopy(tool("json_page").json_schemas()[command])
    if command not in tool("json_page").WRITTEN:
        _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(value: Any) -> None:
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _close(each)
    if isinstance(value, dict) and value.get("type") == "object" and "properties" in value:
        value.setdefault("additionalProperties", False)


def check_document(command: str, document: Any) -> None:
    """Compare a document with the schema of its command, which must name every key."""
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key != "context"}
    error = jsonschema.exceptions.best_match(_validator(command).iter_errors(document))
    assert error is None, f"{command} --json: {error.json_path}: {error.message}"


def check_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every document printed by a command of this process until the patch ends."""
    printed = Terminal.result

    def result(terminal: Terminal, result: Any, *views: Any) -> None:
        if terminal.json and (command := _running_command()):
            check_document(command, as_json(result))
        printed(terminal, result, *views)

    monkeypatch.setattr(Terminal, "result", result)


def _running_command() -> str | None:
    """Return the command whose function is on the stack; `None`: a test prints a result of its own."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_globals.get("__name__", "").startswith("repo_manager.cli.") and name.endswith("_command"):
            name = name.removesuffix("_command")
            return _COMMAND_OF.get(name, name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
