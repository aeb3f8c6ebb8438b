"""Options that several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.errors import InputError, UsageError

if TYPE_CHECKING:
    from repo_manager.repository.location import Location

__all__ = [
    "DryRun",
    "JsonOutput",
    "ModelFile",
    "ModelName",
    "Quiet",
    "Repository",
    "Timeout",
    "To",
    "parse_shapes",
    "parse_target",
    "resolve_repository",
    "writing",
]

JsonOutput = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.", show_default=False)]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.", show_default=False)]
Repository = Annotated[
    str | None,
    typer.Option(
        "--repository",
        "-r",
        metavar="DIR|URL",
        help="The model repository: a folder, or s3://, gs://, as:// as Triton takes it "
        "[default: $REPO_MANAGER_REPOSITORY, the settings file, or ./model_repository].",
        show_default=False,
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="URL",
        help="A running server, grpc://host:port or http://host:port "
        "[default: the running `serve` of the repository, else one is started].",
        show_default=False,
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Deadline of the command.")]


def resolve_repository(option: str | None) -> Location:
    """Return the repository to work on: the option, else the settings.

    Raises:
        RepositoryError: it is a URL that cannot be one of a repository.
    """
    from repo_manager.repository.location import parse_location

    if option is not None:
        return parse_location(option)
    from repo_manager.settings import load_settings

    return parse_location(load_settings().repository)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to write `path` into an error that names it.

    Raises:
        InputError: the folder is missing or not writable, the disk is full, ...
    """
    try:
        yield
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be written: {exc.strerror or exc}",
            hint="Check the folder, its permissions and free space.",
        ) from exc


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Read `--shape NAME:2,3,224,224` options.

    Raises:
        UsageError: a text has another form, or a size below 0.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or []:
        name, separator, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("x", ",").split(",") if size)
        except ValueError:
            shape = (-1,)
        if not separator or not name or any(size < 0 for size in shape):
            raise UsageError(f"--shape {text}: expected NAME:SIZE,SIZE,... for instance image:1,3,224,224")
        shapes[name] = shape
    return shapes


def parse_target(text: str) -> tuple[str, int | None]:
    """Read `NAME` or `NAME:VERSION`.

    Raises:
        UsageError: the version is not a positive number.
    """
    name, separator, version = text.partition(":")
    if not separator:
        return name, None
    if not version.isdecimal() or int(version) < 1:
        raise UsageError(f"{text}: expected NAME or NAME:VERSION with a version of 1 or more, found {version!r}")
    return name, int(version)
