"""Options and arguments of commands on a model repository."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from repo_manager.cli.completion import model_names, model_versions
from repo_manager.cli.option_groups import option
from repo_manager.repository.location import Location, parse_location
from repo_manager.settings import load_settings

__all__ = ["AnyModelName", "ModelName", "RepositoryFlag", "Target", "resolve_repository"]

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
        """
        return resolve_repository(self.repository)


def resolve_repository(option: str | None) -> Location:
    """Return the repository to work on: the option, else the settings.

    Raises:
        RepositoryError: it is a URL that cannot be one of a repository.
    """
    return parse_location(load_settings().repository if option is None else option)
