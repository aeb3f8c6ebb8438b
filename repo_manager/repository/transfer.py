"""Copying a version to another repository (or name), on disk or in object storage; every byte checked on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.anywhere import find_model, plan_publish, publish
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.dispatch import by_location
from repo_manager.repository.layout import open_repository, validate_model_name
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import ModelEntry, existing_versions
from repo_manager.repository.transfer_parts import (
    Source,
    Transfer,
    check_whole,
    copied_details,
    identical_version,
    source_config,
)
from repo_manager.repository.verify_version import list_files

__all__ = ["Transfer", "copy_version"]


def copy_version(
    source: Location,
    name: str,
    version: int,
    target: Location,
    *,
    target_name: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Transfer:
    """Copy a version to another repository as a new version there, staging -> production for instance.

    Each file is compared with the source's manifest as it is read and again as it was written, before anything
    becomes visible. The new manifest keeps the old one's story and says where it came from. A first version takes
    the source's config.pbtxt along as a person wrote it. Copying what the target has already does nothing. What an
    interrupted copy from or to object storage has brought is not sent again.

    Args:
        source: the repository to copy from.
        name: the model there.
        version: its version there.
        target: the repository to copy to; a folder is made when it does not exist. May be `source` with another
            `target_name`.
        target_name: the model's name there; `None`: the same.
        dry_run: only say what would be done.
        progress: told the bytes that have arrived, those fetched and those sent.

    Raises:
        RepositoryError: no such version, it has no manifest, its files are not what the manifest says, or the target
            serves something else under that name.
    """
    new_name = validate_model_name(name if target_name is None else target_name)
    with disk_errors(f"copy {name}:{version}"):
        found = _look(source, name, version, new_name)
        check_whole(found.present, found.manifest, f"{name}:{version}")
        twin = identical_version(_model_there(target, new_name), found.manifest)
        size_bytes = found.manifest.size_bytes
        made = Transfer(f"{name}:{version}", new_name, twin or 0, twin is not None, size_bytes, None)
        if twin is not None:
            return made
        if dry_run:
            with _named_files(source, name, version, found) as files:
                plan = plan_publish(target, new_name, files, found.config)
            return dataclasses.replace(made, version=plan.version)
        with _content(source, name, version, found, progress) as folder:
            published = publish(
                target,
                new_name,
                {file: folder / file for file in found.present},
                found.config,
                copied_details(found.manifest, found.place),
                expected=found.manifest.files,
                config_text=found.text,
                progress=progress,
            )
    return dataclasses.replace(made, version=published.version, published=published)


def _look_on_disk(source: Path, name: str, version: int, new_name: str) -> Source:
    root = open_repository(source)
    folder = existing_model(root, name)
    if version not in existing_versions(folder):
        raise RepositoryError(f"model {name!r} in {source} has no version {version}")
    path = folder / str(version)
    return Source(read_manifest(path), list_files(path), *source_config(folder, new_name), root.name)


_look = by_location(_look_on_disk, "source.look")


def _model_there(target: Location, name: str) -> ModelEntry | None:
    if isinstance(target, Path) and not (target / name).is_dir():
        return None
    try:
        return find_model(target, name)
    except RepositoryError as exc:
        if "has no model" in exc.message:
            return None
        raise


@contextlib.contextmanager
def _named_files(source: Location, name: str, version: int, found: Source) -> Iterator[dict[str, Path]]:
    """Give the version's files for a plan; from object storage only files of the right names and sizes."""
    if isinstance(source, Path):
        folder = open_repository(source) / name / str(version)
        yield {file: folder / file for file in found.present}
        return
    with tempfile.TemporaryDirectory(prefix="repo-manager-objects-") as place:
        files = {file: Path(place) / file for file in found.present}
        for file, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as empty:
                empty.truncate(found.manifest.files[file].size_bytes)
        yield files


def _content_on_disk(
    source: Path, name: str, version: int, found: Source, progress: Callable[[int], None] | None
) -> contextlib.AbstractContextManager[Path]:
    return contextlib.nullcontext(open_repository(source) / name / str(version))


_content = by_location(_content_on_disk, "source.content")
