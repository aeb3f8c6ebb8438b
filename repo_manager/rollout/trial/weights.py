"""Whoever gives the new version its share of the traffic: clients that read it, a gateway, KServe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from repo_manager.client import VersionWeights, published_name
from repo_manager.errors import InputError
from repo_manager.files import write_atomic
from repo_manager.repository import Location, change_config
from repo_manager.server import TritonClient

__all__ = ["FileWeights", "PublishedWeights", "Weights"]


class Weights(Protocol):
    """The new version's share of the traffic."""

    def set_weight(self, fraction: float) -> None:
        """Give the new version this share, 0 to 1; the old one gets the rest.

        Raises:
            RepoManagerError: it cannot be set.
        """

    def current(self) -> float:
        """Return the share that was set last; 0 before."""


class PublishedWeights:
    """The weights in the name of the model's first instance group, where `VersionedClient` reads them from the server.

    A change of that name alone reloads nothing (docs/triton-reload.md), so a step costs milliseconds. It is a change of
    config.pbtxt all the same: whoever drives the roll-out puts the file back, and the weights are gone with it.

    Args:
        repository: the repository that the server serves.
        name: the model.
        versions: the old and the new version.
        client: of the server.
        load: makes the server read the file.
    """

    def __init__(
        self,
        repository: Location,
        name: str,
        versions: tuple[int, int],
        client: TritonClient,
        load: Callable[[], None],
    ) -> None:
        self._repository, self._name, self._client = repository, name, client
        self._old, self._new = versions
        self._load, self._fraction = load, 0.0

    def set_weight(self, fraction: float) -> None:
        """Write the weights and let the server read them."""
        groups = self._client.model_config(self._name).instance_group
        # Triton makes the name up where the file has none; ours is then the weights alone.
        name = published_name(groups[0].name if groups else "", _weights(self._old, self._new, fraction))
        change_config(self._repository, self._name, {"instance_group.name": f'"{name}"'})
        self._load()
        self._fraction = fraction

    def current(self) -> float:
        """Return the share that was published last."""
        return self._fraction


class FileWeights:
    """The weights in a JSON file, for clients of several servers or for something else that reads it.

    Args:
        path: the file; it is replaced as a whole.
        name: the model.
        versions: the old and the new version.
    """

    def __init__(self, path: Path, name: str, versions: tuple[int, int]) -> None:
        self._path, self._name, self._fraction = path, name, 0.0
        self._old, self._new = versions

    def set_weight(self, fraction: float) -> None:
        """Replace the file.

        Raises:
            InputError: it cannot be written.
        """
        shares = _weights(self._old, self._new, fraction).shares
        text = json.dumps({self._name: {str(version): share for version, share in shares.items()}})
        try:
            write_atomic(self._path, text.encode())
        except OSError as exc:
            raise InputError(f"the weights file {self._path} cannot be written: {exc.strerror or exc}") from exc
        self._fraction = fraction

    def current(self) -> float:
        """Return the share that was written last."""
        return self._fraction


def _weights(old: int, new: int, fraction: float) -> VersionWeights:
    return VersionWeights.of({old: 1.0 - fraction, new: fraction})
