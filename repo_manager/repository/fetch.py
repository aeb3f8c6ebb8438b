"""A version's files on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import version_number
from repo_manager.repository.location import Location
from repo_manager.repository.stores import open_store

__all__ = ["version_files"]


@contextlib.contextmanager
def version_files(version: Location, names: Sequence[str] | None = None) -> Iterator[Path]:
    """Give a folder on this machine that holds a version's files, for as long as the block lasts.

    On disk it is the version's own folder. From object storage the files are fetched, and what was published with a
    digest is compared with it.

    Args:
        version: `VersionEntry.path`.
        names: the files wanted, those that do not exist are left out; `None`: all of them. The manifest is always
            there when the version has one.

    Raises:
        RepositoryError: a file cannot be fetched, or is not what the manifest says.
    """
    number = version_number(version.name)
    if number is None:
        raise RepositoryError(f"{version} is no version's place", hint="Expected ROOT/MODEL/VERSION.")
    name = version.parent.name
    with contextlib.ExitStack() as stack:
        with disk_errors(f"fetch {name}:{number}"):
            store = open_store(version.parent.parent)
            folder = stack.enter_context(store.fetch(name, number, names))
        yield folder
