"""`--context NAME`: the repository and servers of the settings that a command works on, and what guards protected ones.

A protected context is never taken by default for a change: the command itself has to name it. That holds also where its
repository or its server is reached by `-r` or `--to`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import typer

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository.location import Location, parse_location
from repo_manager.settings import Context, load_contexts, load_settings, use_context

__all__ = ["chosen_context", "context_taken", "destination_of", "guard"]

_CHANGING = {
    *("add", "ensemble", "tag", "copy", "promote", "remove", "gc", "adopt", "sign", "apply"),
    *("deploy", "rollback", "undeploy", "serve", "tune", "snapshot"),
}
_CHANGING_WHEN_TOLD = {"config", "labels", "verify"}
_INTO = "context:"
_READS = {"name", "names", "repository", "context", "json", "quiet", "wide", "output", "signed_by", "html"}


@dataclasses.dataclass
class _Invocation:
    """The command that runs: its Click context, and the context that it names."""

    click: Any = None
    named: str | None = None


_invocation = _Invocation()


def chosen_context(ctx: typer.Context, value: str | None) -> str | None:
    """Take `--context` for all that reads the settings from now on; the callback of the option."""
    _invocation.click, _invocation.named = ctx, value
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


def destination_of(text: str) -> Location:
    """Return where `copy --into` goes: a place, or `context:NAME`.

    Raises:
        UsageError: there is no such context, it has no repository, or a protected one is named by its place.
        RepositoryError: it is a URL that cannot be one of a repository.
    """
    if not text.startswith(_INTO):
        place = parse_location(text)
        _refuse_protected(place, hint="If that is meant, name the context: --into context:{name}")
        return place
    name, contexts = text.removeprefix(_INTO), load_contexts()
    found = contexts.get(name)
    if found is None or found.repository is None:
        with_one = [each.name for each in contexts.values() if each.repository is not None]
        raise UsageError(
            f"--into {text}: no context of that name has a repository; {', '.join(with_one) or 'none'} has"
        )
    return parse_location(found.repository)


def guard(place: Location, given: str | None) -> None:
    """Refuse what mixes two contexts, and a change of a protected one that the command does not name.

    Args:
        place: the repository that the command works on.
        given: what `--repository` says; `None`: the settings' was taken.

    Raises:
        UsageError: as said.
    """
    context = context_taken()
    if given is not None and context is not None and context.repository is not None:
        own = parse_location(context.repository)
        if not _same(own, place):
            raise UsageError(
                f"-r {given} is not the repository of the context {context.name!r}, {own}, whose server and keys apply",
                hint="Leave out -r, or take no context: --context none",
            )
    if _changes():
        _refuse_protected(place, hint="If that is meant, name the context in the command: --context {name}")


def _refuse_protected(place: Location, *, hint: str) -> None:
    params: Mapping[str, Any] = {} if _invocation.click is None else _invocation.click.params
    command = "" if _invocation.click is None else str(_invocation.click.info_name)
    settings = load_settings()
    servers = {*(params.get("to") or ()), settings.server} if isinstance(params.get("to"), list) else {settings.server}
    for context in load_contexts().values():
        if not context.protected or context.name == _invocation.named:
            continue
        of_place = context.repository is not None and _same(parse_location(context.repository), place)
        if of_place or (context.server is not None and context.server in servers):
            what = str(place) if of_place else str(context.server)
            raise UsageError(
                f"`{command}` would change {what}, which is of the protected context {context.name!r}",
                hint=hint.format(name=context.name),
            )


def _changes() -> bool:
    """Say whether the command that runs changes something."""
    click = _invocation.click
    if click is None or click.params.get("dry_run") or click.params.get("check"):
        return False
    if click.info_name in _CHANGING_WHEN_TOLD:
        return any(value for name, value in click.params.items() if name not in _READS)
    return click.info_name in _CHANGING


def _same(one: Location, other: Location) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, RepositoryError):
        return str(one) == str(other)
