"""What a place that keeps a repository must be able to do; every operation is written over these verbs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from repo_manager.repository.location import Location
from repo_manager.repository.manifest import FileRecord, Manifest
from repo_manager.repository.state import ModelState
from repo_manager.repository.view import Entry, Level, ModelView
from repo_manager.triton_config import Problem

__all__ = ["Arrived", "ChangedMeanwhileError", "Departure", "Incoming", "Progress", "Step", "Store", "untold"]

Progress = Callable[[int], None]
A = TypeVar("A")
R = TypeVar("R")


def untold(_: int) -> None:
    """Whoever does not want to know of progress."""


class ChangedMeanwhileError(Exception):
    """Something is not what it was when it was looked at, or a new name exists already."""


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A version to publish. The store decides when to ask what, and how it becomes visible.

    Attributes:
        name: the model.
        files: path inside the version -> the file on this machine.
        expected: what each file must be; `None`: nobody knows.
        beside: label files and variants that come with the model's first version.
        identity: what tells this content from another with the same files and `beside`.
        check: looks at the model as it is at that moment; whether the version is its first. Raises when it does not
            fit. Asked before anything large is read, and again when it matters.
        manifest: number and records -> manifest.
        first_config: number -> the config.pbtxt that comes with a first version.
        progress: told the bytes that have arrived.
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


@dataclasses.dataclass(frozen=True)
class Arrived:
    """A version that now exists.

    Attributes:
        version: its number.
        manifest: its record.
        first: whether it is the model's first.
        view: the model with it.
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
        versions: their numbers, ascending.
        whole: the model's folder goes as well.
        force: also a version that was deployed or tagged since `view`.
        forget: what is remembered of the model, without them.
    """

    view: ModelView
    versions: tuple[int, ...]
    whole: bool
    force: bool
    forget: Callable[[ModelState], ModelState]


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing to put right.

    Attributes:
        where: path below the root.
        action: what is done.
        apply: does it.
    """

    where: str
    action: str
    apply: Callable[[], None]


class Store(Protocol):
    """Folders on a disk (`stores.disk`) or objects in a bucket (`stores.objects`). Keys are relative to the root.

    Every verb raises `RepositoryError` when the store refuses; on a disk also `OSError`.
    """

    @property
    def location(self) -> Location:
        """The repository's root."""

    @property
    def remote(self) -> bool:
        """Whether reading a file means to fetch it."""

    @property
    def appears_at_once(self) -> bool:
        """Whether Triton sees all of a new version or nothing, whatever the version policy says."""

    @property
    def changes_visible(self) -> bool:
        """Whether Triton sees that a file has changed. On Azure every time of modification is 0 (server#6958)."""

    def model_names(self) -> tuple[str, ...]:
        """Return every model that has a folder or a record of its own, ascending; hidden folders are left out."""

    def list_level(self, folder: str = "") -> Level:
        """List one level of a folder."""

    def read(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """Return a file's content; `None` when there is none. With a limit, refuse links and larger files."""

    def look(self, name: str, *, record: bool = False) -> ModelView:
        """Look at a model: its folder, config.pbtxt and, with `record`, what is remembered of it."""

    def states(self, names: Iterable[str] | None = None) -> Mapping[str, ModelState]:
        """Return what is remembered of these models; `None`: of every model, removed ones included."""

    def each(self, act: Callable[[A], R], items: Iterable[A]) -> list[R]:
        """Call a function that reads, for each item; as many at a time as the store bears."""

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
            name: the model.
            version: its version.
            names: only these files, and the manifest; `None`: all.
            compare: refuse a fetched file that is not what the manifest says.
            resume: digest of the content. What has arrived stays when the block fails, so that the next attempt with
                the same digest goes on; empty: nothing stays.
            progress: told the bytes that have arrived.
        """

    def digest(self, key: str, entry: Entry) -> FileRecord:
        """Read a file to its end; return its digest and size."""

    def exclusive(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Keep other commands from changing the model, where the store can; elsewhere each write is compared."""

    def replace_if(self, view: ModelView, contents: Mapping[str, bytes | None], *, serves: Sequence[int] = ()) -> None:
        """Write files of a model's folder, in order, `None` removes one, if config.pbtxt is what the view says.

        Args:
            view: the model as it was looked at.
            contents: name below the model's folder -> its new content. config.pbtxt comes last.
            serves: versions that the new config.pbtxt serves; one that is being removed is refused.

        Raises:
            ChangedMeanwhileError: it is not.
        """

    def put(self, key: str, data: bytes, *, new: bool = False) -> None:
        """Write a file.

        Raises:
            ChangedMeanwhileError: `new`, and it exists.
        """

    def restore(self, key: str, source: Path, record: FileRecord) -> None:
        """Put a version's file back; `record` is what it must be."""

    def change_state(
        self, name: str, change: Callable[[ModelState], ModelState], *, needs: int | None = None
    ) -> ModelState:
        """Change what is remembered of a model, atomically; `needs` is a version that must exist at that moment."""

    def publish_version(self, incoming: Incoming) -> Arrived:
        """Make a version visible, whole, under a number that was never given out before."""

    def discard_versions(self, departure: Departure) -> None:
        """Remove versions: out of the policy, out of the record, then their files. A crash at any point leaves a
        model that serves what it should.
        """

    def sweep(self, names: Iterable[str], *, removals_only: bool = False) -> tuple[str, ...]:
        """Remove, or end, what dead commands have left of these models; return what that was."""

    def problems(self) -> Iterable[Problem]:
        """Say what is wrong with the root itself."""

    def repairs(self, name: str | None, *, dry_run: bool) -> Iterator[Step]:
        """Say what has to be put right before models can be looked at; the caller applies a step before the next."""

    def record_key(self, name: str) -> str:
        """Return where what is remembered of a model is kept."""

    def lease(self, name: str, *, timeout_s: float) -> contextlib.AbstractContextManager[Callable[[], str]]:
        """Hold the right to change what is served of a model. It ends with its holder, however that one ends.

        It gives a function that returns who holds it by now, when that is somebody else; empty while it is ours.

        Raises:
            RepositoryError: somebody else holds it for longer than `timeout_s`.
        """
