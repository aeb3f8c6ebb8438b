"""Manifests for versions that somebody else wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.files import fsync_directory, sha256_file
from repo_manager.repository.disk import disk_errors, write_durably
from repo_manager.repository.layout import MANIFEST_FILENAME, open_repository
from repo_manager.repository.manifest import MANIFEST_SCHEMA_VERSION, FileRecord, Manifest, manifest_text
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import existing_versions, scan
from repo_manager.repository.state import change_state, now_text, repository_lock
from repo_manager.repository.stores.staging import staged
from repo_manager.repository.verify_version import list_files
from repo_manager.triton_config import CONFIG_FILENAME, ModelConfig, parse_config, served_versions
from repo_manager.triton_config.config import read_config_text

__all__ = ["Adoption", "adopt", "adopt_each", "plan_adoptions"]

_LISTED_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Adoption:
    """A version that gets a manifest.

    Attributes:
        name: the model.
        version: its number.
        manifest: what is recorded of it: what is there now.
        served: whether the policy serves it. A running server loads it again at its next load, because its folder
            changed.
        applied: whether the manifest was written.
    """

    name: str
    version: int
    manifest: Manifest
    served: bool
    applied: bool


def adopt(repository: Path, name: str | None = None, *, dry_run: bool = False) -> tuple[Adoption, ...]:
    """Write a manifest into each version that has none, from what is there now.

    Nothing else changes. The record says `"adopted": true`: where the content came from is not known.

    Args:
        repository: the root.
        name: one model; `None`: all.
        dry_run: only say what would be written.

    Raises:
        RepositoryError: no such model, or a version holds links or special files, whose content can change unseen; of
            all models, after the others were adopted.
        ConfigError: the named model's config.pbtxt is broken.
    """
    with disk_errors(f"adopt versions in {repository}"):
        root = open_repository(repository)

        def adopt_one(model: str) -> list[Adoption]:
            folder = existing_model(root, model)
            plans = plan_adoptions(folder, _record)
            return _apply(root, folder, plans) if plans and not dry_run else plans

        if name is not None:
            return tuple(adopt_one(name))
        return adopt_each([entry.name for entry in scan(root, deep=False)], adopt_one)


def adopt_each(names: Sequence[str], adopt_one: Callable[[str], list[Adoption]]) -> tuple[Adoption, ...]:
    """Adopt the versions of several models; one that cannot be does not stop the others.

    Raises:
        RepositoryError: what is wrong with the models that were left as they are.
    """
    found: list[Adoption] = []
    problems: list[str] = []
    for name in names:
        try:
            found += adopt_one(name)
        except (RepositoryError, ConfigError) as exc:
            problems.append(f"{name}: {exc.message}")
    if problems:
        raise RepositoryError(
            f"{len(problems)} of {len(names)} models cannot be adopted; " + "; ".join(problems[:_LISTED_PROBLEMS]),
            hint=f"The others are dealt with ({len(found)} versions). Mend these and adopt again.",
        )
    return tuple(found)


def plan_adoptions(folder: Path, record: Callable[[Path], FileRecord]) -> list[Adoption]:
    """Make a manifest for each version of a model that has none; nothing is written.

    Args:
        folder: the model's.
        record: a file of a version to its digest and size.

    Raises:
        RepositoryError: a version holds links or special files.
        ConfigError: config.pbtxt is broken.
    """
    path = folder / CONFIG_FILENAME
    config = parse_config(read_config_text(path), where=str(path)) if path.exists() else parse_config("")
    existing = existing_versions(folder)
    served = served_versions(config, existing)
    return [
        Adoption(
            folder.name, version, _manifest(folder / str(version), version, config, record), version in served, False
        )
        for version in existing
        if not (folder / str(version) / MANIFEST_FILENAME).exists()
    ]


def _record(file: Path) -> FileRecord:
    return FileRecord(sha256_file(file), file.stat().st_size)


def _check_encodable(name: str, path: Path) -> None:
    """Refuse a name that is no text: a manifest is.

    Raises:
        RepositoryError: its bytes are not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        raise RepositoryError(
            f"{path} holds a file whose name is not UTF-8: {name!r}", hint="Rename it; a manifest cannot name it."
        ) from exc


def _manifest(path: Path, version: int, config: ModelConfig, record: Callable[[Path], FileRecord]) -> Manifest:
    records: dict[str, FileRecord] = {}
    for name in list_files(path):
        _check_encodable(name, path)
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise RepositoryError(
                f"{file} is a link or a special file, and a manifest of it would prove nothing",
                hint="Put the content itself there.",
            )
        records[name] = record(file)
    return Manifest(
        schema_version=MANIFEST_SCHEMA_VERSION,
        model=path.parent.name,
        version=version,
        created=now_text(),
        backend=config.backend,
        precision=None,
        files=records,
        config=config.text,
        extra={"adopted": True},
    )


def _apply(root: Path, folder: Path, plans: list[Adoption]) -> list[Adoption]:
    with staged(root) as staging, repository_lock(root):
        highest = max(plan.version for plan in plans)
        change_state(root, folder.name, lambda state: state.numbered(highest), staging=staging)
        for plan in plans:
            ready = staging / f"manifest-{plan.version}"
            write_durably(ready, manifest_text(plan.manifest).encode())
            ready.rename(folder / str(plan.version) / MANIFEST_FILENAME)
            fsync_directory(folder / str(plan.version))
    return [dataclasses.replace(plan, applied=True) for plan in plans]
