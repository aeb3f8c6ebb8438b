"""The operations every kind of store for a repository must offer. Every operation is written over these verbs."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from repo_manager.repository.location import Location
from repo_manager.repository.manifest import FileRecord, Manifest
from repo_manager.repository.state import ModelState
from repo_manager.repository.view import Entry, FolderContent, ModelView
from repo_manager.triton_config.problems import Problem

__all__ = [
    "Arrived",
    "ChangedMeanwhileError",
    "Departure",
    "Incoming",
    "Progress",
    "RepairKind",
    "RepairStep",
    "Store",
    "Traits",
    "mended",
    "model_names",
    "recorded_model",
    "untold",
]

Progress = Callable[[int], None]


def untold(_: int) -> None:
    """Anyone who does not want to know of progress."""


class ChangedMeanwhileError(Exception):
    """Something has changed since it was looked at, or a new name exists already."""


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A version to publish. The store decides the order of the questions, and how the version becomes visible.

    Attributes:
        name: model to publish under. It may be new.
        files: path inside the version -> the file on this machine.
        expected: size and digest each file must have. `None`: unknown.
        beside: label files and variants for the model's first version.
        identity: mark of this content among others with the same files and `beside`.
        check: checks the model as it is at the time of the call. Whether the version is its first. Raises when it does
            not fit. Asked before anything large is read, and again when it matters.
        manifest: number and records -> manifest.
        first_config: number -> the config.pbtxt for a first version.
        progress: called with the number of bytes arrived.
        number: the number it must have. `None` takes the next one.
        claiming: asked where the number is claimed, when no other writer can come between. An exception from it ends
            the publication. `None`: the same content may come twice, also by two commands at a time.
    """

    name: str
    files: Mapping[str, Path]
    expected: Mapping[str, FileRecord] | None
    beside: Mapping[str, bytes]
    identity: str
    check: Callable[[ModelView], bool]
    manifest: Callable[[int, Mapping[str, FileRecord]], Manifest]
    first_config: Callable[[int], bytes]
    progress: Progress
    number: int | None = None
    claiming: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True)
class Arrived:
    """A published version.

    Attributes:
        version: number the version got.
        manifest: its manifest.json, as it is in the store now.
        first: whether it is the model's first.
        view: the model after the publication. Its policy says whether the version is served.
    """

    version: int
    manifest: Manifest
    first: bool
    view: ModelView


@dataclasses.dataclass(frozen=True)
class Departure:
    """Versions to remove.

    Attributes:
        view: the model as it was looked at, with the contents of these versions.
        versions: numbers to remove, ascending. Empty for a model without versions.
        whole: the model's folder goes as well.
        force: also a version deployed or tagged since `view`.
        forget: from the model's record to the record without them.
    """

    view: ModelView
    versions: tuple[int, ...]
    whole: bool
    force: bool
    forget: Callable[[ModelState], ModelState]


class RepairKind(enum.Enum):
    """One repair."""

    REMOVAL = "an interrupted removal"
    REST = "remains of an interrupted command"
    RECORD = "a damaged record"
    CONTENT = "a model's files"


@dataclasses.dataclass(frozen=True)
class RepairStep:
    """One thing to put right.

    Attributes:
        where: path below the root, or the name of a leftover.
        action: the repair in words, such as `removed: its version does not exist`.
        kind: kind of the repaired thing.
        apply: does it. False where another command was quicker.
        problem: the finding of `verify`. `None`: the model's view shows it already.
    """

    where: str
    action: str
    kind: RepairKind
    apply: Callable[[], bool]
    problem: Problem | None = None


@dataclasses.dataclass(frozen=True)
class Traits:
    """The properties of a store.

    Attributes:
        remote: files must be fetched, and a new version appears file by file. On a disk Triton sees all of it or
            nothing, whatever the version policy says.
        changes_visible: Triton notices changed files. On Azure every time of modification is 0 (server#6958).
        lookups: how many reads the store bears at a time.
        record: the file in the root with a model's record. `{name}` represents the model where each has its own.
    """

    remote: bool
    changes_visible: bool
    lookups: int
    record: str


