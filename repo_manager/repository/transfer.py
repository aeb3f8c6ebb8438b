"""Copying a version to another repository (or name), every byte checked on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import open_repository
from repo_manager.repository.manifest import Manifest, read_manifest
from repo_manager.repository.policy import existing_model
from repo_manager.repository.publish import PublishedVersion, plan_publish, publish
from repo_manager.repository.scan import existing_versions, find_model
from repo_manager.repository.verify_version import list_files
from repo_manager.triton_config import CONFIG_FILENAME, ModelConfig, parse_config, same_signature
from repo_manager.triton_config.config import read_config_text
from repo_manager.triton_config.text_fields import replace_field

__all__ = ["Transfer", "copy_version"]

_OWN_FIELDS = ("schema_version", "model", "version", "created", "backend", "files", "config", "extra")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy, done or planned.

    Attributes:
        source: `NAME:VERSION` in the source repository.
        name: the model in the target repository.
        version: its number there; for a dry run, what it would be now.
        identical: the target already has a version of the same content, and `version` is that one.
        size_bytes: what was or would be copied.
        published: the new version; `None` when nothing was copied.
    """

    source: str
    name: str
    version: int
    identical: bool
    size_bytes: int
    published: PublishedVersion | None


def copy_version(
    source: Path, name: str, version: int, target: Path, *, target_name: str | None = None, dry_run: bool = False
) -> Transfer:
    """Copy a version to another repository as a new version there, staging -> production for instance.

    Each file is compared with the source's manifest as it is read and again as it was written, before anything
    becomes visible. The new manifest keeps the old one's story and says where it came from. A first version takes
    the source's config.pbtxt along as a person wrote it. Copying what the target has already does nothing.

    Args:
        source: the repository to copy from.
        name: the model there.
        version: its version there.
        target: the repository to copy to; made when it does not exist. May be `source` with another `target_name`.
        target_name: the model's name there; `None`: the same.
        dry_run: only say what would be done.

    Raises:
        RepositoryError: no such version, it has no manifest, its files are not what the manifest says, or the target
            serves something else under that name.
    """
    new_name = name if target_name is None else target_name
    with disk_errors(f"copy {name}:{version}"):
        root = open_repository(source)
        folder = existing_model(root, name)
        if version not in existing_versions(folder):
            raise RepositoryError(f"model {name!r} in {source} has no version {version}")
        path = folder / str(version)
        manifest = read_manifest(path)
        present = list_files(path)
        if set(present) != set(manifest.files):
            odd = ", ".join(sorted(set(present) ^ set(manifest.files)))
            raise RepositoryError(
                f"{name}:{version} does not hold what its manifest says: {odd}",
                hint="`repo-manager verify` shows all of it.",
            )
        text, config = _configuration(folder, new_name)
        twin = _identical(target, new_name, manifest)
    files = {file: path / file for file in present}
    made = Transfer(f"{name}:{version}", new_name, twin or 0, twin is not None, manifest.size_bytes, None)
    if twin is not None:
        return made
    if dry_run:
        return dataclasses.replace(made, version=plan_publish(target, new_name, files, config).version)
    details = _details(manifest, root)
    published = publish(target, new_name, files, config, details, expected=manifest.files, config_text=text)
    return dataclasses.replace(made, version=published.version, published=published)


def _configuration(folder: Path, name: str) -> tuple[str, ModelConfig]:
    """Return the source's config.pbtxt, renamed, as text and parsed, with its labels."""
    path = folder / CONFIG_FILENAME
    text = read_config_text(path)
    if parse_config(text, where=str(path)).name not in ("", name):
        text = replace_field(text, "name", f'name: "{name}"', where=str(path))
    config = parse_config(text, where=str(path))
    labels: dict[str, tuple[str, ...]] = {}
    for file in config.label_filenames:
        labels[file] = tuple((folder / file).read_text(encoding="utf-8").splitlines())
    return text, dataclasses.replace(config, labels=labels)


def _identical(target: Path, name: str, manifest: Manifest) -> int | None:
    """Return the target's newest version of the same content, served in the same way."""
    if not (Path(target) / name).is_dir():
        return None
    for entry in reversed(find_model(target, name).versions):
        found = entry.manifest
        if found is None or found.digest != manifest.digest:
            continue
        if not same_signature(parse_config(found.config), parse_config(manifest.config)):
            return entry.version
    return None


def _details(manifest: Manifest, root: Path) -> dict[str, Any]:
    details = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in _OWN_FIELDS
    }
    origin = {
        "repository": root.name,  # Its name, not its path: a manifest travels.
        "model": manifest.model,
        "version": manifest.version,
        "created": manifest.created,
        "digest": manifest.digest,
    }
    return {**details, **manifest.extra, "copied_from": origin}
