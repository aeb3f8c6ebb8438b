"""One model at one moment: names and sizes of everything, and the content of small files.

All decisions about a model use such a view: may this version go, does this configuration fit, are there faults. So the
rules are the same for folders and objects, and need neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME, triton_version
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import Manifest, no_manifest, parse_manifest
from repo_manager.repository.state import ModelState
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.version_policy import version_policy

__all__ = ["NOTHING", "Entry", "FolderContent", "Link", "ModelView", "VersionView", "Work"]


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link. Only disks have them.

    Attributes:
        target: the absolute path it leads to, through all further links.
        outside: whether it leads outside the repository.
        exists: whether there is a file or folder at `target`.
    """

    target: str
    outside: bool
    exists: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file, a link or a special file.

    Attributes:
        name: relative to the folder listed, with `/`.
        size_bytes: of the file, or of the file a link leads to.
        link: set for a symbolic link. `None` for a file or a special file.
        regular: whether it is a plain file.
        token: the store's handle to read exactly this content again.
    """

    name: str
    size_bytes: int
    link: Link | None = None
    regular: bool = True
    token: object = None


@dataclasses.dataclass(frozen=True)
class FolderContent:
    """The entries directly in a folder, without those below them.

    Attributes:
        folders: names of folders, links to folders included, ascending.
        files: files, links to files and special files, by name.
        links: name of a link to a folder -> the link.
        modified_at: when something in it last came or went, in seconds since 1970.
    """

    folders: tuple[str, ...]
    files: tuple[Entry, ...]
    links: Mapping[str, Link] = dataclasses.field(default_factory=dict)
    modified_at: float = 0.0


NOTHING = FolderContent((), ())


@dataclasses.dataclass(frozen=True)
class Work:
    """A version being published or removed, in a store where this takes a while.

    Attributes:
        version: its number. It counts as no version until the work has ended.
        sentence: the work on it, by whom, and whether the process is still at it.
        abandoned: nobody works on it any more.
    """

    version: int
    sentence: str
    abandoned: bool


@dataclasses.dataclass(frozen=True)
class VersionView:
    """A version's folder.

    Attributes:
        path: its folder, `ROOT/MODEL/VERSION`: a path, or a place in object storage.
        number: number of the version, from 1.
        files: all files and links below it by name, manifest.json left out.
        manifest_bytes: content of manifest.json. `None` when there is none or it cannot be read.
        manifest_error: why it cannot be read.
        size_bytes: of all files together, manifest.json included.
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
        level: the files and links in its folder.
        versions: the numbers of its versions, ascending.
        folders: its folders, except for those of work under way.
        state: the model's record. Empty when it was not asked for.
        config: content of config.pbtxt. `None` when there is none or it cannot be read.
        config_error: why config.pbtxt cannot be read.
        link: set when the folder itself is a link.
        in_the_way: why nothing can be published under this name.
        work: versions being published or removed.
        beside: files beside the versions -> content: label files and variants of config.pbtxt (`with_beside`).
        data: files in `warmup` and `initial_state` -> size in bytes (`with_beside`).
        contents: the contents of its versions (`with_versions`).
        needed_by: its ensembles, and the models whose code asks it (`with_dependents`).
        pinned: version -> the ensembles pinned to it (`with_dependents`).
        token: the store's handle to change exactly this state of the model.
    """

    place: Location
    exists: bool
    level: FolderContent = NOTHING
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
        """Every version Triton would see, and so every number in use, ascending."""
        found = {number for folder in self.folders if (number := triton_version(folder)) is not None}
        return tuple(sorted(found))

    def number_for(self, wanted: int | None = None) -> int:
        """Return the number a new version gets, `wanted` or the next one. It needs `state`.

        Args:
            wanted: the wanted number. `None`: the next one.

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
        """Return the configuration in config.pbtxt.

        Raises:
            ConfigError: it is missing or broken.
        """
        return parse_config(self.config_text(), where=self.config_place)

    def policy(self) -> tuple[int, ...] | str:
        """Return the version policy: numbers, `latest:n` or `all`. Triton's own where there is no config.pbtxt.

        Raises:
            ConfigError: config.pbtxt is broken.
        """
        return version_policy(self.parsed_config()) if self.has_config else "latest:1"
