"""The table of commands and their help: groups, panels, choices, nothing cut, nothing left out."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

import repo_manager.cli
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app

FOLDER = Path(repo_manager.cli.__file__).parent
ROWS = {name: entry for entries in COMMANDS.values() for name, entry in entries.items()}
MAX_PARAMETERS = 8


def command(name: str) -> Any:
    return typer.main.get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]


def help_of(*words: str, columns: int = 80) -> str:
    ended = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(columns)})
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_the_table_holds_every_command_of_every_module() -> None:
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules([str(FOLDER)]):
        module = importlib.import_module(f"repo_manager.cli.{info.name}") if info.name != "__main__" else None
        if info.name != "main" and isinstance(getattr(module, "app", None), typer.Typer):
            found |= dict.fromkeys(typer.main.get_group(module.app).commands, info.name)  # type: ignore[union-attr]
    assert found == {name: entry.module for name, entry in ROWS.items()}


def test_the_groups_are_those_of_the_help() -> None:
    assert list(COMMANDS) == ["Start", "Model", "Repository", "Serve", "Measure"]
    text = help_of()
    places = [text.index(f"─ {group} ─") for group in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ROWS)
def test_the_line_of_a_command_fits_80_columns(name: str) -> None:
    lines = [line.strip("│ \n") for line in help_of().splitlines()]
    assert any(re.fullmatch(rf"{name} +{re.escape(ROWS[name].help)}", line) for line in lines)


@pytest.mark.parametrize("name", ROWS)
def test_the_help_shows_every_option_and_its_words(name: str) -> None:
    """Square brackets are text: Rich would take `[default: ...]` for markup and drop it."""
    shown = re.sub(r"[\s│]+", " ", help_of(name, columns=400))
    if name == "loadtest":
        return  # Its help is that of its sub-command, read by test_load_commands.py.
    for parameter in command(name).params:
        if getattr(parameter, "hidden", False):
            assert parameter.opts == ["--options-from-stdin"]  # passed from one of our processes to another
            continue
        for word in (*parameter.opts, *parameter.secondary_opts):
            assert not word.startswith("--") or word in shown
        described = getattr(parameter, "help", None) or ""
        assert re.sub(r"\s+", " ", described).replace("\\[", "[") in shown


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.name}:{node.name}", node


def test_no_function_has_more_than_eight_parameters() -> None:
    many = {
        where: count
        for where, node in functions()
        if (count := len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)) > MAX_PARAMETERS
        and where != "option_groups.py:option"
    }
    assert many == {}


CLOSED = [
    ("add", "backend"), ("add", "sparsity"), ("add", "instance_kind"), ("add", "precision"), ("add", "plan_detail"),
    ("add", "hardware_compatibility"), ("add", "accelerator"), ("add", "accelerator_precision"),
    ("convert", "precision"), ("serve", "restart"), ("compare", "protocol"), ("compare", "shared_memory"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option"), CLOSED)
def test_a_closed_choice_is_listed_and_completed(name: str, option: str) -> None:
    (parameter,) = [one for one in command(name).params if one.name == option]
    completed = [item.value for item in parameter.shell_complete(None, "")]
    assert len(completed) > 0
    shown = re.sub(r"[\s│]+", "", help_of(name, columns=400))
    for value in completed:
        assert value in shown


def test_a_choice_that_is_a_text_is_seen() -> None:
    """Every field of a group of options whose type is a Literal or an Enum is one for Typer as well."""
    for name in ROWS:
        for parameter in getattr(command(name), "params", ()):
            kind = parameter.type_descriptor.annotation
            if get_origin(kind) is Literal:
                assert [item.value for item in parameter.shell_complete(None, "")] == list(get_args(kind))


def test_every_command_documents_itself() -> None:
    for name in ROWS:
        assert inspect.cleandoc(command(name).help or ""), name
