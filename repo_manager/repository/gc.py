"""Removing old versions that nothing needs."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, open_repository
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.remove import Removal, reasons_to_keep, remove_selected
from repo_manager.repository.scan import existing_versions, scan
from repo_manager.repository.signing_files import drop_signatures, orphaned_signatures
from repo_manager.repository.state import ModelState, repository_lock
from repo_manager.repository.stores.staging import sweep

__all__ = ["GcResult", "check_keep", "gc", "old_versions"]


@dataclasses.dataclass(frozen=True)
class GcResult:
    """What a clean-up does, or did.

    Attributes:
        removals: one a model from which something goes.
        swept: entries that dead commands had left in the staging area; empty for a dry run.
        applied: whether it was done.
        failed: models whose configuration cannot be read, with what is wrong: nothing of them was removed, because
            nobody can say what is served.
    """

    removals: tuple[Removal, ...]
    swept: tuple[str, ...]
    applied: bool
    failed: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What is freed."""
        return sum(removal.size_bytes for removal in self.removals)


def gc(
    repository: Path,
    name: str | None = None,
    *,
    keep: int = 3,
    older_than_s: float | None = None,
    dry_run: bool = False,
) -> GcResult:
    """Remove versions that are old and that nothing needs.

    A version stays when it is among the newest `keep`, younger than `older_than_s`, served, tagged, deployed last, or
    what a roll-back goes back to. A model always keeps at least one version.

    Args:
        repository: the root.
        name: one model; `None`: all.
        keep: how many of the newest versions stay; at least 1.
        older_than_s: only versions made before that many seconds; `None`: of any age.
        dry_run: only say what would be done.

    Raises:
        RepositoryError: `keep` is below 1, or a model cannot be read.
        ConfigError: the config.pbtxt of the one model is broken. Of all models, the others are cleaned up, and
            `GcResult.failed` names it.
    """
    check_keep(keep)
    cutoff = None if older_than_s is None else datetime.datetime.now(datetime.timezone.utc).timestamp() - older_than_s
    with disk_errors(f"clean up {repository}"):
        root = open_repository(repository)
        names = [entry.name for entry in scan(root, deep=False) if entry.versions] if name is None else [name]

    def select(folder: Path, state: ModelState) -> tuple[int, ...]:
        return old_versions(folder, state, keep, cutoff)

    found: list[Removal] = []
    failed: list[str] = []
    for model in names:
        try:
            found.append(remove_selected(root, model, select, dry_run=dry_run))
        except ConfigError as exc:
            if name is not None:
                raise
            failed.append(f"{model}: {exc.message}")
    swept = () if dry_run else sweep(root)
    if not dry_run and orphaned_signatures(root):
        with disk_errors(f"clean up {repository}"), repository_lock(root):
            drop_signatures(root, orphaned_signatures(root))  # A crash came between a version and its signature.
    removals = tuple(removal for removal in found if removal.versions)
    return GcResult(removals, swept, not dry_run, tuple(failed))


def check_keep(keep: int) -> None:
    """Check how many versions are to stay.

    Raises:
        RepositoryError: none at all.
    """
    if keep < 1:
        raise RepositoryError(f"keep is {keep}; expected 1 or more", hint="Use `repo-manager remove` for whole models.")


def old_versions(folder: Path, state: ModelState, keep: int, cutoff: float | None) -> tuple[int, ...]:
    """Return the versions of a model that nothing needs and that are not among the newest.

    Args:
        folder: the model's.
        state: its record.
        keep: how many of the newest stay.
        cutoff: only versions made before, in seconds since 1970; `None`: of any age.
    """
    needed = reasons_to_keep(folder, state)
    old = existing_versions(folder)[:-keep]
    return tuple(v for v in old if v not in needed and (cutoff is None or _made_at(folder / str(v)) < cutoff))


def _made_at(path: Path) -> float:
    """When a version was made, in seconds since 1970: its manifest's word, else the folder's time."""
    if (path / MANIFEST_FILENAME).exists():
        try:
            created = read_manifest(path).created.replace("Z", "+00:00")
            return datetime.datetime.fromisoformat(created).timestamp()
        except (RepositoryError, ValueError):
            pass
    return path.stat().st_mtime
