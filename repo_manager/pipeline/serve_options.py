"""What `serve` is asked for, and what that means for the embedded server of a repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from repo_manager.errors import ConfigError
from repo_manager.repository import Location, model_states, scan
from repo_manager.server import ServerOptions, ServerSecurity

__all__ = ["ServeOptions", "deployed_models", "needs_auto_complete", "server_options"]

_ALL, _DEPLOYED, _NONE = "all", "deployed", "none"


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Options of `serve`.

    Attributes:
        repository: the model repository.
        host: the address to bind.
        http_port: 0 takes a free port; so do the other ports.
        grpc_port: likewise.
        metrics_port: likewise.
        load: names of models to load at the start, or one of `all`, `deployed` (also when empty), `none`.
        timeout_s: how long the server may take to be ready.
        auto_complete: let Triton fill in what a config.pbtxt leaves out, at about a second a load; `None`: only
            where a model of the repository needs it.
        restart: start a server that ended by itself, with a failure, again.
        security: TLS and restricted APIs.
        restrict_file: where the restriction in `security` was read from: a server in the background reads it again.
    """

    repository: Location
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    load: tuple[str, ...] = ()
    timeout_s: float = 120.0
    auto_complete: bool | None = None
    restart: bool = False
    security: ServerSecurity = dataclasses.field(default_factory=ServerSecurity)
    restrict_file: Path | None = None


def deployed_models(repository: Location) -> tuple[str, ...]:
    """Return the models that were deployed at least once, by name.

    Raises:
        RepositoryError: no such repository, or its state file is damaged.
    """
    states = model_states(repository)
    deployed = {name for name, state in states.items() if state.deployments}
    return tuple(entry.name for entry in scan(repository, deep=False) if entry.name in deployed)


def server_options(options: ServeOptions) -> ServerOptions:
    """Return the embedded server's options."""
    load: tuple[str, ...] = options.load
    deployed = load in ((), (_DEPLOYED,))
    if deployed:
        load = deployed_models(options.repository)
    elif load == (_ALL,):
        load = ("*",)
    elif load == (_NONE,):
        load = ()
    return ServerOptions(
        repository=str(options.repository.resolve()),
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        load=load,
        load_what_loads=deployed,
        security=options.security,
        auto_complete=needs_auto_complete(options.repository)
        if options.auto_complete is None
        else options.auto_complete,
    )


def needs_auto_complete(repository: Location) -> bool:
    """Say whether any model's config.pbtxt leaves out what Triton would fill in: backend, inputs or outputs.

    What `add` writes is complete. A broken file counts as incomplete: the server will say what is wrong.
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
