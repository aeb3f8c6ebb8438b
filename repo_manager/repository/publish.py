"""Publishing: a new, immutable version appears by one rename, or nothing does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory, sha256_file
from repo_manager.repository.disk import copy_durably, disk_errors, write_durably
from repo_manager.repository.layout import (
    MANIFEST_FILENAME,
    check_file_name,
    is_folder,
    model_path,
    open_repository,
    triton_version,
    validate_model_name,
)
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import (
    MANIFEST_SCHEMA_VERSION,
    FileRecord,
    Manifest,
    manifest_text,
)
from repo_manager.repository.publish_checks import check_arguments, check_early, check_model
from repo_manager.repository.state import change_state, now_text, read_state, repository_lock
from repo_manager.repository.stores.staging import staged
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    VARIANTS_FOLDER,
    ModelConfig,
    format_config,
    read_config,
    replace_version_policy,
    served_versions,
    with_version_policy,
)
from repo_manager.triton_config.labels import labels_text
from repo_manager.types import as_json

__all__ = [
    "PublishPlan",
    "PublishedVersion",
    "first_config_text",
    "make_manifest",
    "plan_publish",
    "publish",
    "used_numbers",
]

_FIXED_FIELDS = {"schema_version", "model", "version", "created", "backend", "files", "config", "extra"}


@dataclasses.dataclass(frozen=True)
class PublishPlan:
    """What publishing would do now.

    Attributes:
        repository: the root.
        name: the model.
        version: the number that the version would get, unless another process takes it first.
        first: whether the model's folder and config.pbtxt would be new.
        served: whether a load after publishing would serve it (the existing policy says so).
        size_bytes: what it would occupy.
    """

    repository: Location
    name: str
    version: int
    first: bool
    served: bool
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class PublishedVersion:
    """A version that now exists.

    Attributes:
        repository: the root.
        name: the model.
        version: its number.
        path: its folder.
        manifest: its record.
        first: whether it is the model's first version, with which config.pbtxt was written.
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


def plan_publish(repository: Path, name: str, files: Mapping[str, Path], config: ModelConfig) -> PublishPlan:
    """Check everything that `publish` checks, and say what it would do; nothing is written.

    Raises:
        RepositoryError: as `publish`.
    """
    with disk_errors(f"plan publishing {name}"):
        check_arguments(name, files, config)
        root = Path(repository).expanduser().resolve()
        if root.exists():
            root = open_repository(root)
        folder = model_path(root, name)
        first = check_model(folder, name, config)
        version = _next_version(root, name)
        served = first or version in served_versions(read_config(folder), (*used_numbers(folder), version))
        size_bytes = sum(path.stat().st_size for path in files.values())
        return PublishPlan(root, name, version, first, served, size_bytes)


