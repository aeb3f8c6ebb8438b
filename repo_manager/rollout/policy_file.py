"""config.pbtxt put back byte for byte, wherever the repository is."""

from __future__ import annotations

from repo_manager.repository import Location, read_config_bytes, touch_config, write_config_bytes
from repo_manager.repository.stores import open_store

__all__ = ["changes_are_unseen", "read_bytes", "touch", "write_back"]


def read_bytes(repository: Location, name: str) -> bytes | None:
    """Return config.pbtxt as it is; `None` when the model has none.

    Raises:
        RepositoryError: it cannot be read.
    """
    return read_config_bytes(repository, name)


def write_back(repository: Location, name: str, content: bytes | None) -> None:
    """Make config.pbtxt what it was; a file that says so already is not touched.

    Raises:
        RepositoryError: it cannot be written.
    """
    write_config_bytes(repository, name, content)


def touch(repository: Location, name: str) -> None:
    """Make config.pbtxt newer than anything that the server has seen, so that a load looks at the model again.

    Raises:
        RepositoryError: it cannot be written.
    """
    touch_config(repository, name)


def changes_are_unseen(repository: Location) -> bool:
    """Say whether Triton never sees a change in this repository, so that only unload and load brings one in.

    On Azure its file system answers 0 for every time of modification (server#6958).
    """
    return not open_store(repository).changes_visible
