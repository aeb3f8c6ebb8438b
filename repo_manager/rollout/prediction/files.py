"""A model's folder as Triton sees it when it is asked to load: names and times, nothing else.

Rules from `ModelTimestamp` and `VersionsToLoad` of triton-inference-server/core, each seen on the real server
(docs/triton-reload.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = ["Fingerprint", "read_fingerprint"]

# The folder's own entry in `times_ns`.
_SELF = ""
# Triton's own folders next to the versions (triton-inference-server/core, constants.h).
_NOT_VERSIONS = {"warmup", "initial_state"}
# std::stoll: blanks, a sign, then digits. It ignores the rest.
_NUMBER = re.compile(r"\s*([+-]?[0-9]+)")
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The state of a model's folder a load compares, taken at one moment.

    Attributes:
        times_ns: entry of the model's folder -> the newest modification or change time of it and of everything in it.
            The empty name is the folder itself.
        folders: names of the entries of type folder.
        dangling: names of links to nothing. Triton then cannot list the versions.
    """

    times_ns: Mapping[str, int]
    folders: frozenset[str] = frozenset()
    dangling: tuple[str, ...] = ()

    @property
    def lookalikes(self) -> tuple[str, ...]:
        """Entries Triton takes for a second configuration, because `config.pbtxt` begins with their name."""
        found = [name for name in self.times_ns if name != _SELF and CONFIG_FILENAME.startswith(name)]
        return tuple(name for name in found if name != CONFIG_FILENAME) if len(found) > 1 else ()

    @property
    def newest_ns(self) -> int:
        """The newest time of all. 0 when Triton sees none (it gives up where two entries look like a configuration)."""
        return 0 if self.lookalikes else max(self.times_ns.values(), default=0)

    @property
    def newest_entry(self) -> str:
        """The entry with the newest time."""
        return max(self.times_ns, key=lambda name: self.times_ns[name], default=_SELF) or "the folder itself"

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions Triton finds in the folders' names, ascending: `3.tmp` is one too, `03` is none."""
        found = {_number_of(name) for name in self.folders}
        return tuple(sorted(version for version in found if version is not None))

    @property
    def phantoms(self) -> dict[int, str]:
        """Versions Triton finds and cannot load, and why: `5.tmp` counts as version 5, without a folder."""
        found = {}
        for version in self.versions:
            if str(version) not in self.folders:
                names = [name for name in sorted(self.folders) if _number_of(name) == version]
                found[version] = f"{', '.join(names)} counts as version {version}, and there is no folder {version}"
        return found

    def version_ns(self, version: int) -> int:
        """Return the time by which a version counts as changed: its own, or that of the files beside the versions."""
        if self.lookalikes:
            return 0
        return max(self.times_ns.get(str(version), 0), self.beside_ns)

    @property
    def beside_ns(self) -> int:
        """The newest time of the files of every version: all but config.pbtxt and names of digits only."""
        return max((self.times_ns[name] for name in self._beside), default=0)

    @property
    def newest_beside(self) -> str:
        """The entry with the newest time. Empty when there is none."""
        return max(self._beside, key=lambda name: self.times_ns[name], default="")

    @property
    def _beside(self) -> list[str]:
        return [name for name in self.times_ns if name and not _all_digits(name) and name != CONFIG_FILENAME]

    def with_config_at(self, at_ns: int) -> Fingerprint:
        """Return the fingerprint with config.pbtxt written, or sent with a load, at this time."""
        return dataclasses.replace(self, times_ns={**self.times_ns, CONFIG_FILENAME: at_ns})

    def with_config_written(self) -> Fingerprint:
        """Return the fingerprint as it will be when config.pbtxt is written now."""
        return self.with_config_at(time.time_ns())

    def as_of(self, at_ns: int) -> Fingerprint:
        """Return the most a load at this time can have seen: later times are of changes since."""
        return dataclasses.replace(self, times_ns={name: min(found, at_ns) for name, found in self.times_ns.items()})


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Read a model's folder. `None` when there is none.

    Raises:
        RepositoryError: it cannot be read.
    """
    try:
        own = folder.stat()
        if not stat.S_ISDIR(own.st_mode):
            return None
        times, folders, dangling = {_SELF: _time_of(own)}, set(), []
        for path in folder.iterdir():
            name = path.name
            try:
                found = path.stat()
            except OSError:
                if path.is_symlink():
                    dangling.append(name)
                    times[name] = 0
                continue
            if stat.S_ISDIR(found.st_mode):
                folders.add(name)
            times[name] = _newest(path, found, _DEEPEST)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise RepositoryError(f"{folder} cannot be read: {exc.strerror or exc}") from exc
    return Fingerprint(times, frozenset(folders), tuple(sorted(dangling)))


def _time_of(found: os.stat_result) -> int:
    # Matches `LocalFileSystem::FileModificationTime` of triton-inference-server/core. A user cannot reset the change
    # time, so a restored modification time hides no change.
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _newest(path: Path, found: os.stat_result, depth: int) -> int:
    newest = _time_of(found)
    if not stat.S_ISDIR(found.st_mode) or depth == 0:
        return newest
    with contextlib.suppress(OSError):  # unreadable entries count as unchanged
        for child in path.iterdir():
            with contextlib.suppress(OSError):
                newest = max(newest, _newest(child, child.stat(), depth - 1))
    return newest


def _number_of(name: str) -> int | None:
    """Return the version Triton reads from a folder's name, or `None` when it reads none."""
    match = _NUMBER.match(name)
    ignored = match is None or name in _NOT_VERSIONS or (len(name) > 1 and name.startswith("0"))
    return None if match is None or ignored else int(match.group(1))


def _all_digits(name: str) -> bool:
    return name.isascii() and name.isdigit()
