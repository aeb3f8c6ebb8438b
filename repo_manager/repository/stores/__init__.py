"""Where a repository is kept: folders on a disk, or objects in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.optional import deferred
from repo_manager.repository.layout import open_root
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.repository.stores.base import Store
from repo_manager.repository.stores.disk import DiskStore

if TYPE_CHECKING:
    from repo_manager.repository.stores.objects import store as object_store
else:
    # Part of the [cloud] extra, and a tenth of the start time: commands on a disk do not import it. The name must
    # differ from the package next to this file, because an import of the package would replace it.
    object_store = deferred("repo_manager.repository.stores.objects.store")

__all__ = ["open_store"]


def open_store(repository: LocationLike, *, may_be_new: bool = False) -> Store:
    """Return the store of a repository, for one operation.

    Args:
        repository: the root. An empty prefix in object storage is an empty repository.
        may_be_new: a folder need not exist: it is an empty repository, and publishing makes it.

    Raises:
        RepositoryError: the folder does not exist, or the credentials for object storage cannot be read.
        MissingDependencyError: the `[cloud]` extra is not installed.
    """
    place = as_location(repository)
    if isinstance(place, Path):
        root = place.expanduser().resolve()
        return DiskStore(root if may_be_new and not root.exists() else open_root(place))
    return object_store.ObjectStore(place)
