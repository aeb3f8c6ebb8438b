"""Private copies of signed models: what a server loads is exactly what was checked.

Anyone who can write to the repository can exchange a file between a check and a load. So a model is copied first, into
a folder that only this user can write to. The copy is checked, and the copy is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location
from repo_manager.repository.look import changeable_model, with_beside, with_versions
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.signing import check_signature
from repo_manager.repository.signing_files import beside_signatures, signature_name
from repo_manager.repository.signing_format import MAX_SIGNATURE_BYTES
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store
from repo_manager.repository.vouching import beside_files, check_beside, check_facts, fingerprint
from repo_manager.triton_config.config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config
from repo_manager.triton_config.version_policy import served_versions, with_version_policy

__all__ = ["LargeModelError", "SealedModel", "Sealing", "seal", "seal_as"]

_CHUNK_BYTES = 16 << 20


class LargeModelError(RepositoryError):
    """What a load serves is as it was signed, and larger than the limit.

    Args:
        message: one sentence with the model and the limit, shown to the user.
        config: config.pbtxt, as the keys vouch for it.
    """

    def __init__(self, message: str, config: ModelConfig) -> None:
        super().__init__(message)
        self.config = config


@dataclasses.dataclass(frozen=True)
class SealedModel:
    """A model's private copy, as its keys vouch for it.

    Attributes:
        folder: the copy's folder. Its name is the model's.
        config: its config.pbtxt. No key vouches for it where `versions` is empty.
        files: path below the folder -> file, of everything but config.pbtxt.
        versions: those that config.pbtxt serves, and that keys vouch for.
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


@dataclasses.dataclass(frozen=True)
class Sealing:
    """How a copy is made.

    Attributes:
        keys: public keys or root certificates, PEM. One must fit each version.
        versions: what is copied. `None`: what config.pbtxt serves.
        served: versions that are READY. The copy leaves them out when no key vouches for them: a load keeps them as
            they are.
        known: version -> its folder in an earlier copy, of those that have not changed since. They are not copied.
        limit_bytes: the largest copy. `None`: any size.
    """

    keys: Sequence[Path]
    versions: tuple[int, ...] | None = None
    served: Collection[int] = ()
    known: Mapping[int, Path] = dataclasses.field(default_factory=dict)
    limit_bytes: int | None = None


def seal(repository: Location, name: str, root: Path, sealing: Sealing) -> SealedModel:
    """Copy what a load of a model serves into a private folder, and check that the copy is what was signed.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model to copy. `root` must not have a folder of this name yet.
        root: a folder that only this user can write to. The model's folder is made in it.
        sealing: the keys to vouch for it, the versions to copy, and the largest size.

    Raises:
        RepositoryError: a version is missing, or its signature does not hold.
        LargeModelError: the copy is larger than the limit, and the files are as they were signed.
        ConfigError: config.pbtxt is broken.
        MissingDependencyError: the `[sign]` extra is not installed.
    """
    store = open_store(repository)
    with disk_errors(f"copy {name}"):
        try:
            return _Copying(store, name, root, sealing).model()
        except _TooLargeError:
            raise _large(store, name, sealing.keys, sealing.limit_bytes or 0) from None
        except (RepositoryError, ConfigError) as exc:  # name the user's repository instead of the copy
            exc.message = exc.message.replace(str(root), str(store.location))
            raise


def seal_as(place: Path, config: ModelConfig | None, root: Path, keys: Sequence[Path]) -> tuple[Path, ModelConfig]:
    """Copy a model into a private folder, to serve the versions of another configuration.

    Args:
        place: the model's folder in a repository.
        config: its version policy says which versions. `None`: the model's own does.
        root: a folder that only this user can write to.
        keys: public keys or root certificates, PEM. One must fit each version.

    Returns:
        The copy's folder, and the configuration that the keys vouch for, which serves these versions.

    Raises:
        RepositoryError: no key vouches for a version.
    """
    view = changeable_model(open_store(place.parent), place.name)
    versions = None if config is None else served_versions(config, view.versions)
    model = seal(place.parent, place.name, root, Sealing(keys, versions=versions))
    return model.folder, with_version_policy(model.config, model.versions)


class _TooLargeError(Exception):
    """A copy has grown above its limit."""


class _Copying:
    """One copy in the making. Its root becomes a repository with the model, as the store's is."""

    def __init__(self, store: Store, name: str, root: Path, sealing: Sealing) -> None:
        self._store, self._name, self._root, self._sealing = store, name, root, sealing
        self._left = sealing.limit_bytes

    def model(self) -> SealedModel:
        """Copy a model and check the copy."""
        store, name, known = self._store, self._name, self._sealing.known
        folder = self._root / name
        view = changeable_model(store, name)
        folder.mkdir()
        text = view.config_text()
        (folder / CONFIG_FILENAME).write_text(text, encoding="utf-8")
        config = parse_config(text, where=str(folder / CONFIG_FILENAME))
        for file in beside_files(store, view):
            self._keep(folder / file, store.read(f"{name}/{file}"))
        asked = self._sealing.versions
        versions = served_versions(config, view.versions) if asked is None else asked
        for version in versions:
            if version not in known:
                with store.fetch(name, version, compare=False) as source:
                    self._copy_folder(source, folder / str(version))
        for file in (
            *(signature_name(name, version) for version in versions),
            *beside_signatures((each.name for each in store.list_level().files), name),
        ):
            self._keep(self._root / file, store.read(file, limit_bytes=MAX_SIGNATURE_BYTES))
        odd = tuple(version for version in versions if not self._is_signed(version))
        good = tuple(version for version in versions if version not in odd)
        # Without a signed version, the files next to the versions are unsigned too.
        places = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if good and path.is_file())
        unsigned = tuple(f"{version}/" for version in odd)
        files = {
            place: folder / place
            for place in sorted(places)
            if place != CONFIG_FILENAME and not place.startswith(unsigned)
        }
        return SealedModel(folder, config, files, good, odd)

    def _is_signed(self, version: int) -> bool:
        """Check a copied version. Return False for one that is served already and that no key vouches for."""
        sealing = self._sealing
        try:
            if version in sealing.known:
                self._check_around(sealing.known[version])
            else:
                check_signature(self._root, self._name, version, sealing.keys)
        except RepositoryError:
            if version in sealing.served:
                return False
            raise
        return True

    def _check_around(self, folder: Path) -> None:
        """Check what is not in the folder of a version that was checked before: config.pbtxt, and what is beside it."""
        copy = open_store(self._root)
        view = changeable_model(copy, self._name)
        check_facts(with_beside(copy, view), read_manifest(folder / MANIFEST_FILENAME))
        check_beside(copy, view, self._sealing.keys)

    def _keep(self, target: Path, content: bytes | None) -> None:
        """Write a file that was read, if it was there."""
        if content is None:
            return
        self._take(len(content))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _take(self, size_bytes: int) -> None:
        if self._left is not None:
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
        with os.fdopen(descriptor, "rb", buffering=0) as file, target.open("wb") as copy:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RepositoryError(f"{source} is not a regular file", hint="Put the content itself there.")
            with contextlib.suppress(OSError):  # shares blocks if the file system can, else the loop below copies
                while count := os.copy_file_range(descriptor, copy.fileno(), _CHUNK_BYTES):
                    self._take(count)
                return
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
