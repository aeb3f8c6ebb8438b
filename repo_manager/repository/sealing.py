"""Private copies of signed models: what a server loads is exactly what was checked.

Anyone who can write to the repository can exchange a file between a check and a load. So a model is copied first, into
a folder that only this user can write to. The copy is checked, and the copy is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.files import work_folder
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import Location
from repo_manager.repository.look import changeable_model, with_beside, with_versions
from repo_manager.repository.signing import check_signature
from repo_manager.repository.signing_files import beside_signatures, signature_name
from repo_manager.repository.signing_format import MAX_SIGNATURE_BYTES
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store
from repo_manager.repository.vouching import beside_files, check_facts, fingerprint
from repo_manager.triton_config.config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config
from repo_manager.triton_config.version_policy import served_versions

__all__ = ["LargeModelError", "SealedModel", "sealed_model"]

_CHUNK_BYTES = 1 << 20


class LargeModelError(RepositoryError):
    """What a load serves is as it was signed, and larger than the limit.

    Args:
        message: as for `RepoManagerError`.
        config: config.pbtxt, as the keys vouch for it.
    """

    def __init__(self, message: str, config: ModelConfig) -> None:
        super().__init__(message)
        self.config = config


@dataclasses.dataclass(frozen=True)
class SealedModel:
    """A model's private copy, as its keys vouch for it.

    Attributes:
        folder: the copy's folder.
        config: its config.pbtxt.
        files: path below the folder -> file, of everything but config.pbtxt.
        versions: those that config.pbtxt serves, and that are in the copy.
        left_out: those that config.pbtxt serves and no key vouches for. Only of those that are served already.
    """

    folder: Path
    config: ModelConfig
    files: Mapping[str, Path]
    versions: tuple[int, ...]
    left_out: tuple[int, ...]

    @property
    def has_variants(self) -> bool:
        """Whether a server may have been told to read another file than config.pbtxt."""
        return any(place.startswith(f"{VARIANTS_FOLDER}/") for place in self.files)


@contextlib.contextmanager
def sealed_model(
    repository: Location, name: str, keys: Sequence[Path], *, served: Collection[int] = (), limit_bytes: int
) -> Iterator[SealedModel]:
    """Give a private copy of what a load of a model serves, checked to be what was signed.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model.
        keys: public keys or root certificates, PEM. One must fit each version.
        served: versions that are READY. The copy leaves them out when no key vouches for them: a load keeps them as
            they are.
        limit_bytes: the largest copy.

    Raises:
        RepositoryError: a version is missing, or its signature does not hold.
        LargeModelError: the copy is larger than the limit, and the files are as they were signed.
        ConfigError: config.pbtxt is broken.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    store = open_store(repository)
    with disk_errors(f"copy {name}"), work_folder("repo-manager-sealed-") as root:
        try:
            model = _Copying(store, root, limit_bytes).model(name, keys, served)
        except _TooLargeError:
            raise _large(store, name, keys, limit_bytes) from None
        except (RepositoryError, ConfigError) as exc:  # what the user knows is the repository, not the copy
            raise type(exc)(exc.message.replace(str(root), str(store.location)), hint=exc.hint) from exc
        yield model


class _TooLargeError(Exception):
    """A copy has grown above its limit."""


class _Copying:
    """One copy in the making.

    Args:
        store: store of the repository.
        root: empty folder, which becomes a repository of one model.
        limit_bytes: the largest copy.
    """

    def __init__(self, store: Store, root: Path, limit_bytes: int) -> None:
        self._store, self._root, self._left = store, root, limit_bytes

    def model(self, name: str, keys: Sequence[Path], served: Collection[int]) -> SealedModel:
        """Copy a model and check the copy."""
        store, folder = self._store, self._root / name
        view = changeable_model(store, name)
        folder.mkdir()
        text = view.config_text()
        (folder / CONFIG_FILENAME).write_text(text, encoding="utf-8")
        config = parse_config(text, where=str(folder / CONFIG_FILENAME))
        for file in beside_files(store, view):
            self._keep(folder / file, store.read(f"{name}/{file}"))
        versions = served_versions(config, view.versions)
        for version in versions:
            with store.fetch(name, version, compare=False) as source:
                self._copy_folder(source, folder / str(version))
        for file in (
            *(signature_name(name, version) for version in versions),
            *beside_signatures((each.name for each in store.list_level().files), name),
        ):
            self._keep(self._root / file, store.read(file, limit_bytes=MAX_SIGNATURE_BYTES))
        odd = tuple(version for version in versions if not self._is_signed(name, version, keys, served))
        places = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {
            place: folder / place
            for place in places
            if place != CONFIG_FILENAME and not any(place.startswith(f"{version}/") for version in odd)
        }
        return SealedModel(folder, config, files, tuple(each for each in versions if each not in odd), odd)

    def _is_signed(self, name: str, version: int, keys: Sequence[Path], served: Collection[int]) -> bool:
        """Check a copied version. Return False for one that is served already and that no key vouches for."""
        try:
            check_signature(self._root, name, version, keys)
        except RepositoryError:
            if version in served:
                return False
            raise
        return True

    def _keep(self, target: Path, content: bytes | None) -> None:
        """Write a file that was read, if it was there."""
        if content is None:
            return
        self._take(len(content))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _take(self, size_bytes: int) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise _TooLargeError

    def _copy_folder(self, source: Path, target: Path) -> None:
        """Copy a folder of plain files. Anything else in it ends the copy: no signature can cover it."""
        target.mkdir()
        with os.scandir(source) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    self._copy_folder(Path(entry.path), target / entry.name)
                else:
                    self._copy_file(Path(entry.path), target / entry.name)

    def _copy_file(self, source: Path, target: Path) -> None:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file, target.open("wb") as copy:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RepositoryError(f"{source} is not a regular file", hint="Put the content itself there.")
            while content := file.read(_CHUNK_BYTES):
                self._take(len(content))
                copy.write(content)


def _large(store: Store, name: str, keys: Sequence[Path], limit_bytes: int) -> RepositoryError:
    """Return the error for a copy above its limit.

    Somebody who can write to the repository can make files large for a moment. So the size counts only where the
    signature holds for it, and where no file has changed while that was checked.
    """
    view = changeable_model(store, name)
    config = view.parsed_config()
    sizes: dict[str, int] = {}
    for version in served_versions(config, view.versions):
        before = check_signature(store.location, name, version, keys).state
        content = with_versions(store, view, (version,)).contents.get(version)
        if content is not None:
            check_facts(with_beside(store, view), content.manifest())
        if content is None or before != fingerprint(view, version):
            return RepositoryError(f"{name}:{version} changed while it was read", hint="Run the command again.")
        sizes |= {file: state[1] for file, state in (before or {}).items() if len(state) > 1}
    if not store.traits.remote and sum(sizes.values()) <= limit_bytes:
        return RepositoryError(f"{name} changed while it was read", hint="Run the command again.")
    limit = f"{limit_bytes >> 20} MiB"
    return LargeModelError(
        f"the served versions of {name} are larger than {limit}, the most that a load can bring along", config
    )
