"""A repository in folders: a version appears and goes by one rename, and one lock keeps writers apart.

Durability has an order: content, then the folders around it, then the rename, then the folder it went into.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import ConcurrentChangeError, LockHeldError, RepositoryError
from repo_manager.files import fsync_directory, read_regular, sha256_file, take_lock, write_atomic
from repo_manager.repository.file_system import copy_durably, write_durably
from repo_manager.repository.layout import (
    MANIFEST_FILENAME,
    STATE_FILENAME,
    is_component,
    is_folder,
    open_root,
    version_number,
)
from repo_manager.repository.manifest import FileRecord, manifest_text
from repo_manager.repository.plan.removal import without_versions
from repo_manager.repository.signing_files import drop_signatures, orphaned_signatures, signature_name
from repo_manager.repository.state import ModelState
from repo_manager.repository.state_file import change_state, read_state, read_states, repository_lock
from repo_manager.repository.stores.base import (
    Arrived,
    ChangedMeanwhileError,
    Departure,
    Incoming,
    Progress,
    RepairKind,
    RepairStep,
    Traits,
    model_names,
    untold,
)
from repo_manager.repository.stores.staging import (
    check_copies,
    delete,
    delete_in_place,
    is_same_file,
    leftovers,
    place_first,
    put_back,
    stage_files,
    staged,
    sweep_entry,
    take_out,
)
from repo_manager.repository.view import Entry, FolderContent, Link, ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME
from repo_manager.triton_config.problems import Problem, Severity

__all__ = ["DiskStore"]

_LEASE_POLL_S = 0.02


class DiskStore:
    """A repository below one folder. One for each operation, as it keeps the operation's locks and files."""

    traits = Traits(remote=False, changes_visible=True, lookups=1, record=STATE_FILENAME)

    def __init__(self, root: Path) -> None:
        self.location = root
        self._staging: Path | None = None

    def list_level(self, folder: str = "") -> FolderContent:
        """As `Store.list_level`."""
        path = f"{self.location}/{folder}" if folder else str(self.location)
        folders: list[str] = []
        files: list[Entry] = []
        links: dict[str, Link] = {}
        with os.scandir(path) as entries:
            for entry in entries:
                if is_folder(entry):
                    folders.append(entry.name)
                    if entry.is_symlink():
                        links[entry.name] = self._link(Path(entry.path))
                else:
                    with contextlib.suppress(FileNotFoundError):  # it existed only for a moment
                        files.append(self._entry(entry))
        files.sort(key=lambda each: each.name)
        return FolderContent(tuple(sorted(folders)), tuple(files), links, Path(path).stat().st_mtime)

    def _entry(self, entry: os.DirEntry[str]) -> Entry:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            return Entry(entry.name, status.st_size, regular=stat.S_ISREG(status.st_mode))
        path = Path(entry.path)
        try:
            size_bytes = path.stat().st_size
        except OSError:
            size_bytes = status.st_size
        return Entry(entry.name, size_bytes, self._link(path), regular=False)

    def _link(self, path: Path) -> Link:
        try:
            target = path.resolve()
        except RuntimeError:  # a circular link
            return Link(str(path.parent / path.readlink()), outside=True, exists=False)
        return Link(str(target), self.location not in target.parents, target.exists())

    def read(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """As `Store.read`."""
        path = self.location / key
        try:
            if limit_bytes is not None:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
                    raise RepositoryError(f"{path} is no file of at most {limit_bytes} bytes")
            return read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise RepositoryError(f"{path} cannot be read: {exc.strerror or exc}") from exc

    def look(self, name: str, *, record: bool = False) -> ModelView:
        """As `Store.look`."""
        place = self.location / name
        if not is_component(name):
            return ModelView(place, exists=False)
        link = self._link(place) if place.is_symlink() else None
        state = read_state(self.location, name) if record else ModelState()
        try:
            level = self.list_level(name)
        except FileNotFoundError:
            return ModelView(place, exists=False, link=link, state=state)
        except NotADirectoryError:
            text = f"{place} is a file, and a model needs a folder of that name"
            return ModelView(place, exists=False, link=link, state=state, in_the_way=text)
        config, error = self._config(name)
        if (
            config is None
            and not error
            and any(entry.name == CONFIG_FILENAME and entry.regular for entry in level.files)
        ):
            return self.look(name, record=record)  # removed or replaced during this look
        numbers = (version_number(folder) for folder in level.folders)
        return ModelView(
            place,
            exists=True,
            level=level,
            versions=tuple(sorted(number for number in numbers if number is not None)),
            folders=level.folders,
            state=state,
            config=config,
            config_error=error,
            link=link,
            token=level.modified_at,
        )

    def _config(self, name: str) -> tuple[bytes | None, str]:
        try:
            return read_regular(self.location / name / CONFIG_FILENAME), ""
        except FileNotFoundError:
            return None, ""
        except OSError as exc:
            return None, f"cannot be read: {exc.strerror or exc}"

    def states(self, names: Iterable[str] | None = None) -> Mapping[str, ModelState]:
        """As `Store.states`."""
        if names is None:
            return read_states(self.location)
        return {name: read_state(self.location, name) for name in names}

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
        """As `Store.fetch`: the version's own folder."""
        yield self.location / name / str(version)

    def digest(self, key: str, entry: Entry) -> FileRecord:
        """As `Store.digest`."""
        path = self.location / key
        return FileRecord(sha256_file(path), path.stat().st_size)

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """As `Store.exclusive`: the repository's one lock, with a staging folder."""
        if self._staging is not None:
            yield
            return
        with staged(self.location) as staging, repository_lock(self.location):
            self._staging = staging
            try:
                yield
            finally:
                self._staging = None

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        with self.exclusive(name):
            assert self._staging is not None
            yield self._staging

    def replace_if(self, view: ModelView, contents: Mapping[str, bytes | None], *, serves: Sequence[int] = ()) -> None:
        """As `Store.replace_if`. A removed version is renamed away under the same lock, so `serves` needs no look."""
        with self._staged(view.name) as staging:
            if self._config(view.name) != (view.config, view.config_error):
                raise ChangedMeanwhileError(view.config_place)
            for file, data in contents.items():
                path = self.location / view.name / file
                if data is None:
                    path.unlink(missing_ok=True)
                    fsync_directory(path.parent)
                else:
                    write_atomic(path, data, staging=staging)

    def put(self, key: str, content: bytes | Path, *, new: bool = False, record: FileRecord | None = None) -> None:
        """As `Store.put`."""
        path = self.location / key
        with self._staged(key) as staging:
            if new and os.path.lexists(path):
                raise ChangedMeanwhileError(key)
            if isinstance(content, bytes):
                write_atomic(path, content, staging=staging)
                return
            ready = staging / "put"
            if FileRecord(*copy_durably(content, ready)) != record and record is not None:
                raise ConcurrentChangeError(f"{content} was changed at the same time", hint="Run the command again.")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent.resolve() != path.parent:
                raise RepositoryError(
                    f"{path.parent} leads through a symbolic link", hint="Put the content itself there."
                )
            ready.replace(path)
            fsync_directory(path.parent)

    def erase(self, folder: str, first: str) -> None:
        """As `Store.erase`."""
        place = self.location / folder
        (place / first).unlink(missing_ok=True)
        fsync_directory(place)
        shutil.rmtree(place)

    def change_state(
        self, name: str, change: Callable[[ModelState], ModelState], *, needs: int | None = None
    ) -> ModelState:
        """As `Store.change_state`."""
        with self._staged(name) as staging:
            if needs is not None and not (self.location / name / str(needs)).is_dir():
                raise RepositoryError(f"model {name!r} has no version {needs} any more")
            return change_state(self.location, name, change, staging=staging)

    def publish_version(self, incoming: Incoming) -> Arrived:
        """As `Store.publish_version`. The files are copied and made durable before the lock is taken."""
        before = self.look(incoming.name, record=True)
        incoming.check(before)  # before gigabytes are copied
        before.number_for(incoming.number)
        root = open_root(self.location, create=True)
        with staged(root) as staging:
            content = staging / "version"
            records = stage_files(content, incoming.files, incoming.progress)
            if incoming.expected is not None:
                check_copies(content, records, incoming.expected)
            with repository_lock(root):
                view = self.look(incoming.name, record=True)
                first = incoming.check(view)
                if incoming.claiming is not None:
                    incoming.claiming()
                version, kept = view.number_for(incoming.number), incoming.number is not None
                manifest = incoming.manifest(version, records)
                write_durably(content / MANIFEST_FILENAME, manifest_text(manifest).encode())
                fsync_directory(content)
                change_state(
                    root,
                    incoming.name,
                    lambda state: state.given_out(version, view.used_numbers, kept=kept),
                    staging=staging,
                )
                folder = root / incoming.name
                if first:
                    place_first(folder, staging, version, incoming)
                else:
                    content.rename(folder / str(version))
                    fsync_directory(folder)
                if kept:  # an existing version's number is taken anyway, and its removal drops it from the free ones
                    with contextlib.suppress(OSError):
                        change_state(root, incoming.name, lambda state: state.without_free(version), staging=staging)
                return Arrived(version, manifest, first, self.look(incoming.name))

    def discard_versions(self, departure: Departure) -> None:
        """As `Store.discard_versions`: the number and the policy, then each version out by one rename, then the record.

        A number in the record is never given out again. When a step fails, those before it are undone.
        """
        view = departure.view
        folder = self.location / view.name
        places = [folder] if departure.whole else [folder / str(version) for version in departure.versions]
        changed = None if departure.whole else without_versions(view, departure.versions)
        highest = max((*departure.versions, *view.versions), default=0)
        with self._staged(view.name) as staging, contextlib.ExitStack() as undo:
            change_state(self.location, view.name, lambda state: state.numbered(highest), staging=staging)
            if changed is not None and view.config is not None:
                undo.callback(write_atomic, folder / CONFIG_FILENAME, view.config, staging=staging)
                write_atomic(folder / CONFIG_FILENAME, changed.encode(), staging=staging)
            out: list[Path] = []
            stuck: list[Path] = []
            for place in places:
                target = take_out(place, staging)
                if target is None:
                    stuck.append(place)
                else:
                    undo.callback(put_back, target, place)
                    out.append(target)
            change_state(self.location, view.name, departure.forget, staging=staging)
            undo.pop_all()
            for place in stuck:
                delete_in_place(place)
            for target in out:
                delete(target)
            drop_signatures(self.location, [(view.name, version) for version in departure.versions])

    def mend(self, names: Iterable[str]) -> Iterator[RepairStep]:
        """As `Store.mend`: staging folders of dead commands, signatures without a version, a damaged record.

        A removal is a rename: it is done or not.
        """
        for area, entry in leftovers(self.location):
            act = functools.partial(sweep_entry, area, entry, self.location)
            yield RepairStep(entry, "removed the remains of a dead command", RepairKind.REST, act)
        for name, version in orphaned_signatures(self.location):
            text = f"is the signature of {name}:{version}, which does not exist"
            where = signature_name(name, version)
            problem = Problem(where, text, Severity.WARNING, "`repo-manager gc` removes it", rule="leftovers")
            act = functools.partial(self._drop_orphan, name, version)
            yield RepairStep(where, "removed: its version does not exist", RepairKind.REST, act, problem)
        try:
            read_states(self.location)
        except RepositoryError as exc:
            action = f"set aside as {STATE_FILENAME}.damaged and rebuilt from the folders"
            problem = Problem(STATE_FILENAME, exc.message, hint=exc.hint or "", rule="state-file")
            yield RepairStep(STATE_FILENAME, action, RepairKind.RECORD, self._begin_state_anew, problem)

    def _drop_orphan(self, name: str, version: int) -> bool:
        with repository_lock(self.location):
            orphaned = (name, version) in orphaned_signatures(self.location)
            if orphaned:
                drop_signatures(self.location, [(name, version)])
        return orphaned

    def _begin_state_anew(self) -> bool:
        with self._staged("") as staging:
            (self.location / STATE_FILENAME).rename(self.location / f"{STATE_FILENAME}.damaged")
            for name in model_names(self):
                highest = max(self.look(name).versions, default=0)
                change_state(self.location, name, lambda state, n=highest: state.numbered(n), staging=staging)  # type: ignore[misc]
        return True

    @contextlib.contextmanager
    def lease(self, name: str, *, timeout_s: float) -> Iterator[Callable[[], str]]:
        """As `Store.lease`: a lock on a hidden file in the root, where Triton ignores files.

        The kernel gives it up when its holder dies, so a lease never must be broken by hand.
        """
        path = self.location / f".repo-manager.rollout.{name}.lock"
        try:
            descriptor = _lock_or_give_up(path, time.monotonic() + timeout_s)
        except OSError as exc:
            raise RepositoryError(
                f"{path} cannot be created: {exc.strerror}", hint="Deploying needs write access."
            ) from exc
        if descriptor is None:
            raise LockHeldError(
                f"another roll-out of {name} is under way (it holds {path})",
                hint="Wait for it to end, then run this command again.",
            )

        def other() -> str:
            """Return whether somebody removed the file, and another process made and locked one since."""
            return "" if not path.exists() or is_same_file(descriptor, path) else f"another process holds {path}"

        try:
            yield other
        finally:
            with contextlib.suppress(OSError):
                if is_same_file(descriptor, path):
                    path.unlink()
            os.close(descriptor)


def _lock_or_give_up(path: Path, deadline: float) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if take_lock(descriptor):
            # The last holder may remove the file after we open it and before we lock it.
            if is_same_file(descriptor, path):
                return descriptor
        elif time.monotonic() >= deadline:
            os.close(descriptor)
            return None
        else:
            time.sleep(_LEASE_POLL_S)
        os.close(descriptor)
