"""One model at one moment: names and sizes of everything, and the content of what is small.

Whatever is decided about a model (may this version go, does this configuration fit, what is wrong) is decided on such a
view, so the rules are the same for folders and for objects, and need neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.optional import deferred
from repo_manager.repository.layout import DATA_FOLDERS, MANIFEST_FILENAME, triton_version
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import Manifest, no_manifest, parse_manifest
from repo_manager.repository.state import ModelState
from repo_manager.triton_config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config, version_policy

if TYPE_CHECKING:
    import concurrent.futures as futures

    from repo_manager.repository.stores.base import Store
else:
    futures = deferred("concurrent.futures")

__all__ = [
    "NOTHING",
    "Entry",
    "Level",
    "Link",
    "ModelView",
    "VersionView",
    "Work",
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


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link. Only disks have them.

    Attributes:
        target: where it leads, resolved.
        outside: whether that is outside the repository.
        exists: whether something is there.
    """

    target: str
    outside: bool
    exists: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file, a link or a special file.

    Attributes:
        name: relative to the folder that was listed, with `/`.
        size_bytes: of the file, or of the file that a link leads to.
        link: set for a link.
        regular: whether it is a plain file.
        token: what its store needs to read exactly this content again.
    """

    name: str
    size_bytes: int
    link: Link | None = None
    regular: bool = True
    token: object = None


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of a folder.

    Attributes:
        folders: names of folders, links to folders included, ascending.
        files: everything else, by name.
        links: name of a folder that is a link -> the link.
        modified_at: when something in it last came or went, in seconds since 1970.
    """

    folders: tuple[str, ...]
    files: tuple[Entry, ...]
    links: Mapping[str, Link] = dataclasses.field(default_factory=dict)
    modified_at: float = 0.0


NOTHING = Level((), ())


@dataclasses.dataclass(frozen=True)
class Work:
    """A version that is being published or removed, in a store where that takes a while.

    Attributes:
        version: its number; it counts as no version until the work has ended.
        sentence: what is done with it, by whom, and whether that one is still at it.
        abandoned: nobody works on it any more.
    """

    version: int
    sentence: str
    abandoned: bool


@dataclasses.dataclass(frozen=True)
class VersionView:
    """A version's folder.

    Attributes:
        path: where it is.
        number: the version.
        files: all files and links below it by name, manifest.json left out.
        manifest_bytes: content of manifest.json; `None` when there is none or it cannot be read.
        manifest_error: why it cannot be read.
        size_bytes: of all files.
        modified_at: when something in the folder last came or went, in seconds since 1970.
    """

    path: Location
    number: int
    files: tuple[Entry, ...]
    manifest_bytes: bytes | None
    manifest_error: str
    size_bytes: int
    modified_at: float

    @property
    def has_manifest(self) -> bool:
        """Whether there is a manifest.json, readable or not."""
        return self.manifest_bytes is not None or bool(self.manifest_error)

    def holds(self, name: str) -> bool:
        """Whether there is a file of that name, or a folder with files."""
        return any(
            entry.name.startswith(f"{name}/") or (entry.name == name and (entry.link is None or entry.link.exists))
            for entry in self.files
        )

    def manifest(self) -> Manifest:
        """Return the manifest.

        Raises:
            RepositoryError: there is none, or it cannot be read.
        """
        where = str(self.path / MANIFEST_FILENAME)
        if self.manifest_bytes is None:
            raise no_manifest(self.manifest_error or f"{where} does not exist")
        try:
            text = self.manifest_bytes.decode()
        except UnicodeDecodeError as exc:
            raise no_manifest(f"{where} cannot be read: {exc}") from exc
        return parse_manifest(text, where=where)


