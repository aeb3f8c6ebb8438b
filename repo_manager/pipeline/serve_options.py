"""Options of `serve`, and their meaning for the embedded server of a repository."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepoManagerError, RepositoryError
from repo_manager.repository.layout import open_root
from repo_manager.repository.location import Location, as_location, local_folder
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.signing import check_served
from repo_manager.repository.tags import model_states
from repo_manager.server.command import ServerOptions, ServerSettings
from repo_manager.validation import check_range

__all__ = [
    "ServeOptions",
    "check_models",
    "deployed_models",
    "needs_auto_complete",
    "not_vouched_for",
    "server_options",
]

_ALL, _DEPLOYED, _NONE = "all", "deployed", "none"


@dataclasses.dataclass(frozen=True)
class ServeOptions(ServerSettings):
    """Options of `serve`, besides the server's settings.

    Attributes:
        repository: the model repository. A text becomes a `Location`.
        load: names of models to load at the start, or one of `all`, `deployed` (also when empty), `none`.
        timeout_s: how long the server may take to be ready.
        auto_complete: let Triton fill in fields missing in a config.pbtxt, at about a second a load. `None`: only
            where a model of the repository needs it.
        restart: start a server again after it ended on its own, with a failure.
        pass_env: names of environment variables the server, and so the models' code, gets besides those it needs.
        signed_by: public keys, of which one must vouch for each version loaded. Empty asks for no signature.
    """

    repository: Location
    load: tuple[str, ...] = ()
    timeout_s: float = 120.0
    auto_complete: bool | None = None
    restart: bool = False
    signed_by: tuple[Path, ...] = ()
    pass_env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.repository, str):
            object.__setattr__(self, "repository", as_location(self.repository))
        super().__post_init__()
        check_range("timeout_s", self.timeout_s)


def deployed_models(repository: Location) -> tuple[str, ...]:
    """Return the models whose last roll-out left a version in service, by name.

    Raises:
        RepositoryError: no such repository, or its state file is damaged.
    """
    states = model_states(repository)
    deployed = {name for name, state in states.items() if state.is_deployed}
    return tuple(entry.name for entry in scan(repository, deep=False) if entry.name in deployed)


def check_models(options: ServeOptions) -> None:
    """Check for a local repository, and the models named, before a server is started.

    Raises:
        RepositoryError: the repository or a model is missing.
    """
    folder = local_folder(options.repository)
    if folder is None:
        return
    root = open_root(folder)
    for name in () if options.load in ((_ALL,), (_DEPLOYED,), (_NONE,)) else options.load:
        if not (root / name).is_dir():
            hint = "`repo-manager list` shows the models; --load all takes every one."
            raise RepositoryError(f"{options.repository} has no model {name!r} to load", hint=hint)


def server_options(options: ServeOptions) -> ServerOptions:
    """Return the embedded server's options.

    Under the policy `signed_by`, unsigned models are left out. They are in the server's failures.

    Raises:
        RepositoryError: a named model is not vouched for.
    """
    load: tuple[str, ...] = options.load
    deployed = load in ((), (_DEPLOYED,))
    if deployed:
        load = deployed_models(options.repository)
    elif load == (_ALL,):
        load = ("*",)
    elif load == (_NONE,):
        load = ()
    refused: dict[str, str] = {}
    if options.signed_by:
        if load == ("*",):
            load = tuple(entry.name for entry in scan(options.repository, deep=False))
        refused = not_vouched_for(options, load)
        if refused and load == options.load:
            reasons = "; ".join(refused.values())
            raise RepositoryError(f"{reasons}", hint="Sign the version (repo-manager sign), or serve others.")
        load = tuple(name for name in load if name not in refused)
    return ServerOptions(
        repository=str(options.repository.resolve()),
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ServerSettings)},
        load=load,
        load_what_loads=deployed or bool(refused),
        refused=refused,
        environment={name: os.environ[name] for name in options.pass_env if name in os.environ},
        auto_complete=needs_auto_complete(options.repository)
        if options.auto_complete is None
        else options.auto_complete,
    )


def not_vouched_for(options: ServeOptions, names: Sequence[str]) -> dict[str, str]:
    """Return model -> why, for those whose served versions no key vouches for."""
    refused = {}
    for name in names:
        try:
            check_served(options.repository, name, find_model(options.repository, name).selected, options.signed_by)
        except RepoManagerError as exc:
            refused[name] = exc.message
    return refused


def needs_auto_complete(repository: Location) -> bool:
    """Return whether any model's config.pbtxt lacks a field Triton would fill in: backend, inputs or outputs.

    A file from `add` is complete. A broken file counts as incomplete: the server will report the fault.
    """
    for model in scan(repository, deep=False):
        try:
            config = model.config()
        except ConfigError:
            return True
        if config is None:
            return True
        message = config.message()
        if not (message.backend and message.output and message.input):
            return True
    return False
