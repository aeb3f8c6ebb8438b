"""`--context NAME`: the repository and servers of the settings a command works on, and the protection of some of them.

A command changes a protected context only if it names the context itself. This also holds where its repository or its
server is reached by `-r` or `--to`.
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
    """The running command: its Click context, and the context it names."""

    click: Any = None
    named: str | None = None


invocation = Invocation()


def chosen_context(ctx: typer.Context, value: str | None) -> str | None:
    """Apply `--context` to all later reads of the settings (the option's callback).

    Args:
        ctx: Click's context of the command.
        value: name of the context. `None`: the option was not given.
    """
    invocation.click, invocation.named = ctx, value
    use_context(value)
    if value is not None:
        load_settings()  # reject an unknown context first
    return value


def context_taken() -> Context | None:
    """Return the context the settings take, for results, or `None` without one, or where the file is broken."""
    try:
        return load_contexts().get(load_settings().context or "")
    except UsageError:
        return None
