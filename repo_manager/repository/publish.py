"""Publishing: a new, immutable version appears whole, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import Location, LocationLike
from repo_manager.repository.look import with_beside
from repo_manager.repository.manifest import MANIFEST_SCHEMA_VERSION, FileRecord, Manifest
from repo_manager.repository.plan.publishing import (
    check_model,
    check_names,
    check_sources,
    files_beside,
    first_config_text,
    served_after_publishing,
)
from repo_manager.repository.state import now_text
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Incoming, Progress, Store
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import ModelConfig, format_config
from repo_manager.types import as_json

__all__ = ["PublishPlan", "PublishTerms", "PublishedVersion", "plan_publish", "plan_publish_sizes", "publish"]

_FIXED_FIELDS = {"schema_version", "model", "version", "created", "backend", "files", "config", "extra"}


@dataclasses.dataclass(frozen=True)
class PublishPlan:
    """The effect of publishing now.

    Attributes:
        repository: root of the repository the version would join.
        name: model the version would belong to. It may be new.
        version: the number the version would get, unless another process takes it first.
        first: whether the model's folder and config.pbtxt would be new.
        served: whether a load after publishing would serve it (the existing policy says so).
        size_bytes: size of its files in bytes, without manifest.json and config.pbtxt.
    """

    repository: Location
    name: str
    version: int
    first: bool
    served: bool
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class PublishedVersion:
    """A published version.

    Attributes:
        repository: root of the repository it was published to.
        name: name of its model, and of the model's folder.
        version: number of the version, from 1.
        path: its folder, `ROOT/NAME/VERSION`: a path, or a place in object storage.
        manifest: its manifest.json, with size and digest of each file.
        first: whether it is the model's first version, so config.pbtxt was written with it.
        served: whether the next load of the model serves it: true for a first version, else only where the policy
            of config.pbtxt already includes it (`latest`, `all`).
    """

    repository: Location
    name: str
    version: int
    path: Location
    manifest: Manifest
    first: bool
    served: bool


@dataclasses.dataclass(frozen=True)
class PublishTerms:
    """Conditions on a version beyond its files.

    Attributes:
        expected: size and digest each file must have. The copy is compared before it becomes visible.
        config_text: for a first version, the config.pbtxt to write instead of the configuration's canonical text: a
            person's layout and comments are kept, its version policy is replaced.
        number: the number it must have. `None` takes the next one.
        claiming: asked where the number is claimed, when no other writer can come between. An exception from it ends
            the publication.
    """

    expected: Mapping[str, FileRecord] | None = None
    config_text: str | None = None
    number: int | None = None
    claiming: Callable[[], None] | None = None


def plan_publish(repository: LocationLike, name: str, files: Mapping[str, Path], config: ModelConfig) -> PublishPlan:
    """Make the checks of `publish`, and describe its effect. Nothing is written.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model to publish under. It may be new.
        files: name in the version -> path of the file.
        config: configuration of the model (config.pbtxt).

    Raises:
        RepositoryError: as `publish`.
    """
    with disk_errors(f"plan publishing {name}"):
        check_sources(files)
        return plan_publish_sizes(repository, name, {file: path.stat().st_size for file, path in files.items()}, config)


def plan_publish_sizes(
    repository: LocationLike, name: str, sizes: Mapping[str, int], config: ModelConfig, number: int | None = None
) -> PublishPlan:
    """As `plan_publish`, for files elsewhere, by their names and sizes in bytes.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model to publish under. Another than the configuration's own is refused.
        sizes: name in the version -> size in bytes.
        config: configuration of the model (config.pbtxt).
        number: number for the version. `None`: the next one.
    """
    check_names(name, sizes, config)
    store = open_store(repository, may_be_new=True)
    view = with_beside(store, store.look(name, record=True))
    first = check_model(view, config, appears_at_once=not store.traits.remote)
    version = view.number_for(number)
    served = first or served_after_publishing(view, version)
    return PublishPlan(store.location, name, version, first, served, sum(sizes.values()))


def publish(
    repository: LocationLike,
    name: str,
    files: Mapping[str, Path],
    config: ModelConfig,
    details: Mapping[str, Any],
    terms: PublishTerms | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> PublishedVersion:
    """Publish a model's next version.

    The files are brought into the store, each compared with its expected digest, and their manifest last. Only then
    the version becomes visible: Triton, `scan` and rsync see all of it or none of it. For a model's first version a
    config.pbtxt for just this version comes along. Later the existing config.pbtxt stays as it is. A number is given
    out once, also when the version is removed again. In object storage a repeated command does not send again the
    files an interrupted one has brought.

    Args:
        repository: the root. A folder is made when it does not exist.
        name: model to publish under. A new one gets a folder of this name.
        files: path inside the version -> file to copy. `config.model_filename` must be among them.
        config: for a first version, written (with its labels), else compared with the existing one.
        details: more fields of the manifest: precision, source, conversion, sparsity, golden, tools, machine, others.
        terms: conditions beyond the files: a number, digests, details. `None`: none.
        progress: called with the number of new bytes as they arrive. `None`: nothing is reported.

    Returns:
        The version. Another process may already have published the one after it.

    Raises:
        RepositoryError: a name is not valid, the configuration does not fit the existing model, or the store refuses.
            Nothing of the version is then visible in the repository.
        ConfigError: the existing config.pbtxt is broken.
    """
    terms = terms or PublishTerms()
    with disk_errors(f"publish {name}"):
        check_sources(files)
        check_names(name, files, config)  # before a root is created: a rejected name leaves nothing behind
        store = open_store(repository, may_be_new=True)

        told = progress or (lambda _: None)
        arrived = store.publish_version(_incoming(store, name, files, config, details, terms, told))
    return PublishedVersion(
        repository=store.location,
        name=name,
        version=arrived.version,
        path=store.location / name / str(arrived.version),
        manifest=arrived.manifest,
        first=arrived.first,
        served=served_after_publishing(arrived.view, arrived.version),
    )


def _incoming(
    store: Store,
    name: str,
    files: Mapping[str, Path],
    config: ModelConfig,
    details: Mapping[str, Any],
    terms: PublishTerms,
    progress: Progress,
) -> Incoming:
    """Describe the content for the store, and the checks on its arrival."""

    def check(view: ModelView) -> bool:
        return check_model(with_beside(store, view), config, appears_at_once=not store.traits.remote)

    return Incoming(
        name=name,
        files={file: Path(path) for file, path in files.items()},
        expected=terms.expected,
        beside=files_beside(config),
        identity=config.backend,
        check=check,
        manifest=lambda version, records: _manifest(name, version, config, records, details),
        first_config=lambda version: first_config_text(version, config, terms.config_text).encode(),
        progress=progress,
        number=terms.number,
        claiming=terms.claiming,
    )


def _manifest(
    name: str, version: int, config: ModelConfig, records: Mapping[str, FileRecord], details: Mapping[str, Any]
) -> Manifest:
    """Put a version's record together.

    Raises:
        RepositoryError: `details` sets a field other than its own.
    """
    values = {key: as_json(value) for key, value in details.items()}
    clash = _FIXED_FIELDS & set(values)
    if clash:
        raise RepositoryError(f"details may not set {', '.join(sorted(clash))}: publish does")
    known = {field.name for field in dataclasses.fields(Manifest)}
    return Manifest(
        schema_version=MANIFEST_SCHEMA_VERSION,
        model=name,
        version=version,
        created=now_text(),
        backend=config.backend,
        files=dict(records),
        config=format_config(config),
        precision=values.pop("precision", None),
        extra={key: values.pop(key) for key in list(values) if key not in known},
        **values,
    )
