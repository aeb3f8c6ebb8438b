"""Options and arguments of commands on a model repository."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from repo_manager.cli.contexts import context_taken, invocation
from repo_manager.cli.option_groups import option
from repo_manager.errors import RepoManagerError, RepositoryError, UsageError
from repo_manager.repository.location import Location, local_folder, parse_location
from repo_manager.repository.scan import scan
from repo_manager.repository.tags import model_state
from repo_manager.settings import load_contexts, load_settings
from repo_manager.triton_config.completion import backend_of_files
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = [
    "AnyModelName",
    "ModelName",
    "NamedVersion",
    "RepositoryFlag",
    "destination_of",
    "model_names",
    "model_versions",
    "resolve_repository",
]


_CHANGING = {
    *("add", "ensemble", "tag", "copy", "promote", "remove", "gc", "adopt", "sign", "apply"),
    *("deploy", "rollback", "undeploy", "serve", "tune", "snapshot"),
}
_CHANGING_WHEN_TOLD = {"config", "labels", "verify"}
_INTO = "context:"
_READS = {"name", "names", "repository", "context", "json", "quiet", "wide", "output", "signed_by", "html"}


# Shell completion from a repository: the names of models, their versions and tags.
#
# Completion reads only local repositories, because the user waits for it. An error means no suggestions.


def model_names(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return the names of the repository's models with the word at their beginning.

    Args:
        ctx: Click's context of the command line so far.
        args: unused. Click passes the words before this one.
        incomplete: the start of the word.
    """
    try:
        return [name for name in _names(_folder(ctx)) if name.startswith(incomplete)]
    except (RepoManagerError, OSError, ValueError):
        return []


