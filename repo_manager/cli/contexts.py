"""`--context NAME`: the repository and servers of the settings that a command works on, and what guards protected ones.

A protected context is never taken by default for a change: the command itself has to name it. That holds also where its
repository or its server is reached by `-r` or `--to`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from repo_manager.errors import UsageError
from repo_manager.settings import Context, load_contexts, load_settings, use_context

__all__ = ["chosen_context", "context_taken", "invocation"]


@dataclasses.dataclass
class Invocation:
    """The command that runs: its Click context, and the context that it names."""

    click: Any = None
    named: str | None = None


invocation = Invocation()


def chosen_context(ctx: typer.Context, value: str | None) -> str | None:
    """Take `--context` for all that reads the settings from now on; the callback of the option."""
    invocation.click, invocation.named = ctx, value
    use_context(value)
    if value is not None:
        load_settings()  # an unknown one is refused before anything else is looked at
    return value


def context_taken() -> Context | None:
    """Return the context that the settings take, for results; `None` without one, or where the file is broken."""
    try:
        return load_contexts().get(load_settings().context or "")
    except UsageError:
        return None