@dataclasses.dataclass(frozen=True)
class ModelView:
    """A model's folder. `Store.look` fills all but `beside` and `contents`.

    Attributes:
        place: where the model is, or would be.
        exists: whether there is such a model.
        level: what is in its folder.
        versions: the numbers of its versions, ascending.
        folders: its folders that do not belong to work under way.
        state: what is remembered of it; empty when that was not asked for.
        config: content of config.pbtxt; `None` when there is none or it cannot be read.
        config_error: why config.pbtxt cannot be read.
        link: set when the folder itself is a link.
        in_the_way: why nothing can be published under this name.
        work: versions that are being published or removed.
        beside: files beside the versions -> content: label files and variants of config.pbtxt (`with_beside`).
        data: files in `warmup` and `initial_state` -> size in bytes (`with_beside`).
        contents: what is in its versions (`with_versions`).
        needed_by: the ensembles that contain it, and the models whose code asks it (`with_dependents`).
        pinned: version -> the ensembles that ask for just this one (`with_dependents`).
        token: what its store needs to change exactly this state of the model.
    """

    place: Location
    exists: bool
    level: Level = NOTHING
    versions: tuple[int, ...] = ()
    folders: tuple[str, ...] = ()
    state: ModelState = dataclasses.field(default_factory=ModelState)
    config: bytes | None = None
    config_error: str = ""
    link: Link | None = None
    in_the_way: str = ""
    work: tuple[Work, ...] = ()
    beside: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    data: Mapping[str, int] = dataclasses.field(default_factory=dict)
    contents: Mapping[int, VersionView] = dataclasses.field(default_factory=dict)
    needed_by: tuple[str, ...] = ()
    pinned: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    token: object = None

    @property
    def name(self) -> str:
        """The model."""
        return self.place.name

    @property
    def config_place(self) -> str:
        """Where config.pbtxt is, for an error."""
        return str(self.place / CONFIG_FILENAME)

    @property
    def has_config(self) -> bool:
        """Whether there is a config.pbtxt, readable or not."""
        return self.config is not None or bool(self.config_error)

    @property
    def used_numbers(self) -> tuple[int, ...]:
        """Every version that Triton would see, and so every number that is in use, ascending."""
        found = {number for folder in self.folders if (number := triton_version(folder)) is not None}
        return tuple(sorted(found))

    def number_for(self, wanted: int | None = None) -> int:
        """Return the number that a new version gets, `wanted` or the next one. It needs `state`.

        Raises:
            RepositoryError: the wanted one is not free.
        """
        try:
            return self.state.number_for(wanted, self.used_numbers)
        except RepositoryError as exc:
            raise RepositoryError(f"{self.name}:{wanted} cannot keep its number: {exc.message}", hint=exc.hint) from exc

    def config_text(self) -> str:
        """Return config.pbtxt's text.

        Raises:
            ConfigError: it is missing, cannot be read, or is not UTF-8.
        """
        if self.config_error:
            raise ConfigError(f"{self.config_place} {self.config_error}")
        if self.config is None:
            raise ConfigError(
                f"{self.config_place} does not exist", hint="Every model needs a config.pbtxt in its folder."
            )
        try:
            return self.config.decode()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{self.config_place} is not UTF-8 text: {exc}") from exc

    def parsed_config(self) -> ModelConfig:
        """Return what config.pbtxt says.

        Raises:
            ConfigError: it is missing or broken.
        """
        return parse_config(self.config_text(), where=self.config_place)

    def policy(self) -> tuple[int, ...] | str:
        """Return the version policy: numbers, `latest:n` or `all`; Triton's own where there is no config.pbtxt.

        Raises:
            ConfigError: config.pbtxt is broken.
        """
        return version_policy(self.parsed_config()) if self.has_config else "latest:1"


def existing_model(store: Store, name: str, *, record: bool = False) -> ModelView:
    """Look at a model that has to be there.

    Args:
        store: where.
        name: the model.
        record: also what is remembered of it.

    Raises:
        RepositoryError: there is none of that name, or the store refuses.
    """
    view = store.look(name, record=record)
    if not view.exists:
        raise RepositoryError(f"{store.location} has no model {name!r}", hint="`repo-manager list` shows the models.")
    return view


def changeable_model(store: Store, name: str, *, record: bool = False) -> ModelView:
    """Look at a model that is going to be changed, or whose record is read.

    Raises:
        RepositoryError: there is none of that name, or it is a symbolic link.
    """
    view = existing_model(store, name, record=record)
    check_no_link(str(view.place), view.link)
    return view


def check_no_link(place: str, link: Link | None) -> None:
    """Refuse to change anything through a symbolic link.

    Raises:
        RepositoryError: there is one.
    """
    if link is not None:
        raise RepositoryError(
            f"{place} is a symbolic link to {link.target}",
            hint="Replace the link by the folder itself; what lies outside the repository can change unseen.",
        )


def each(store: Store, act: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """Call a function that reads, for each item; as many at a time as the store bears."""
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
    """Return the view with the label files that config.pbtxt names, the variants of config.pbtxt and the sizes of data
    files; those that cannot be read and those of a broken config.pbtxt are left out.
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
        f"{folder}/{entry.name}": entry.size_bytes
        for folder in DATA_FOLDERS
        if folder in view.folders
        for entry in store.list_level(f"{view.name}/{folder}").files
    }
    beside = {file: content for file, content in contents.items() if content is not None}
    return dataclasses.replace(view, beside=beside, data=data)


def _readable(store: Store, key: str) -> bytes | None:
    """Return a file's content; `None` also for what is no file. A store that refuses a request is an error."""
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
    """Return the view with what is in its versions.

    Args:
        store: where.
        view: as `Store.look` gave it.
        versions: these; `None`: all. One that was removed meanwhile is left out.
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