class Store(Protocol):
    """Folders on a disk (`stores.disk`) or objects in a bucket (`stores.objects`). Keys are relative to the root.

    | verb | does |
    |---|---|
    | `list_level`, `read`, `digest`, `fetch` | look at names, a small file, a file to its end, a version's files |
    | `look`, `states` | a model at one moment, and what is remembered of models |
    | `exclusive`, `lease` | keep other writers, or other roll-outs, away |
    | `replace_if`, `put`, `change_state` | write config.pbtxt, a file, a record: compared with what is there |
    | `publish_version`, `discard_versions` | let versions appear and go, whole |
    | `mend` | say what will be put right in the store's own records |

    Every verb raises `RepositoryError` when the store refuses; on a disk also `OSError`.
    """

    @property
    def location(self) -> Location:
        """The repository's root."""

    @property
    def traits(self) -> Traits:
        """The store's properties."""

    def list_level(self, folder: str = "") -> FolderContent:
        """List one level of a folder."""

    def read(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """Return a file's content, or `None` when there is none. With a limit, refuse links and larger files.

        Args:
            key: path of the file below the root, such as `NAME/config.pbtxt`.
            limit_bytes: largest accepted size in bytes. `None`: any size.
        """

    def digest(self, key: str, entry: Entry) -> FileRecord:
        """Read a file to its end. Return its digest and size."""

    def fetch(
        self,
        name: str,
        version: int,
        names: Sequence[str] | None = None,
        *,
        compare: bool = True,
        resume: str = "",
        progress: Progress = untold,
    ) -> contextlib.AbstractContextManager[Path]:
        """Give a folder with a version's files, for as long as the block lasts.

        Args:
            name: model of the version, as its folder is called.
            version: number of the version, as its folder is called.
            names: only these files, and the manifest. `None`: all.
            compare: refuse a fetched file different from its manifest.
            resume: digest of the content. Fetched files stay when the block fails, so the next attempt with the same
                digest goes on. Empty: nothing stays.
            progress: called with the number of bytes arrived.
        """

    def look(self, name: str, *, record: bool = False) -> ModelView:
        """Look at a model: its folder, config.pbtxt and, with `record`, its record."""

    def states(self, names: Iterable[str] | None = None) -> Mapping[str, ModelState]:
        """Return the records of these models. `None`: of every model, removed ones included.

        Args:
            names: names of the models. `None`: all, removed ones included.
        """

    def exclusive(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Keep other commands from changing the model, where the store can. Elsewhere each write is compared."""

    def lease(self, name: str, *, timeout_s: float) -> contextlib.AbstractContextManager[Callable[[], str]]:
        """Hold the right to change a model's served versions. It ends with its holder, however the holder ends.

        It gives a function for the present holder, empty unless another process holds it. Empty while it is ours.

        Raises:
            RepositoryError: another process holds it for longer than `timeout_s`.
        """

    def replace_if(self, view: ModelView, contents: Mapping[str, bytes | None], *, serves: Sequence[int] = ()) -> None:
        """Write files of a model's folder, in order, `None` removes one, if config.pbtxt is as in the view.

        Args:
            view: the model as it was looked at.
            contents: name below the model's folder -> its new content. `None` removes the file. config.pbtxt comes
                last.
            serves: versions the new config.pbtxt serves. One under removal is refused.

        Raises:
            ChangedMeanwhileError: config.pbtxt has changed since.
        """

    def put(self, key: str, content: bytes | Path, *, new: bool = False, record: FileRecord | None = None) -> None:
        """Write a file.

        Args:
            key: path of the file below the root. An existing file is replaced, unless `new`.
            content: the bytes, or a file on this machine with them.
            new: refuse where the file exists.
            record: size and digest a file on this machine must have. `None`: they are unknown.

        Raises:
            ChangedMeanwhileError: `new`, and it exists.
            RepositoryError: the content differs from `record`.
        """

    def erase(self, folder: str, first: str) -> None:
        """Remove a folder of the root other than a model's, with everything below it.

        Args:
            folder: name of the folder in the root.
            first: the file of it to delete before all others: it says the folder is complete.
        """

    def change_state(
        self, name: str, change: Callable[[ModelState], ModelState], *, needs: int | None = None
    ) -> ModelState:
        """Change a model's record, atomically. `needs` is a version that must exist at the time.

        Args:
            name: model whose record changes. It need not have one yet.
            change: makes the new record from the current one.
            needs: version that must exist at the time of the change. `None`: none.
        """

    def publish_version(self, incoming: Incoming) -> Arrived:
        """Make a version visible, whole, under a number never given out before."""

    def discard_versions(self, departure: Departure) -> None:
        """Remove versions: out of the policy, then their files, then out of the record. A crash at any point leaves a
        model with the right versions served. Where the store refuses, everything is as it was.
        """

    def mend(self, names: Iterable[str]) -> Iterator[RepairStep]:
        """List the repairs of the store's own records, and the leftovers of dead commands.

        The steps come one after the other: a caller applies one before it asks for the next.

        Args:
            names: the models to look at. Anything outside the models always comes along.
        """


def model_names(store: Store) -> tuple[str, ...]:
    """Return every model with a folder or a record of its own, ascending. Hidden folders are left out."""
    level = store.list_level()
    recorded = {name for entry in level.files if (name := recorded_model(store.traits.record, entry.name)) is not None}
    return tuple(sorted({*(name for name in level.folders if not name.startswith(".")), *recorded}))


def recorded_model(record: str, file: str) -> str | None:
    """Return the model of a record file in the root. `None`: it is no record, or the record of all models."""
    before, _, after = record.partition("{name}")
    if not after or not file.startswith(before) or not file.endswith(after) or len(file) <= len(before) + len(after):
        return None
    return file[len(before) : -len(after)]


def mended(store: Store, names: Iterable[str], *kinds: RepairKind) -> tuple[str, ...]:
    """Remove, or end, the leftovers of dead commands in these models. Return their names."""
    return tuple(step.where for step in store.mend(names) if step.kind in kinds and step.apply())
