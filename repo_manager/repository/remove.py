"""Taking versions out: one, a whole model, or the old and unused ones."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.ensembles import ensembles_in, with_dependents
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import LocationLike
from repo_manager.repository.look import changeable_model, walk, with_versions
from repo_manager.repository.plan.removal import Removal, forget, made_at, old_versions, plan_removal, select_version
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Departure, RepairKind, Store, mended, model_names
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import ModelConfig

__all__ = ["GcResult", "gc", "remove"]


@dataclasses.dataclass(frozen=True)
class GcResult:
    """A clean-up, planned or done.

    Attributes:
        removals: one entry per affected model.
        swept: leftovers of dead commands, a name each. Empty for a dry run.
        applied: whether it was done. False for a dry run.
        failed: models with an unreadable configuration, with its fault: nothing of them was removed, because their
            served versions are unknown.
    """

    removals: tuple[Removal, ...]
    swept: tuple[str, ...]
    applied: bool
    failed: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Space freed, in bytes."""
        return sum(removal.size_bytes for removal in self.removals)


def remove(
    repository: LocationLike, name: str, version: int | None = None, *, force: bool = False, dry_run: bool = False
) -> Removal:
    """Remove one version, or a whole model.

    A version is gone for every reader at one moment. Its number is not given out again. A running server keeps its
    loaded versions until the next load or unload.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model to remove, or to take a version from. A symbolic link is refused.
        version: its number. `None`: the model with all its versions.
        force: also when it is served, tagged, a roll-back version or needed by an ensemble. A served version is taken
            out of the policy first.
        dry_run: only check and return the plan, with its size. Nothing is removed.

    Raises:
        RepositoryError: no such model or version, or it is in use, or nothing else would be left to serve.
    """
    with disk_errors(f"remove versions of {name}"):
        store = open_store(repository)

        def select(view: ModelView) -> tuple[int, ...]:
            return select_version(view, version)

        return _remove_selected(store, name, select, whole=version is None, force=force, dry_run=dry_run)


def gc(
    repository: LocationLike,
    name: str | None = None,
    *,
    keep: int = 3,
    older_than_s: float | None = None,
    dry_run: bool = False,
) -> GcResult:
    """Remove old, unused versions, and the leftovers of interrupted commands.

    A version stays when it is among the newest `keep`, younger than `older_than_s`, served, tagged, deployed last, the
    aim of a roll-back, or pinned by an ensemble. A model always keeps at least one version.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the one model to clean up. `None`: all, except for those with a broken config.pbtxt.
        keep: how many of the newest versions stay. At least 1.
        older_than_s: only versions older than this, in seconds. `None`: of any age.
        dry_run: only list the removals. `swept` then stays empty.

    Raises:
        RepositoryError: `keep` is below 1, or a model cannot be read.
        ConfigError: the config.pbtxt of the one model is broken. Of all models, the others are cleaned up, and
            `GcResult.failed` names it.
    """
    if keep < 1:
        raise RepositoryError(f"keep is {keep}; expected 1 or more", hint="Use `repo-manager remove` for whole models.")
    cutoff = None if older_than_s is None else datetime.datetime.now(datetime.timezone.utc).timestamp() - older_than_s
    found: list[Removal] = []
    failed: list[str] = []
    with disk_errors(f"clean up {repository}"):
        store = open_store(repository)
        names = model_names(store) if name is None else (name,)
        swept = () if dry_run else mended(store, names, RepairKind.REST, RepairKind.REMOVAL)

        def select(view: ModelView) -> tuple[int, ...]:
            old = old_versions(view, keep)  # `_planned` gives a view with the dependent ensembles
            if cutoff is None:
                return old
            contents = with_versions(store, view, old).contents
            return tuple(version for version in contents if made_at(contents[version]) < cutoff)

        ensembles = ensembles_in(store)
        for model in names:
            view = store.look(model)
            if not view.versions and (name is None or (swept and not view.exists)):
                continue  # only leftovers, now removed
            try:
                found.append(_remove_selected(store, model, select, dry_run=dry_run, ensembles=ensembles))
            except ConfigError as exc:
                if name is not None:
                    raise
                failed.append(f"{model}: {exc.message}")
    removals = tuple(removal for removal in found if removal.versions)
    return GcResult(removals, swept, not dry_run, tuple(failed))


def _remove_selected(
    store: Store,
    name: str,
    select: Callable[[ModelView], tuple[int, ...]],
    *,
    whole: bool = False,
    force: bool = False,
    dry_run: bool = False,
    ensembles: Mapping[str, ModelConfig] | None = None,
) -> Removal:
    """Remove the versions named by `select`. On a disk it is asked under the repository's lock."""
    ensembles = ensembles_in(store) if ensembles is None else ensembles

    def planned(ensembles: Mapping[str, ModelConfig]) -> tuple[Removal, ModelView]:
        view = with_dependents(store, changeable_model(store, name, record=True), ensembles)
        return _planned(store, view, select(view), whole, force)

    if dry_run:
        return planned(ensembles)[0]
    mended(store, (name,), RepairKind.REMOVAL)  # Finish an earlier removal first.
    with store.exclusive(name):
        plan, view = planned(ensembles)
        if plan.versions or plan.whole_model:
            plan, view = planned(ensembles_in(store))  # an ensemble may have been added since
        if plan.versions or plan.whole_model:
            highest = max((*plan.versions, *view.versions), default=0)
            departure = Departure(
                view,
                plan.versions,
                plan.whole_model,
                force,
                lambda state: forget(state, plan.versions, highest, whole=plan.whole_model),
            )
            store.discard_versions(departure)
    return dataclasses.replace(plan, applied=True)


def _planned(
    store: Store, view: ModelView, versions: tuple[int, ...], whole: bool, force: bool
) -> tuple[Removal, ModelView]:
    """Return the removal of a model's versions with its size, and the view with their contents."""
    plan = plan_removal(view, versions, whole=whole, force=force)
    if plan.whole_model:
        size_bytes = sum(entry.size_bytes for entry in walk(store, view.name)[0])
        return dataclasses.replace(plan, size_bytes=size_bytes), with_versions(store, view, plan.versions)
    view = with_versions(store, view, plan.versions)
    size_bytes = sum(view.contents[version].size_bytes for version in plan.versions if version in view.contents)
    return dataclasses.replace(plan, size_bytes=size_bytes), view
