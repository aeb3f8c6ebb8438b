"""How a store is read into views: an existing model, the files beside its versions, and those in them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.optional import deferred
from repo_manager.repository.layout import DATA_FOLDERS, MANIFEST_FILENAME
from repo_manager.repository.stores.base import Store
from repo_manager.repository.view import Entry, Link, ModelView, VersionView
from repo_manager.triton_config.config import VARIANTS_FOLDER

if TYPE_CHECKING:
    import concurrent.futures as futures
else:
    futures = deferred("concurrent.futures")

__all__ = [
    "changeable_model",
    "check_no_link",
    "each",
    "existing_model",
    "top_names",
    "walk",
    "with_beside",
    "with_versions",
]

A = TypeVar("A")
R = TypeVar("R")


def existing_model(store: Store, name: str, *, record: bool = False) -> ModelView:
    """Look at a model. It must exist.

    Args:
        store: the repository's open store. The error names its location.
        name: the model's folder in the root. It may be a symbolic link.
        record: also read its record: numbers, deployments, tags.

    Raises:
        RepositoryError: no model has this name, or the store refuses.
    """
    view = store.look(name, record=record)
    if not view.exists:
        raise RepositoryError(f"{store.location} has no model {name!r}", hint="`repo-manager list` shows the models.")
    return view


def changeable_model(store: Store, name: str, *, record: bool = False) -> ModelView:
    """Look at a model before a change, or for its record.

    Args:
        store: the repository's open store. It is only read.
        name: the model's folder in the root. A symbolic link is refused.
        record: also read the model's record.

    Raises:
        RepositoryError: no model has this name, or it is a symbolic link.
    """
    view = existing_model(store, name, record=record)
    check_no_link(str(view.place), view.link)
    return view


def check_no_link(place: str, link: Link | None) -> None:
    """Refuse to change anything through a symbolic link.

    Args:
        place: place of the folder, for the message.
        link: link of the folder. `None`: it is no link.

    Raises:
        RepositoryError: the model exists.
    """
    if link is not None:
        raise RepositoryError(
            f"{place} is a symbolic link to {link.target}",
            hint="Replace the link with the folder itself: files outside the repository can change unseen.",
        )


def each(store: Store, act: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """Call a reading function for each item. As many at a time as the store bears.

    Args:
        store: the store `act` reads. Its `traits.lookups` bounds the calls at a time.
        act: function that reads one item.
        items: one argument of `act` per call. The results have the same order.
    """
    waiting = list(items)
    if store.traits.lookups <= 1 or len(waiting) <= 1:
        return [act(item) for item in waiting]
    with futures.ThreadPoolExecutor(store.traits.lookups) as pool:
        return list(pool.map(act, waiting))


def walk(store: Store, folder: str) -> tuple[tuple[Entry, ...], float]:
    """Return every file and link below a folder, by name, and when the folder itself last changed."""
    level = store.list_level(folder)
    found = list(level.files)
    for name in level.folders:
        if name in level.links:
            found.append(Entry(name, 0, level.links[name], regular=False))
        else:
            entries, _ = walk(store, f"{folder}/{name}")
            found += [dataclasses.replace(entry, name=f"{name}/{entry.name}") for entry in entries]
    return tuple(sorted(found, key=lambda entry: entry.name)), level.modified_at


def with_beside(store: Store, view: ModelView) -> ModelView:
    """Return the view with the label files named in config.pbtxt, the variants of config.pbtxt and the sizes of data
    files. Unreadable ones and those of a broken config.pbtxt are left out.
    """
    wanted: list[str] = []
    if view.config is not None:
        with contextlib.suppress(ConfigError):
            wanted += [file for file in view.parsed_config().label_filenames if ".." not in file.split("/")]
    if VARIANTS_FOLDER in view.folders:
        variants = store.list_level(f"{view.name}/{VARIANTS_FOLDER}").files
        wanted += [f"{VARIANTS_FOLDER}/{entry.name}" for entry in variants if entry.name.endswith(".pbtxt")]
    contents = {file: _readable(store, f"{view.name}/{file}") for file in wanted}
    data = {
        file: size
        for folder in DATA_FOLDERS
        if folder in view.folders
        for file, size in _sizes_below(store, view.name, folder)
    }
    beside = {file: content for file, content in contents.items() if content is not None}
    return dataclasses.replace(view, beside=beside, data=data)


def _sizes_below(store: Store, model: str, folder: str, depth: int = 4) -> Iterator[tuple[str, int]]:
    level = store.list_level(f"{model}/{folder}")
    yield from ((f"{folder}/{entry.name}", entry.size_bytes) for entry in level.files)
    for name in level.folders if depth else ():
        yield from _sizes_below(store, model, f"{folder}/{name}", depth - 1)


def _readable(store: Store, key: str) -> bytes | None:
    """Return a file's content. `None` also for anything but a file. A store's refusal is an error."""
    try:
        return store.read(key)
    except RepositoryError:
        if store.traits.remote:
            raise
        return None


def top_names(version: VersionView) -> set[str]:
    """Return the names of the files and folders in a version's folder."""
    return {entry.name.partition("/")[0] for entry in version.files}


def with_versions(store: Store, view: ModelView, versions: Iterable[int] | None = None) -> ModelView:
    """Return the view with the contents of its versions.

    Args:
        store: the store of the view, read for each version's file names and manifest.
        view: the model, as `Store.look` gave it. Contents it already has stay.
        versions: these. `None`: all. One removed by then is left out.
    """
    numbers = view.versions if versions is None else tuple(versions)
    found = each(store, lambda number: _version(store, view, number), numbers)
    contents = {version.number: version for version in found if version is not None}
    return dataclasses.replace(view, contents={**view.contents, **contents})


def _version(store: Store, view: ModelView, number: int) -> VersionView | None:
    folder = f"{view.name}/{number}"
    try:
        entries, modified_at = walk(store, folder)
    except FileNotFoundError:
        return None
    manifest, error = None, ""
    if any(entry.name == MANIFEST_FILENAME for entry in entries):
        try:
            manifest = store.read(f"{folder}/{MANIFEST_FILENAME}")
        except RepositoryError as exc:
            error = exc.message
    return VersionView(
        path=view.place / str(number),
        number=number,
        files=tuple(entry for entry in entries if entry.name != MANIFEST_FILENAME),
        manifest_bytes=manifest,
        manifest_error=error,
        size_bytes=sum(entry.size_bytes for entry in entries),
        modified_at=modified_at,
    )
