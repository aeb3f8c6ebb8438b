"""A repository in objects: nothing can be renamed, so numbers, changes and leases go by compare-and-swap."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import ConcurrentChangeError, RepositoryError
from repo_manager.files import kept_folder, work_folder
from repo_manager.repository.layout import is_component, version_number
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.look import each
from repo_manager.repository.manifest import FileRecord
from repo_manager.repository.state import ModelState
from repo_manager.repository.stores.base import (
    Arrived,
    ChangedMeanwhileError,
    Departure,
    Incoming,
    Progress,
    RepairKind,
    RepairStep,
    Store,
    Traits,
    model_names,
    untold,
)
from repo_manager.repository.stores.objects.arrive import publish_version
from repo_manager.repository.stores.objects.claim import is_abandoned
from repo_manager.repository.stores.objects.client import open_client
from repo_manager.repository.stores.objects.content import measure
from repo_manager.repository.stores.objects.current import put_config
from repo_manager.repository.stores.objects.depart import abandoned_work, discard_versions, end_work
from repo_manager.repository.stores.objects.facts import Listing, ObjectFact
from repo_manager.repository.stores.objects.fetch import fetch_version
from repo_manager.repository.stores.objects.lease import object_lease
from repo_manager.repository.stores.objects.ledger import RECORD, Ledger, change_ledger, ledger_key, read_ledger
from repo_manager.repository.stores.objects.transport import object_record, upload_files
from repo_manager.repository.view import Entry, FolderContent, ModelView, Work
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = ["ObjectStore"]

_MAX_NAME = 255


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The sources of a view: a change is compared with them."""

    ledger: Ledger
    config: ObjectFact | None


