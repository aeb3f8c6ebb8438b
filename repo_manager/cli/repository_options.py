"""Options and arguments of commands on a model repository."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from repo_manager.cli.contexts import guard
from repo_manager.cli.option_groups import option
from repo_manager.errors import RepoManagerError, RepositoryError
from repo_manager.repository import model_state, scan
from repo_manager.repository.location import Location, local_folder, parse_location
from repo_manager.settings import load_settings
from repo_manager.triton_config import CONFIG_FILENAME
from repo_manager.triton_config.completion import backend_of_files

__all__ = [
    "AnyModelName",
    "ModelName",
    "RepositoryFlag",
    "Target",
    "model_names",
    "model_versions",
    "resolve_repository",
]


# What the shell completes from a repository: the names of models, their versions and tags.
#
# Only a local repository is looked at, because a person waits for the answer, and every error means no suggestion.


def model_names(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return the names of the repository's models that begin with the word."""
    try:
        return [name for name in _names(_folder(ctx)) if name.startswith(incomplete)]
    except (RepoManagerError, OSError, ValueError):
        return []


def model_versions(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Return names of models, and after `NAME:` the versions and tags of one."""
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
    str | None, typer.Argument(metavar="[NAME]", help="One model; without it all.", autocompletion=model_names)
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="NAME[:VERSION]",
        help="VERSION is a number or a tag; without one the newest.",
        show_default=False,
        autocompletion=model_versions,
    ),
]


@dataclasses.dataclass(frozen=True)
class RepositoryFlag:
    """The repository that a command works on."""

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
            RepositoryError: it is a URL that cannot be one of a repository.
            UsageError: it is not of the context, or of a protected one that the command does not name.
        """
        place = resolve_repository(self.repository)
        guard(place, self.repository)
        return place


def resolve_repository(option: str | None) -> Location:
    """Return the repository to work on: the option, else the settings.

    Raises:
        RepositoryError: it is a URL that cannot be one of a repository, or the folder of a model.
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


def _is_model(folder: Path) -> bool:
    """Say whether a folder is a model's: it has a configuration, or a version with a model file of a known name."""
    if (folder / CONFIG_FILENAME).is_file():
        return True
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        versions = [entry.path for entry in entries if entry.name.isdecimal()]
        return any(backend_of_files(file.name for file in Path(version).iterdir()) for version in versions[:1])
    return False