def model_versions(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return names of models, and after `NAME:` the versions and tags of one.

    Args:
        ctx: Click's context of the command line so far.
        args: unused. Click passes the words before this one.
        incomplete: the start of the word.
    """
    name, separator, begun = incomplete.partition(":")
    if not separator:
        return model_names(ctx, args, incomplete)
    try:
        return [f"{name}:{word}" for word in _versions(_folder(ctx), name) if word.startswith(begun)]
    except (RepoManagerError, OSError, ValueError):
        return []


def _folder(ctx: Any) -> Path:
    """Return the command's repository.

    Raises:
        ValueError: it is not on this machine.
    """
    text = ctx.params.get("repository") or load_settings().repository
    folder = local_folder(parse_location(text))
    if folder is None:
        raise ValueError(f"{text} is not local")
    return folder


def _names(folder: Path) -> Iterable[str]:
    return (model.name for model in scan(folder, deep=False))


def _versions(folder: Path, name: str) -> Iterable[str]:
    for model in scan(folder, deep=False):
        if model.name == name:
            yield from (str(entry.version) for entry in model.versions)
            yield from sorted(model_state(folder, name).tags)


ModelName = Annotated[
    str, typer.Argument(metavar="NAME", help="The model's name.", show_default=False, autocompletion=model_names)
]
AnyModelName = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="One model \\[default: all].", autocompletion=model_names)
]
NamedVersion = Annotated[
    str,
    typer.Argument(
        metavar="NAME[:VERSION]",
        help="VERSION is a number or a tag \\[default: the newest].",
        show_default=False,
        autocompletion=model_versions,
    ),
]


@dataclasses.dataclass(frozen=True)
class RepositoryFlag:
    """The repository a command works on."""

    repository: str | None = option(
        "--repository",
        "-r",
        metavar="DIR|URL",
        help="The model repository: a folder, or s3://, gs://, as:// as Triton takes it "
        "[default: $REPO_MANAGER_REPOSITORY, the settings file, or ./model_repository].",
    )

    def root(self) -> Location:
        """Return the repository: the option, else the settings.

        Raises:
            RepositoryError: it is a URL unfit for a repository.
            UsageError: it is not of the context, or of a protected one the command does not name, or the command has a
                place where it expects a model's name.
        """
        _refuse_places()
        place = resolve_repository(self.repository)
        guard(place, self.repository)
        return place


def resolve_repository(option: str | None) -> Location:
    """Return the repository to work on: the option, else the settings.

    Args:
        option: value of `--repository`. `None`: use the settings.

    Raises:
        RepositoryError: it is a URL unfit for a repository, or the folder of a model.
    """
    found = parse_location(load_settings().repository if option is None else option)
    folder = local_folder(found)
    if folder is not None:
        above = folder.resolve()
        if _is_model(above):
            raise RepositoryError(
                f"{found} is a model's folder, not a repository", hint=f"Its repository: -r {above.parent}"
            )
        if above.name.isdecimal() and _is_model(above.parent):
            raise RepositoryError(
                f"{found} is the folder of a version, not a repository",
                hint=f"Its repository: -r {above.parent.parent}",
            )
    return found


def _refuse_places() -> None:
    """Refuse a folder or a URL where the running command expects a model's name.

    Raises:
        UsageError: with the same thing as a repository and a name.
    """
    params = {} if invocation.click is None else invocation.click.params
    given = [params.get(key) for key in ("name", "named_version", "a", "b")] + list(params.get("named_versions") or ())
    for text in given:
        if isinstance(text, str) and "/" in text:
            raise UsageError(
                f"{text} is a path or a URL, expected a model's name",
                hint=f"The repository goes to -r: {_as_options(text.rstrip('/'))}",
            )


def _as_options(place: str) -> str:
    """Return how a repository, a model's folder or a version's is written as options and arguments."""
    above, _, last = place.rpartition("/")
    if "://" in place:
        return f"-r {place}, or for a model in the repository above: {last} -r {above}"
    if _is_model(Path(above or "/") / last.partition(":")[0]):
        return f"{last} -r {above or '/'}"
    folder = Path(above)
    return f"{folder.name}:{last} -r {folder.parent}" if last.isdecimal() and _is_model(folder) else f"-r {place}"


def _is_model(folder: Path) -> bool:
    """Return whether a folder is a model's: it has a configuration, or a version with a model file of a known name."""
    if (folder / CONFIG_FILENAME).is_file():
        return True
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        versions = [entry.path for entry in entries if entry.name.isdecimal()]
        return any(backend_of_files(file.name for file in Path(version).iterdir()) for version in versions[:1])
    return False


# Contexts. A command fails if it mixes two contexts, or changes a protected one without naming it.


def destination_of(text: str) -> Location:
    """Return where `copy --into` goes: a place, or `context:NAME`.

    Raises:
        UsageError: there is no such context, it has no repository, or a protected one is named by its place.
        RepositoryError: it is a URL unfit for a repository.
    """
    if not text.startswith(_INTO):
        place = parse_location(text)
        _refuse_protected(place, hint="To copy there, name the context: --into context:{name}")
        return place
    name, contexts = text.removeprefix(_INTO), load_contexts()
    found = contexts.get(name)
    if found is None or found.repository is None:
        with_one = [each.name for each in contexts.values() if each.repository is not None]
        raise UsageError(
            f"--into {text}: no context of that name has a repository",
            hint=f"Contexts with a repository: {', '.join(with_one) or 'none'}.",
        )
    return parse_location(found.repository)


def guard(place: Location, given: str | None) -> None:
    """Refuse to mix two contexts, or to change a protected one the command does not name.

    Args:
        place: the repository the command works on.
        given: value of `--repository`. `None`: the settings supplied the repository.

    Raises:
        UsageError: as said.
    """
    context = context_taken()
    if given is not None and context is not None and context.repository is not None:
        own = parse_location(context.repository)
        if not _same(own, place):
            raise UsageError(
                f"-r {given} is not the repository of the context {context.name!r}, {own}. The context's server and "
                "keys would apply",
                hint="Leave out -r, or use no context: --context none",
            )
    if _changes():
        _refuse_protected(place, hint="To change it, name the context in the command: --context {name}")


def _refuse_protected(place: Location, *, hint: str) -> None:
    params: Mapping[str, Any] = {} if invocation.click is None else invocation.click.params
    command = "" if invocation.click is None else str(invocation.click.info_name)
    settings = load_settings()
    servers = {*(params.get("to") or ()), settings.server} if isinstance(params.get("to"), list) else {settings.server}
    for context in load_contexts().values():
        if not context.protected or context.name == invocation.named:
            continue
        of_place = context.repository is not None and _same(parse_location(context.repository), place)
        if of_place or (context.server is not None and context.server in servers):
            what = str(place) if of_place else str(context.server)
            raise UsageError(
                f"`{command}` would change {what} of the protected context {context.name!r}",
                hint=hint.format(name=context.name),
            )


def _changes() -> bool:
    """Return whether the running command changes something."""
    click = invocation.click
    if click is None or click.params.get("dry_run") or click.params.get("check"):
        return False
    if click.info_name == "run":  # the sub-command of `loadtest`
        return bool(click.params.get("keep"))
    if click.info_name in _CHANGING_WHEN_TOLD:
        return any(value for name, value in click.params.items() if name not in _READS)
    return click.info_name in _CHANGING


def _same(one: Location, other: Location) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, RepositoryError):
        return str(one) == str(other)
