"""The folder every kind of source fetches into: kept after a stop, with bounds, and a plugin's side of it."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError
from repo_manager.report.progress import transfer_progress
from repo_manager.report.tables import format_bytes

__all__ = ["MOST_FILES", "Fetch", "Fetched", "Receiver", "check_name"]

MOST_FILES = 10_000
"""Of one source: more than any model has, and a bucket named by mistake does."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A source on this machine.

    Attributes:
        path: the file or the folder.
        facts: the manifest's entries for it beside its URL, digest and time: an ETag, a run's ID. No credentials.
    """

    path: Path
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Receiver:
    """Where a source is fetched to, and who receives the progress.

    Args:
        folder: of this source alone. It holds the files of an interrupted command.
        report: called with one line per step.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._folder, self._report = folder, report

    def folder(self, revision: str) -> Path:
        """Return the folder of one revision of the source. The remains of others are removed.

        Args:
            revision: a text with changes whenever the content does, such as an ETag. A fetch goes on with the files in
                the folder only if it is the same. An empty one is of no content: the folder is new.
        """
        name = hashlib.sha256(revision.encode()).hexdigest()[:16]
        for other in self._folder.iterdir():
            if other.name != name or not revision:
                shutil.rmtree(other, ignore_errors=True)
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path

    def expects(self, what: str, size_bytes: int, files: int = 1) -> Callable[[int], None]:
        """Announce the size, check for room, and return a function of the number of new bytes.

        Args:
            what: subject of messages: the source, as it is shown.
            size_bytes: of all of it. 0 when it is not known.
            files: how many files it has.

        Raises:
            InputError: it is larger than the room on the disk, or has more files than a model can have.
        """
        if files > MOST_FILES:
            raise InputError(f"{what} has more than {MOST_FILES:,} files", hint="Name the folder of one model.")
        free = shutil.disk_usage(self._folder).free
        if size_bytes > free:
            raise InputError(
                f"{what} has {format_bytes(size_bytes)}, and {self._folder} has room for {format_bytes(free)}",
                hint="Make room, or name a folder on another disk: XDG_CACHE_HOME=FOLDER.",
            )
        size = f" ({format_bytes(size_bytes)})" if size_bytes else ""
        self._report(f"Fetching {what}{size}")
        return transfer_progress(self._report, size_bytes)


Fetch = Callable[[str, Receiver], Fetched]
"""Fetches the file or folder of a URL. A package adds a kind of source by an entry point of the group
`repo_manager.sources` whose name is the URL's scheme."""


def check_name(name: str, where: str) -> None:
    """Check whether a file's name, or its path below a folder, stays in the folder.

    Raises:
        InputError: it does not, or is no file's name.
    """
    if any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > 255 for part in name.split("/")):
        raise InputError(f"{where} holds {name[:120]!r}, which is no file's name")
