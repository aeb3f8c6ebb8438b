"""The consoles of `Terminal`. Apart from it because rich is slow to import and not every command prints."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from repo_manager.report.plain import plain

__all__ = ["console_of", "discard", "plain_text", "shown"]

_WIDTH_WITHOUT_TERMINAL = 140


class _Console(Console):
    """A console whose reader may go away (`| head`): the command goes on, and ends with its own exit code."""

    def on_broken_pipe(self) -> None:
        """Write nothing more."""
        self.quiet = True
        discard(self.file)


def console_of(stream: Any, width: int | None = None) -> Console:
    """Make a console. Without a terminal the width is fixed, so logs keep their tables.

    Args:
        stream: the text file it writes to.
        width: columns. `None` takes the terminal's.
    """
    return _Console(file=stream, width=width or (None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL))


def discard(stream: Any) -> None:
    """Send later writes to a stream without a reader nowhere, also Python's flush at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def plain_text(text: Text) -> Text:
    """Return a styled text made safe to show, as `plain` does. A safe one stays as it is."""
    safe = plain(text.plain)
    return text if safe == text.plain else Text(safe, style=text.style)


def shown(renderable: RenderableType) -> RenderableType:
    """Return the printed text, made safe to show. Tables make their cells safe themselves."""
    if isinstance(renderable, str):
        return plain(renderable)
    return plain_text(renderable) if isinstance(renderable, Text) else renderable
