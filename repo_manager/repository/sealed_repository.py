"""A private repository of signed models, which a server reads in place of the one that others may write to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import file_lock, work_folder, write_atomic
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import COPIES, version_number
from repo_manager.repository.location import Location, parse_location
from repo_manager.repository.look import changeable_model
from repo_manager.repository.sealing import SealedModel, Sealing, seal
from repo_manager.repository.signing_files import signature_name
from repo_manager.repository.signing_format import MAX_SIGNATURE_BYTES
from repo_manager.repository.stores import open_store
from repo_manager.repository.vouching import fingerprint
from repo_manager.triton_config.config import CONFIG_FILENAME, format_config, parse_config
from repo_manager.triton_config.ensembles import steps_of
from repo_manager.triton_config.version_policy import replace_version_policy, served_versions

__all__ = ["SealedRepository"]

_ABOUT = "about.json"
_STAGING = "staging-"
_LOCK_S = 600.0


@dataclasses.dataclass(frozen=True)
class SealedRepository:
    """Private copies of signed models.

    Attributes:
        repository: what is copied: a folder, or a place in object storage.
        keys: public keys or root certificates, PEM. One must fit each version.
        folder: a folder that only this user can write to.
    """

    repository: Location
    keys: tuple[Path, ...]
    folder: Path

    @classmethod
    def make(cls, repository: Location, keys: Sequence[Path], folder: Path) -> SealedRepository:
        """Prepare an empty folder for copies.

        Args:
            repository: what is copied: a folder, or a place in object storage.
            keys: public keys or root certificates, PEM. One must fit each version.
            folder: a folder that only this user can write to.
        """
        made = cls(repository.resolve(), tuple(key.resolve() for key in keys), folder)
        about = {"repository": str(made.repository), "keys": [str(key) for key in made.keys]}
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        made.models.mkdir()
        return made

    @classmethod
    def at(cls, folder: Path) -> SealedRepository:
        """Return what `make` has prepared.

        Raises:
            RepositoryError: it is gone: its server has ended.
        """
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise RepositoryError(f"{folder} is gone: its server has ended", hint="Start it again.") from exc
        return cls(parse_location(about["repository"]), tuple(Path(key) for key in about["keys"]), folder)

    @property
    def models(self) -> Path:
        """The folder that a server reads."""
        return self.folder / COPIES

    def refresh(self, name: str, *, served: Collection[int] = ()) -> None:
        """Copy what the next load of a model serves, and what it loads with it. What has not changed stays as it is.

        Args:
            name: model to load next. The models of an ensemble are copied before it.
            served: versions that are READY. Those of an earlier copy stay where no key vouches for them any more.

        Raises:
            RepositoryError: a version is missing, or no key vouches for it. The copies are as they were.
            ConfigError: config.pbtxt is broken.
            MissingDependencyError: the `[sign]` extra is not installed.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(f"copy {name}"))
            stack.enter_context(file_lock(self.folder / "lock", timeout_s=_LOCK_S))
            staging = stack.enter_context(work_folder(_STAGING, self.folder))
            copies = dict(self._copies(name, staging, served, set()))
            for each, (model, states) in copies.items():
                self._install(each, model, states, touch=each == name)

    def _copies(
        self, name: str, staging: Path, served: Collection[int], seen: set[str]
    ) -> Iterator[tuple[str, tuple[SealedModel, Mapping[int, str]]]]:
        """Copy a model after the models of an ensemble: a load of the ensemble loads them, too."""
        seen.add(name)
        states = self._states(name)
        own = self.models / name
        known = {
            version: own / str(version)
            for version, state in states.items()
            if (own / str(version)).is_dir() and self._read_state(name, version) == state
        }
        kept = [version for version in served if (own / str(version)).is_dir()]
        model = seal(self.repository, name, staging, Sealing(self.keys, served=kept, known=known))
        for step in steps_of(model.config):
            if step.model not in seen:
                yield from self._copies(step.model, staging, (), seen)
        yield name, (model, states)

    def _states(self, name: str) -> dict[int, str]:
        """Return what tells each version that config.pbtxt serves from a changed one. Nothing for object storage."""
        store = open_store(self.repository)
        view = changeable_model(store, name)
        found = {}
        for version in served_versions(view.parsed_config(), view.versions):
            state = fingerprint(view, version)
            signature = store.read(signature_name(name, version), limit_bytes=MAX_SIGNATURE_BYTES)
            if state is not None and signature is not None:
                found[version] = json.dumps([sorted(state.items()), signature.decode(errors="replace")])
        return found

    def _state_file(self, name: str, version: int) -> Path:
        return self.folder / "states" / f"{name}.{version}"

    def _read_state(self, name: str, version: int) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return self._state_file(name, version).read_text(encoding="utf-8")
        return None

    def _install(self, name: str, model: SealedModel, states: Mapping[int, str], *, touch: bool) -> None:
        """Put checked copies where the server reads them, config.pbtxt last."""
        own = self.models / name
        own.mkdir(exist_ok=True)
        config = own / CONFIG_FILENAME
        before = config.read_text(encoding="utf-8") if config.exists() else None
        fresh = [version for version in model.versions if (model.folder / str(version)).is_dir()]
        if fresh == list(model.versions) and fresh:  # otherwise the files next to the versions are unchanged too
            for entry in [*own.iterdir()]:
                if entry.name != CONFIG_FILENAME and version_number(entry.name) is None:
                    _remove(entry)
            for entry in [*model.folder.iterdir()]:
                if entry.name != CONFIG_FILENAME and version_number(entry.name) is None:
                    entry.rename(own / entry.name)
        for version in fresh:
            self._state_file(name, version).unlink(missing_ok=True)
            _remove(own / str(version))
            (model.folder / str(version)).rename(own / str(version))
            if version in states:
                (self.folder / "states").mkdir(exist_ok=True)
                write_atomic(self._state_file(name, version), states[version].encode())
        text = format_config(model.config)
        if not model.versions and before is not None:  # only the served versions are signed, not config.pbtxt
            text = replace_version_policy(before, model.left_out, where=CONFIG_FILENAME)
        if touch or text != before:
            write_atomic(config, text.encode())
        needed = {*model.versions, *model.left_out}
        if before is not None:  # the server may use these versions until its next load
            needed |= set(served_versions(parse_config(before), _versions_in(own)))
        for version in _versions_in(own):
            if version not in needed:
                self._state_file(name, version).unlink(missing_ok=True)
                _remove(own / str(version))


def _versions_in(folder: Path) -> tuple[int, ...]:
    numbers = (version_number(entry.name) for entry in folder.iterdir())
    return tuple(sorted(number for number in numbers if number is not None))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
