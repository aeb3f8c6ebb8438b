"""What copying a version needs, wherever it is copied from and to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.files import read_regular
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.publish import PublishedVersion
from repo_manager.repository.scan import ModelEntry
from repo_manager.triton_config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config, same_signature
from repo_manager.triton_config.config import read_config_text
from repo_manager.triton_config.text_fields import replace_field

__all__ = ["Source", "Transfer", "check_whole", "copied_details", "identical_version", "source_config"]

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


@dataclasses.dataclass(frozen=True)
class Source:
    """What is copied, before its files are here.

    Attributes:
        manifest: of the version.
        present: names of its files.
        text: config.pbtxt, renamed.
        config: the same, with labels and variants.
        place: the repository's own name.
    """

    manifest: Manifest
    present: tuple[str, ...]
    text: str
    config: ModelConfig
    place: str


def check_whole(present: tuple[str, ...], manifest: Manifest, what: str) -> None:
    """Check that a version holds the files that its manifest lists, and no others.

    Raises:
        RepositoryError: it does not.
    """
    if set(present) != set(manifest.files):
        odd = ", ".join(sorted(set(present) ^ set(manifest.files)))
        raise RepositoryError(
            f"{what} does not hold what its manifest says: {odd}", hint="`repo-manager verify` shows all of it."
        )


def source_config(folder: Path, name: str) -> tuple[str, ModelConfig]:
    """Return the source's config.pbtxt, renamed, as text and parsed, with its labels and its variants.

    Raises:
        ConfigError: it is broken.
        OSError: it cannot be read.
    """
    text = _renamed(folder / CONFIG_FILENAME, name)
    config = parse_config(text, where=str(folder / CONFIG_FILENAME))
    labels: dict[str, tuple[str, ...]] = {}
    for file in config.label_filenames:
        labels[file] = tuple(read_regular(folder / file).decode().splitlines())
    variants = {path.stem: _renamed(path, name) for path in sorted((folder / VARIANTS_FOLDER).glob("*.pbtxt"))}
    return text, dataclasses.replace(config, labels=labels, variants=variants)


def _renamed(path: Path, name: str) -> str:
    text = read_config_text(path)
    if parse_config(text, where=str(path)).name in ("", name):
        return text
    return replace_field(text, "name", f'name: "{name}"', where=str(path))


def identical_version(model: ModelEntry | None, manifest: Manifest) -> int | None:
    """Return a model's newest version of the same content, served in the same way; `None` when there is none."""
    for entry in reversed(() if model is None else model.versions):
        found = entry.manifest
        if found is None or found.digest != manifest.digest:
            continue
        if not same_signature(parse_config(found.config), parse_config(manifest.config)):
            return entry.version
    return None


def copied_details(manifest: Manifest, origin_name: str) -> dict[str, Any]:
    """Return the fields of the copy's manifest: the source's story, and where it came from."""
    details = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in _OWN_FIELDS
    }
    origin = {
        "repository": origin_name,  # Its name, not its path: a manifest travels.
        "model": manifest.model,
        "version": manifest.version,
        "created": manifest.created,
        "digest": manifest.digest,
    }
    return {**details, **manifest.extra, "copied_from": origin}
