"""The interface covered by the deprecation policy, and its record for comparison with later releases.

python tools/interface.py        # writes tests/data/interface.json, after a change that the policy allows
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main
from json_page import JSON_VERSION, WRITTEN, json_paths

import repo_manager
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app

__all__ = ["RECORD", "interface"]

RECORD = Path(__file__).parents[1] / "tests/data/interface.json"


def interface() -> dict[str, Any]:
    """Return a release's promises: commands with their options, public names, keys of the JSON documents."""
    table: Any = typer.main.get_command(app)
    context = table.make_context("repo-manager", [], resilient_parsing=True)
    names = [name for entries in COMMANDS.values() for name in entries]
    options = (_options(table.get_command(context, name), name) for name in names)
    return {
        "options": {path: found for command in options for path, found in command},
        "names": list(repo_manager.__all__),
        "json_version": JSON_VERSION,
        "json": {name: json_paths(name) for name in names if name not in WRITTEN},
    }


def _options(command: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a command and those below it, each with the names of its options."""
    yield path, sorted({name for each in command.params for name in (*each.opts, *each.secondary_opts) if "-" in name})
    for name, inner in getattr(command, "commands", {}).items():
        yield from _options(inner, f"{path} {name}")


def main() -> None:
    """Write the record."""
    RECORD.write_text(json.dumps(interface(), indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
