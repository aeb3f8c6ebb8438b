"""Configurations for models without one: a server's own derivation, written down."""

from __future__ import annotations

from repo_manager.repository.adopt import derived_config, without_config
from repo_manager.repository.configuration import edit_config
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.repository.plan.configuration import ConfigChange
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions
from repo_manager.triton_config.completion import config_as_written
from repo_manager.triton_config.config import format_config

__all__ = ["write_configs"]


def write_configs(
    repository: LocationLike, name: str | None, url: str | None, connection: ClientOptions, *, dry_run: bool = False
) -> tuple[ConfigChange, ...]:
    """Write config.pbtxt for every model with versions and without a configuration.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: one model, left out if it has a config.pbtxt. `None`: every model without one.
        url: a server with the models loaded. `None` derives from ONNX files as servers do.
        connection: how to connect to it.
        dry_run: only list the configurations to write.

    Raises:
        ConfigError: only a server's backend can derive one, and no URL is given.
        ServerError: the server does not answer, or has not loaded the model.
        RepositoryError: the store refuses.
    """
    repository = as_location(repository)
    names = without_config(repository, name)
    if url is None:
        texts = {each: format_config(derived_config(repository, each)) for each in names}
    else:
        with TritonClient.connect(url, connection) as client:
            texts = {each: format_config(config_as_written(client.model_config(each))) for each in names}
    return tuple(edit_config(repository, each, text, dry_run=dry_run) for each, text in texts.items())
