"""Snapshots for GitOps: written here, named in a repository of manifests, rolled out by Argo CD or Flux."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repo_manager.errors import RepositoryError
from repo_manager.repository.location import Location
from repo_manager.repository.scan import scan
from repo_manager.rollout.checks import Check, check_version, refuse
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.rollout_context import Change, Report, RolloutContext
from repo_manager.rollout.targets.snapshot import check_relatives, models_after, models_served
from repo_manager.rollout.targets.snapshot_files import SnapshotModel, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import snapshots_beside

__all__ = ["Pin", "pin_snapshot"]

_PLACE = "what is pinned"


@dataclasses.dataclass(frozen=True)
class Pin:
    """A snapshot, and the names that lead to it.

    Attributes:
        id: digest of its content: 16 hexadecimal digits, the last part of `url`.
        url: of the snapshot, as the pods see it: the chart's `repository.snapshot`, or KServe's `storageUri`.
        repository: of the repository, as the pods see it: the chart's `repository.url`.
        models: model -> the versions it holds.
        previous: URL of the snapshot pinned before. `None` for the first one.
        before: model -> the versions pinned before. The versions the policies serve where nothing was pinned.
        created: whether it was written now, or was there already.
        checks: findings about the pinned versions, warnings included. None of them stopped the pinning.
        dry_run: true when the snapshot was only named, not written.
    """

    id: str
    url: str
    repository: str
    models: Mapping[str, tuple[int, ...]]
    previous: str | None
    before: Mapping[str, tuple[int, ...]]
    created: bool
    checks: tuple[Check, ...]
    dry_run: bool

    @property
    def values(self) -> dict[str, dict[str, str]]:
        """The chart's values for it."""
        return {"repository": {"url": self.repository, "snapshot": self.url}}


def pin_snapshot(
    repository: Location,
    versions: Mapping[str, int],
    *,
    mounted: str | None = None,
    pinned: str | None = None,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> Pin:
    """Write the snapshot with some versions, beside everything pinned already.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        versions: model -> the version it is to have. Empty takes every model, as its policy serves it.
        mounted: the repository's URL or path, as the pods see it. `None`: as this machine does.
        pinned: URL of the snapshot pinned now. Its other models stay as they are. `None`: the other models are taken
            as the repository's policies serve them.
        options: `signed_by`, `keep_previous`, `drop_pinned`, `force` and `dry_run` count. `None` takes the defaults.
        report: called with a line of text for each step.

    Raises:
        RepositoryError: no such model or version, a check speaks against one, the pinned snapshot cannot be read, the
            repository serves nothing, or the snapshot cannot be written.
    """
    options = RolloutOptions() if options is None else options
    repository = repository.resolve()
    url = (str(repository) if mounted is None else mounted).rstrip("/")
    snapshots = snapshots_beside(url)
    held, source = models_served(repository, pinned or url, snapshots, _PLACE)
    if versions:
        models, checks = _with(repository, held, source, versions, options=options, report=report)
    else:
        models, checks = _all(repository, options)
    root = snapshots_of(repository)
    made = write_snapshot(root, models, signed_by=options.signed_by, dry_run=options.dry_run)
    state = "written" if made.created else "not written: dry run" if options.dry_run else "there already"
    report(f"snapshot {made.id}: {state}")
    where = f"{snapshots}/{made.id}"
    return Pin(made.id, where, url, made.models, pinned, held, made.created, checks, options.dry_run)


def _with(
    repository: Location,
    held: Mapping[str, tuple[int, ...]],
    source: Location,
    versions: Mapping[str, int],
    *,
    options: RolloutOptions,
    report: Report,
) -> tuple[tuple[SnapshotModel, ...], tuple[Check, ...]]:
    """Put versions in the place of those held, one model after the other. Check each as `deploy` does."""
    found = {name: SnapshotModel(name, numbers, source) for name, numbers in held.items()}
    contexts = [RolloutContext(repository, Change(*each), options, report) for each in versions.items()]
    for context in contexts:
        now = {each.name: each.versions for each in found.values()}
        after = models_after(context, now, source)
        new = [each for each in after if each.name == context.name or each.versions != now.get(each.name)]
        found |= {each.name: each for each in new}
    serving = {each.name: each.versions for each in found.values()}
    checks: tuple[Check, ...] = ()
    for context in contexts:
        name, version = context.name, context.version
        spoken = check_version(repository, context.entry, version, signed_by=options.signed_by, serving=serving)
        spoken += context.check_pinned(held.get(name, ()), serving[name])
        spoken += check_relatives(context, tuple(found.values()), "the snapshot")
        refuse(context.what, spoken, options)
        checks += spoken
    return tuple(found.values()), checks


def _all(repository: Location, options: RolloutOptions) -> tuple[tuple[SnapshotModel, ...], tuple[Check, ...]]:
    """Take every model as its policy serves it. Check each version served.

    Raises:
        RepositoryError: none is served, or a check speaks against one.
    """
    entries = [entry for entry in scan(repository) if entry.selected]
    if not entries:
        raise RepositoryError(f"{repository} serves no version of any model", hint="Name some: NAME:VERSION.")
    checks: tuple[Check, ...] = ()
    for entry in entries:
        for version in entry.selected:
            spoken = check_version(repository, entry, version, signed_by=options.signed_by)
            refuse(f"{entry.name}:{version}", spoken, options)
            checks += spoken
    return tuple(SnapshotModel(entry.name, entry.selected, repository) for entry in entries), checks
