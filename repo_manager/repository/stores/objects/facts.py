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
        key: relative to the place.
        size_bytes: size of the content.
        modified: when it was written, by the store's clock.
        mark: of its content.
    """

    key: str
    size_bytes: int
    modified: datetime.datetime
    mark: Mark


@dataclasses.dataclass(frozen=True)
class Listing:
    """One level.

    Attributes:
        folders: names of apparent folders.
        files: the objects directly below it, by name.
        marked: whether an empty object whose key ends in `/` marks the folder itself. Triton takes it for a folder.
    """

    folders: tuple[str, ...]
    files: tuple[ObjectFact, ...]
    marked: bool = False
