"""A picture of one model on this machine: what is small as it is, files of a version by name and size only.

What a repository on disk is asked (what would this change do, what is in use, what is wrong with the layout) is asked
of the picture by the same code; what is then to be written goes back to the store by compare-and-swap.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from repo_manager.errors import RepoManagerError, RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME, STATE_FILENAME, version_number
from repo_manager.repository.state import format_entry
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.facts import Listing, ObjectFact
from repo_manager.repository.stores.objects.ledger import Ledger, read_ledger
from repo_manager.triton_config import CONFIG_FILENAME, VARIANTS_FOLDER

__all__ = ["Mirror", "Snapshot", "mirrored", "take_snapshot"]

_SMALL_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a store says of one model at one time.

    Attributes:
        name: the model.
        ledger: its record.
        level: what lies in its folder.
        config: config.pbtxt's content and mark; `None` when there is none.
        versions: ascending; what is being published or removed is none.
    """

    name: str
    ledger: Ledger
    level: Listing
    config: tuple[bytes, ObjectFact] | None
    versions: tuple[int, ...]

    @property
    def exists(self) -> bool:
        """Whether there is anything of it but what is being published."""
        return self.config is not None or bool(self.versions) or bool(self._other_folders)

    @property
    def _other_folders(self) -> tuple[str, ...]:
        return tuple(folder for folder in self.level.folders if version_number(folder) not in self.ledger.pending)

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders but those of versions that are being published or removed."""
        return self._other_folders


@dataclasses.dataclass(frozen=True)
class Mirror:
    """The picture.

    Attributes:
        root: stands for the repository.
        folder: stands for the model.
        snapshot: what it was made from.
        files: folder -> the objects below it.
    """

    root: Path
    folder: Path
    snapshot: Snapshot
    files: Mapping[str, tuple[ObjectFact, ...]]


def take_snapshot(store: ObjectClient, name: str) -> Snapshot:
    """Look at a model: three small requests.

    The record is read first: a version that appears in between is then one that is being published.

    Raises:
        RepositoryError: the store refuses, or the record is damaged.
    """
    ledger = read_ledger(store, name)
    level = store.list(name)
    config = None
    if any(fact.key == CONFIG_FILENAME for fact in level.files):
        config = store.get(f"{name}/{CONFIG_FILENAME}")
    numbers = {number for folder in level.folders if (number := version_number(folder)) is not None}
    if numbers - ledger.pending.keys() - set(range(ledger.state.highest_version + 1)):
        # Published between the two requests, or by somebody else.
        ledger = read_ledger(store, name)
    return Snapshot(name, ledger, level, config, tuple(sorted(numbers - ledger.pending.keys())))


@contextlib.contextmanager
def mirrored(store: ObjectClient, name: str, *, must_exist: bool = True, versions: bool = True) -> Iterator[Mirror]:
    """Give a picture of a model for as long as the block lasts; errors raised in it speak of the store's places.

    Args:
        store: the repository's.
        name: the model.
        must_exist: refuse when there is none; else its folder may be missing in the picture.
        versions: look into the versions; without it their folders are empty in the picture.

    Raises:
        RepositoryError: no such model, or the store refuses.
    """
    snapshot = take_snapshot(store, name)
    if must_exist and not snapshot.exists:
        raise RepositoryError(f"{store.location} has no model {name!r}", hint="`repo-manager list` shows the models.")
    with tempfile.TemporaryDirectory(prefix="repo-manager-objects-") as place:
        root = Path(place).resolve() / "models"
        folder = root / name
        root.mkdir()
        state = {"schema_version": 1, "models": {name: format_entry(snapshot.ledger.state)}}
        (root / STATE_FILENAME).write_text(json.dumps(state), encoding="utf-8")
        files: dict[str, tuple[ObjectFact, ...]] = {}
        if snapshot.exists:
            folder.mkdir()
            files = _draw(store, snapshot, folder, versions)
        with _speaking_of(root, store):
            yield Mirror(root, folder, snapshot, files)


def _draw(store: ObjectClient, snapshot: Snapshot, folder: Path, versions: bool) -> dict[str, tuple[ObjectFact, ...]]:
    """Write what is small, and the names and sizes of the rest."""
    name = snapshot.name
    with concurrent.futures.ThreadPoolExecutor(store.options.lookups) as pool:
        seen = [each for each in snapshot.folders if versions or version_number(each) is None]
        walks = pool.map(lambda each: store.walk(f"{name}/{each}"), seen)
        files = dict.fromkeys(snapshot.folders, ()) | dict(zip(seen, walks, strict=True))
        wanted: list[str] = []
        for fact in snapshot.level.files:
            if fact.key in files:
                continue  # An object and a prefix of one name; Triton sees the prefix.
            if fact.key == CONFIG_FILENAME and snapshot.config is not None:
                (folder / fact.key).write_bytes(snapshot.config[0])
            elif _is_local(fact.key):
                wanted += _place(folder, fact.key, fact)
        for inside, facts in files.items():
            (folder / inside).mkdir(exist_ok=True)
            for fact in facts:
                key = f"{inside}/{fact.key}"
                if _is_local(key):
                    wanted += _place(folder, key, fact, only=None if inside == VARIANTS_FOLDER else MANIFEST_FILENAME)
        for key, found in zip(wanted, pool.map(lambda each: store.get(f"{name}/{each}"), wanted), strict=True):
            if found is not None:
                (folder / key).write_bytes(found[0])
    return files


def _place(folder: Path, key: str, fact: ObjectFact, *, only: str | None = None) -> list[str]:
    """Make a file of an object's size that takes no space; return its key when its content is wanted as well."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(fact.size_bytes)
    small = fact.size_bytes <= _SMALL_BYTES
    return [key] if small and (only is None or fact.key == only) else []


def _is_local(key: str) -> bool:
    """Say whether a key is a path inside a folder; others' objects may be named in any way."""
    return "\0" not in key and all(part not in ("", ".", "..") and len(part) < 256 for part in key.split("/"))


@contextlib.contextmanager
def _speaking_of(root: Path, store: ObjectClient) -> Iterator[None]:
    try:
        yield
    except RepoManagerError as exc:
        exc.message = exc.message.replace(str(root), str(store.location))
        exc.hint = None if exc.hint is None else exc.hint.replace(str(root), str(store.location))
        raise
