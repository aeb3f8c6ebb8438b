"""A store's facts of its objects: their size, their time, and the mark a compare-and-swap compares."""

from __future__ import annotations

import dataclasses
import datetime

__all__ = ["Listing", "Mark", "ObjectFact"]


@dataclasses.dataclass(frozen=True)
class Mark:
    """The content of an object seen before: the mark a compare-and-swap compares."""

    e_tag: str
    version: str | None = None

    def mode(self) -> dict[str, str]:
        """Return it as obstore takes it."""
        return {"e_tag": self.e_tag} if self.version is None else {"e_tag": self.e_tag, "version": self.version}


@dataclasses.dataclass(frozen=True)
class ObjectFact:
    """A store's facts of an object.

    Attributes:
        key: path relative to the listed folder, or to the place for a single object.
        size_bytes: size of the content in bytes, as the store says it.
        modified: when it was written, by the store's clock.
        mark: mark of this content, for conditional reads and writes.
    """

    key: str
    size_bytes: int
    modified: datetime.datetime
    mark: Mark


@dataclasses.dataclass(frozen=True)
class Listing:
    """One level.

    Attributes:
        folders: names with objects below them, ascending. The store itself has no folders.
        files: the objects directly below it, by name.
        marked: whether an empty object whose key ends in `/` marks the folder itself. Triton takes it for a folder.
    """

    folders: tuple[str, ...]
    files: tuple[ObjectFact, ...]
    marked: bool = False