def publish(
    repository: Path,
    name: str,
    files: Mapping[str, Path],
    config: ModelConfig,
    details: Mapping[str, Any],
    *,
    expected: Mapping[str, FileRecord] | None = None,
    config_text: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PublishedVersion:
    """Publish a model's next version.

    The files are copied to a staging folder on the repository's file system, with their manifest, made durable, and
    renamed into place: Triton, `scan` and rsync see all of the version or none of it. For a model's first version the
    whole folder appears at once, with a config.pbtxt that serves just this version; later the existing config.pbtxt
    stays as it is. A number is given out once, also when the version is removed again.

    Args:
        repository: the root; made when it does not exist.
        name: the model.
        files: path inside the version -> file to copy. `config.model_filename` must be among them.
        config: for a first version, written (with its labels); else compared with the existing one.
        details: more fields of the manifest: precision, source, conversion, sparsity, golden, tools, machine, others.
        expected: what each file must be; the staged copies are read back and compared before they become visible.
        config_text: for a first version, the config.pbtxt to write instead of `config`'s canonical text: a person's
            layout and comments are kept, its version policy is replaced.
        progress: told the bytes that have arrived, as they do.

    Returns:
        The version. Another process may already have published the one after it.

    Raises:
        RepositoryError: a name is not valid, the configuration does not fit the existing model, or the disk refuses.
            Nothing of the version is then in the repository.
        ConfigError: the existing config.pbtxt is broken.
    """
    with disk_errors(f"publish {name}"):
        validate_model_name(name)  # Before the root is made: a refused name leaves nothing behind.
        check_arguments(name, files, config)
        root = open_repository(repository, create=True)
        check_early(model_path(root, name), name, config)
        with staged(root) as staging:
            content = staging / "version"
            records = _stage_files(content, files, progress or (lambda _: None))
            if expected is not None:
                _check_copies(content, records, expected)
            with repository_lock(root):
                folder = model_path(root, name)
                first = check_model(folder, name, config)
                version = _next_version(root, name)
                manifest = make_manifest(name, version, config, records, details)
                write_durably(content / MANIFEST_FILENAME, manifest_text(manifest).encode())
                fsync_directory(content)
                change_state(root, name, lambda state: state.numbered(version), staging=staging)
                if first:
                    _place_first(folder, staging, version, config, config_text)
                else:
                    content.rename(folder / str(version))
                    fsync_directory(folder)
                served = version in served_versions(read_config(folder), used_numbers(folder))
    return PublishedVersion(root, name, version, folder / str(version), manifest, first, served)


def used_numbers(folder: Path) -> tuple[int, ...]:
    """Return every version that Triton would see, and so every number that is in use."""
    if not folder.is_dir():
        return ()
    found = [triton_version(entry.name) for entry in os.scandir(folder) if is_folder(entry)]
    return tuple(sorted({number for number in found if number is not None}))


def _next_version(root: Path, name: str) -> int:
    return max(0, read_state(root, name).highest_version, *used_numbers(root / name)) + 1


def _stage_files(content: Path, files: Mapping[str, Path], progress: Callable[[int], None]) -> dict[str, FileRecord]:
    content.mkdir()
    records: dict[str, FileRecord] = {}
    for name, source in sorted(files.items()):
        target = content / name
        target.parent.mkdir(parents=True, exist_ok=True)
        records[name] = FileRecord(*copy_durably(Path(source), target))
        progress(records[name].size_bytes)
    for directory, _, _ in os.walk(content, topdown=False):
        fsync_directory(Path(directory))
    return records


def make_manifest(
    name: str, version: int, config: ModelConfig, records: Mapping[str, FileRecord], details: Mapping[str, Any]
) -> Manifest:
    """Put a version's record together.

    Raises:
        RepositoryError: `details` sets a field that is not its own.
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


def _check_copies(content: Path, records: Mapping[str, FileRecord], expected: Mapping[str, FileRecord]) -> None:
    for name in sorted({*records, *expected}):
        found = FileRecord(sha256_file(content / name), (content / name).stat().st_size) if name in records else None
        if found != expected.get(name):
            raise RepositoryError(
                f"{name} was to be {expected.get(name)}, and the copy is {found}",
                hint="The source or a disk is damaged; `repo-manager verify` the source.",
            )


def first_config_text(version: int, config: ModelConfig, config_text: str | None) -> str:
    """Return the config.pbtxt of a model whose first version is the only one to be served.

    Args:
        version: the version.
        config: the configuration.
        config_text: a text to keep instead of its canonical one, but for the policy.
    """
    if config_text is not None:
        return replace_version_policy(config_text, (version,), where=CONFIG_FILENAME)
    return format_config(with_version_policy(config, (version,)))


def _place_first(folder: Path, staging: Path, version: int, config: ModelConfig, config_text: str | None) -> None:
    """Put the whole model together and rename it into the root (over an empty folder, if there is one)."""
    model = staging / "model"
    model.mkdir()
    (staging / "version").rename(model / str(version))
    write_durably(model / CONFIG_FILENAME, first_config_text(version, config, config_text).encode())
    for name, labels in config.labels.items():
        write_durably(model / check_file_name(name), labels_text(labels).encode())
    if config.variants:
        variants = model / VARIANTS_FOLDER
        variants.mkdir()
        for name, variant in config.variants.items():
            write_durably(variants / check_file_name(f"{name}.pbtxt"), variant.encode())
        fsync_directory(variants)
    fsync_directory(model)
    model.rename(folder)
    fsync_directory(folder.parent)
