"""A command that also has sub-commands: `loadtest NAME` and `loadtest merge FILES`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

__all__ = ["DefaultGroup"]

_DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """Runs its command `run` unless the first word names another one; `run` itself is never written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of what names no other one."""
        named = [name for name in self.commands if name != _DEFAULT]
        return super().parse_args(ctx, args if args[:1] and args[0] in named else [_DEFAULT, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Leave the default command's name out of usage lines."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == _DEFAULT else name), command, rest
