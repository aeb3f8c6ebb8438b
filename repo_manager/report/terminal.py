"""The one place for printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import datetime
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import RepoManagerError, redacted
from repo_manager.optional import deferred
from repo_manager.report.plain import plain
from repo_manager.types import as_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from repo_manager.report import console as consoles
else:
    consoles = deferred("repo_manager.report.console")  # imports rich: a tenth of the time of `serve --json`

__all__ = ["WIDE", "Terminal", "error_document", "next_command"]


WIDE = 10_000
"""Width of a console with nothing left out or folded."""


def next_command(*words: str, repository: str | None) -> str:
    """Return a command to copy.

    Args:
        words: of the command, without the program's name.
        repository: the value of `--repository`, needed by the next command, too. `None`: nothing.
    """
    return shlex.join(["repo-manager", *words, *([] if repository is None else ["-r", repository])])


class Terminal:
    """Prints one command's result, and its progress.

    Args:
        as_json: print the result as one JSON document instead of tables.
        quiet: no progress and no notes. Errors and the result still show.
        wide: tables as wide as they are, with every column and whole times.
        context: of the settings, shown in the result. `None` without one.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, wide: bool = False, context: str | None = None
    ) -> None:
        self.json = as_json
        self.context = context
        self.quiet = quiet
        self._streams = sys.stdout, sys.stderr
        self._width = WIDE if wide else None

    @functools.cached_property
    def _out(self) -> Console:
        return consoles.console_of(self._streams[0], self._width)

    @functools.cached_property
    def _err(self) -> Console:
        return consoles.console_of(self._streams[1])

    @property
    def is_live(self) -> bool:
        """Whether stderr is a terminal a bar can be drawn on."""
        return not self.quiet and self._err.is_terminal

    @property
    def console(self) -> Console:
        """The console of stderr, for live views."""
        return self._err

    def progress(self, message: str) -> None:
        """Report the step under way on stderr."""
        if not self.quiet:
            self._err.print(f"[dim]{_escape(message)}[/dim]", highlight=False)

    def note(self, message: str) -> None:
        """Print a remark for the user on stderr."""
        if not self.quiet:
            self._err.print(_escape(message), highlight=False)

    def warn(self, message: str) -> None:
        """Warn on stderr, even when quiet."""
        self._err.print(f"[yellow]Warning:[/yellow] {_escape(message)}", highlight=False)

    def result(self, result: Any, *renderables: RenderableType) -> None:
        """Print a command's result: its JSON form, or the renderables one after the other."""
        if self.json:
            try:
                # Written piece by piece: the whole text of a large listing would double the memory.
                document = self._in_context(as_json(result))
                sys.stdout.writelines(map(redacted, json.JSONEncoder(indent=2).iterencode(document)))
                sys.stdout.write("\n")
                sys.stdout.flush()
            except BrokenPipeError:
                consoles.discard(sys.stdout)
            return
        if self.context is not None and renderables:
            self._out.print(f"Context: {_escape(self.context)}", highlight=False)
        for renderable in renderables:
            self._out.print(consoles.shown(renderable), highlight=False)

    def watch(self, frames: Iterable[tuple[Any, Sequence[RenderableType]]]) -> None:
        """Print results as they come: in place on a terminal, elsewhere each different from the one before.

        Args:
            frames: results, as for `result`. With `--json` each is one line.
        """
        before = None
        if self._out.is_terminal and not self.json:
            self._out.clear()
        for result, renderables in frames:
            document = as_json(result)
            changed, before = document != before, document
            if self.json:
                if changed:
                    self._out.file.write(redacted(json.dumps(self._in_context(document))) + "\n")
                    self._out.file.flush()
            elif self._out.is_terminal:
                with self._out.capture() as frame:
                    self._out.print(
                        f"{datetime.datetime.now():%H:%M:%S}  (Ctrl-C ends it)", style="dim", highlight=False
                    )
                    self.result(result, *renderables)
                lines = frame.get().splitlines()[: self._out.height - 1]
                self._out.file.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
                self._out.file.flush()
            elif changed:
                self._out.print(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}", highlight=False)
                self.result(result, *renderables)

    def _in_context(self, document: Any) -> Any:
        """Return a JSON document with the context it is of."""
        if self.context is None or not isinstance(document, dict):
            return document
        return {"context": self.context.partition(" ")[0], **document}

    def lines(self, text: str) -> None:
        """Print lines of others, a server's log for instance, as they are and as long as they are."""
        self._out.print(plain(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, *renderables: RenderableType) -> None:
        """Print a step on the way to the result on stderr, a plan for instance."""
        if not self.quiet:
            for renderable in renderables:
                self._err.print(consoles.shown(renderable), highlight=False)

    def error(self, error: RepoManagerError) -> None:
        """Print an error: text on stderr, and with JSON also an object on stdout, unless a result says it already."""
        self._err.print(f"[red]Error:[/red] {_escape(error.message)}", highlight=False, soft_wrap=True)
        if error.hint is not None:
            self._err.print(_escape(error.hint), highlight=False, soft_wrap=True)
        if self.json and not error.is_shown:
            sys.stdout.write(error_document(type(error).__name__, error.message, error.hint, error.exit_code))
            sys.stdout.flush()

    def reporter(self) -> Callable[[str], None]:
        """Return `progress` as a plain function, for the stages."""
        return self.progress


def error_document(kind: str, message: str, hint: str | None, exit_code: int) -> str:
    """Return an error as the JSON a command prints in place of its result.

    Args:
        kind: name of the error's class.
        message: text of the error, without `Error:` and without the hint.
        hint: the next step for the user. `None`: there is none.
        exit_code: exit code of the command.
    """
    error = {"type": kind, "message": message, "hint": hint, "exit_code": exit_code}
    return json.dumps({"error": error}, indent=2) + "\n"


def _escape(text: str) -> str:
    """Keep rich from reading markup in a message (shapes such as `[1, 3]` look like tags)."""
    return plain(text).replace("[", "\\[")
