"""Every `repo-manager ...` in an asset or a document, parsed by the real command line, never run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from repo_manager.cli.main import app

# Typer brings its own Click or uses an installed one, depending on its version.
_errors = sys.modules[typer.BadParameter.__module__]
ClickException, MissingParameter, Exit = typer.BadParameter.__mro__[2], _errors.MissingParameter, typer.Exit

_START = re.compile(r"(?<![\w./$\"'-])repo-manager (?=[a-z-])")
# A command ends at a shell operator, the end of inline code, or a comment.
_END = re.compile(r"`|─|\s{2,}(?=[a-z])|\s(?:\|\||&&|\||;|>>?|2>|<|#)|;\s|;$|\)\s|\)$|\s→|\s\\n")
_ARRAY = re.compile(r"\$\{\w+\[@\][^}]*(?:\{[^}]*\}[^}]*)?\}\"?\}?")
_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")
_VARIABLE = re.compile(r"\$\{?\w+\}?|\$\([^)]*\)|\{\{[^}]*\}\}")
_OPTIONAL = re.compile(r"(?<=\s)\[[^\]]*\]")
_ALTERNATIVES = re.compile(r"([\w+]+)(?:\|[\w+]+)+")
# Words of prose after the name in a sentence.
_COMMANDS = frozenset(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Found:
    """A command line.

    Attributes:
        words: its arguments.
        mention: its name alone, or between backticks in a sentence: arguments may be left out.
    """

    words: list[str]
    mention: bool = False


def command_lines(text: str, *, prose: bool = False) -> Iterator[Found]:
    """Yield the arguments of each command in a text.

    Args:
        text: a script, YAML, or Markdown.
        prose: take only the text in code (Markdown).
    """
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    for line in _code_of(joined) if prose else joined.splitlines():
        for match in _START.finditer(line):
            rest = line[match.end() :]
            word = re.match(r"[a-z-]+", rest)
            if word is None or (word[0] not in _COMMANDS and not word[0].startswith("-")):
                continue
            words = _words(rest)
            yield Found(words, "`" in rest or len(words) == 1)


def _code_of(text: str) -> Iterator[str]:
    """Yield the texts of code blocks and between backticks."""
    for index, part in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if index % 2:
            yield from part.splitlines()
        else:
            yield from (found + "`" for found in re.findall(r"`([^`\n]+)`", part))


def _words(rest: str) -> list[str]:
    text = _DEFAULT.sub(r"\1", _ARRAY.sub("", rest))
    text = _ALTERNATIVES.sub(r"\1", _VARIABLE.sub("1", _OPTIONAL.sub("", text)))
    end = _END.search(text)
    text = text if end is None else text[: end.start()]
    try:
        words = shlex.split(text)
    except ValueError:
        words = shlex.split(text.rstrip("\"'").rstrip())
    return [word.rstrip(",;") for word in words if word not in ('"', "'")]


def parse(arguments: list[str]) -> None:
    """Parse a command line as the tool would; nothing is run.

    Raises:
        click.ClickException: it would be refused.
    """
    command: Any = typer.main.get_command(app)
    parent: Any = None
    name = "repo-manager"
    while True:
        context = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        left = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, arguments = command.resolve_command(context, left)
        parent = context


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the text files below a folder, by name."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