class ObjectStore:
    """A repository below one prefix."""

    def __init__(self, location: ObjectRepository) -> None:
        self.location = location
        self.client = open_client(location)

    @property
    def traits(self) -> Traits:
        """As `Store.traits`."""
        return Traits(True, self.location.scheme != "as", self.client.options.lookups, RECORD)

    def list_level(self, folder: str = "") -> FolderContent:
        """As `Store.list_level`."""
        return _level(self.client.list(folder))

    def read(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """As `Store.read`."""
        if limit_bytes is not None:
            fact = self.client.head(key)
            if fact is not None and fact.size_bytes > limit_bytes:
                raise RepositoryError(f"{self.location / key} is larger than {limit_bytes} bytes")
        found = self.client.get(key)
        return None if found is None else found[0]

    def look(self, name: str, *, record: bool = False) -> ModelView:
        """As `Store.look`: three small requests. The record always comes along.

        The record is read first: a version appearing in between is then one being published.
        """
        place = self.location / name
        if not is_component(name):
            return ModelView(place, exists=False)
        ledger = read_ledger(self.client, name)
        listing = self.client.list(name)
        found = None
        if any(fact.key == CONFIG_FILENAME for fact in listing.files):
            found = self.client.get(f"{name}/{CONFIG_FILENAME}")
        numbers = {number for folder in listing.folders if (number := version_number(folder)) is not None}
        if numbers - ledger.pending.keys() - set(range(ledger.state.highest_version + 1)):
            # published between the two requests, or by another process
            ledger = read_ledger(self.client, name)
        level = _level(listing)
        folders = tuple(folder for folder in level.folders if version_number(folder) not in ledger.pending)
        return ModelView(
            place,
            exists=found is not None or bool(folders) or listing.marked or bool(level.files and not ledger.pending),
            level=level,
            versions=tuple(sorted(numbers - ledger.pending.keys())),
            folders=folders,
            state=ledger.state,
            config=None if found is None else found[0],
            work=_work(ledger),
            token=_Seen(ledger, None if found is None else found[1]),
        )

    def states(self, names: Iterable[str] | None = None) -> Mapping[str, ModelState]:
        """As `Store.states`."""
        wanted = list(model_names(self) if names is None else names)
        ledgers = each(self, lambda name: read_ledger(self.client, name), wanted)
        return {name: ledger.state for name, ledger in zip(wanted, ledgers, strict=True)}

    @contextlib.contextmanager
    def fetch(
        self,
        name: str,
        version: int,
        names: Sequence[str] | None = None,
        *,
        compare: bool = True,
        resume: str = "",
        progress: Progress = untold,
    ) -> Iterator[Path]:
        """As `Store.fetch`: into a folder of its own, or, to be resumed, into the user's cache."""
        with contextlib.ExitStack() as stack:
            if resume:
                folder = stack.enter_context(kept_folder(f"{self.location}\0{name}\0{version}\0{resume}"))
            else:
                place = stack.enter_context(work_folder("repo-manager-objects-"))
                folder = Path(place).resolve() / name / str(version)
            fetch_version(self.client, name, version, folder, names, compare=compare, progress=progress)
            yield folder

    def digest(self, key: str, entry: Entry) -> FileRecord:
        """As `Store.digest`."""
        return object_record(self.client, key, _fact(entry))

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """As `Store.exclusive`: nothing is held, as every write is compared."""
        yield

    def replace_if(self, view: ModelView, contents: Mapping[str, bytes | None], *, serves: Sequence[int] = ()) -> None:
        """As `Store.replace_if`.

        A removal marks a version in the ledger and then looks at the policy. This writes the policy and then looks at
        the ledger. So never both go through.
        """
        before = {entry.name: _fact(entry) for entry in view.level.files}
        for file, data in contents.items():
            key = f"{view.name}/{file}"
            if data is None:
                self.client.delete([key])
            elif file == CONFIG_FILENAME:
                self._replace_config(view, data, serves)
            elif (fact := before.get(file) or self.client.head(key)) is None:
                self.client.create(key, data)
            else:
                self.client.replace(key, data, fact.mark)

    def _replace_config(self, view: ModelView, data: bytes, serves: Sequence[int]) -> None:
        mark = put_config(self.client, view.name, data, _seen(view).config)
        going = sorted(set(serves) & read_ledger(self.client, view.name).pending.keys()) if serves else []
        if not going:
            return
        fact = self.client.head(f"{view.name}/{CONFIG_FILENAME}")
        if fact is not None and fact.mark.e_tag == mark.e_tag and view.config is not None:
            put_config(self.client, view.name, view.config, fact)
        raise RepositoryError(f"{view.name}:{going[0]} is being removed at this moment", hint="Choose another version.")

    def put(self, key: str, content: bytes | Path, *, new: bool = False, record: FileRecord | None = None) -> None:
        """As `Store.put`."""
        if isinstance(content, bytes):
            write = self.client.create if new else self.client.put
            write(key, content)
            return
        measured = measure(content, self.client.options.part_bytes)
        if record is not None and measured.record != record:
            raise ConcurrentChangeError(f"{content} was changed at the same time", hint="Run the command again.")
        if new and self.client.head(key) is not None:
            raise ChangedMeanwhileError(key)
        folder, _, file = key.rpartition("/")
        upload_files(self.client, folder, {file: (content, measured)}, lambda _: None)

    def erase(self, folder: str, first: str) -> None:
        """As `Store.erase`."""
        self.client.delete([f"{folder}/{first}"])
        self.client.delete([f"{folder}/{fact.key}" for fact in self.client.walk(folder)])

    def change_state(
        self, name: str, change: Callable[[ModelState], ModelState], *, needs: int | None = None
    ) -> ModelState:
        """As `Store.change_state`."""

        def apply(ledger: Ledger) -> Ledger:
            if needs in ledger.pending:
                raise RepositoryError(f"model {name!r} has no version {needs} any more")
            return dataclasses.replace(ledger, state=change(ledger.state))

        return change_ledger(self.client, name, apply).state

    def publish_version(self, incoming: Incoming) -> Arrived:
        """As `Store.publish_version`."""
        return publish_version(self.client, lambda: self.look(incoming.name), incoming)

    def discard_versions(self, departure: Departure) -> None:
        """As `Store.discard_versions`."""
        discard_versions(self.client, departure)

    def mend(self, names: Iterable[str]) -> Iterator[RepairStep]:
        """As `Store.mend`: removals are ended, whole publications settled, others deleted."""
        for model in names:
            try:
                ledger = read_ledger(self.client, model)
            except RepositoryError:
                key = ledger_key(model)
                action = f"set aside as {key}.damaged and rebuilt from the versions"
                begin = functools.partial(self._begin_ledger_anew, model)
                yield RepairStep(key, action, RepairKind.RECORD, begin)
                try:
                    ledger = read_ledger(self.client, model)
                except RepositoryError:
                    continue  # the repair of the record was not applied
            for version, entry in sorted(abandoned_work(ledger).items()):
                kind = RepairKind.REMOVAL if entry.action == "remove" else RepairKind.REST
                action = "ended or removed an interrupted command's work"
                end = functools.partial(end_work, self.client, model, version, entry)
                yield RepairStep(f"{model}/{version}", action, kind, end)

    def _begin_ledger_anew(self, name: str) -> bool:
        key = ledger_key(name)
        found = self.client.get(key)
        if found is not None:
            self.client.put(f"{key}.damaged", found[0])
            self.client.delete([key])
        numbers = [n for folder in self.client.list(name).folders if (n := version_number(folder)) is not None]
        self.change_state(name, lambda state: state.numbered(max(numbers, default=0)))
        return True

    @contextlib.contextmanager
    def lease(self, name: str, *, timeout_s: float) -> Iterator[Callable[[], str]]:
        """As `Store.lease`: an entry with a holder and an end, renewed while the block runs."""
        with object_lease(self.client, name, timeout_s=timeout_s) as other:
            yield other


_STORE: type[Store] = ObjectStore  # type check: `open_store` imports the class by name, unchecked


def _seen(view: ModelView) -> _Seen:
    assert isinstance(view.token, _Seen), "a view of another store"
    return view.token


def _fact(entry: Entry) -> ObjectFact:
    assert isinstance(entry.token, ObjectFact), "an entry of another store"
    return entry.token


def _level(listing: Listing) -> FolderContent:
    """Return a listing as a level. Where an object and a prefix have one name Triton sees the prefix.

    Others' objects may be named in ways no file can: they are left out.
    """
    folders = tuple(name for name in listing.folders if is_component(name) and len(name) <= _MAX_NAME)
    files = tuple(
        Entry(fact.key, fact.size_bytes, token=fact)
        for fact in listing.files
        if is_component(fact.key) and fact.key not in folders and len(fact.key) <= _MAX_NAME
    )
    return FolderContent(
        folders, files, modified_at=max((fact.modified.timestamp() for fact in listing.files), default=0.0)
    )


def _work(ledger: Ledger) -> tuple[Work, ...]:
    """Describe the work under way on versions, and whether its process is gone."""
    found = []
    for version, entry in sorted(ledger.pending.items()):
        doing = "published" if entry.action == "publish" else "removed"
        gone = is_abandoned(entry)
        state = "was begun and not ended" if gone else "is under way"
        found.append(Work(version, f"version {version} is being {doing} by {entry.holder}, which {state}", gone))
    return tuple(found)
