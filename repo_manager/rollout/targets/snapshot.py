"""The models a cluster serves, and those of a roll-out's snapshot, with their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repo_manager.errors import RepositoryError
from repo_manager.repository.ensembles import ensembles_in
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.stores import open_store
from repo_manager.rollout.checks import Check, CheckOutcome, check_needed
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.snapshot_files import Snapshot, SnapshotModel, read_snapshot, snapshots_of
from repo_manager.rollout.targets.template import is_snapshot
from repo_manager.triton_config.ensembles import dependents_of, is_ensemble, models_needed_by, pinned_versions

__all__ = [
    "check_leaving",
    "check_relatives",
    "models_after",
    "models_served",
    "snapshot_behind",
    "versions_brought",
    "versions_needed",
]


def snapshot_behind(repository: Location, url: str, served_by: str) -> Snapshot:
    """Read the snapshot a cluster serves, from beside the repository.

    Args:
        repository: the repository, as this machine sees it.
        url: the snapshot's, as the cluster sees it.
        served_by: address of the target, for the message.

    Raises:
        RepositoryError: it is missing or damaged: the other models' versions are unknown, and must not change.
    """
    root = snapshots_of(repository)
    found = read_snapshot(root, url.rstrip("/").rpartition("/")[2])
    if found is None:
        raise RepositoryError(
            f"{served_by} serves the snapshot {url}, and {root} does not have it, so the versions of its other models "
            "are not known",
            hint="Give --repository its source repository; the snapshots are beside it.",
        )
    return found


def models_served(
    repository: Location, url: str, snapshots: str, served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Mapping[str, tuple[int, ...]], Location]:
    """Return a cluster's models, model -> versions, and the place of their files.

    A snapshot's models are read from the snapshot: annotations are copied, restored and edited by others. A cluster on
    the repository itself has the versions its policies select.

    Args:
        repository: the repository, as this machine sees it.
        url: the snapshot or repository as the cluster addresses it.
        snapshots: where snapshots are, as the cluster sees them.
        served_by: address of the target, named when its snapshot cannot be read.
        load: the models loaded of the repository itself, or `*`.

    Raises:
        RepositoryError: the served snapshot cannot be read.
    """
    if is_snapshot(url, snapshots):
        held = snapshot_behind(repository, url, served_by)
        return held.models, held.location
    entries = scan(repository, deep=False)
    named = set(load)
    if "*" not in load:
        ensembles = ensembles_in(open_store(repository))
        named.update(part for each in load for part in models_needed_by(ensembles, each))
    wanted = [entry for entry in entries if "*" in load or entry.name in named]
    return {entry.name: entry.selected for entry in wanted if entry.selected}, repository


def check_leaving(
    context: RolloutContext, held: Mapping[str, tuple[int, ...]], served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Check, ...]:
    """Check whether a cluster can do without a model or a version.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        held: the cluster's models, model -> versions.
        served_by: address of the target, named in the refusals.
        load: the models its pods name to load, or `*`.
    """
    name, before = context.name, held.get(context.name, ())
    after = context.remaining(before)
    if after or not before:
        return context.check_pinned(before, after)
    needed = check_needed(context.what, [each for each in dependents_of(context.ensembles, name) if each in held])
    if len(held) == 1:
        what = f"{name} is all that {served_by} serves, and Triton has nothing to serve without it"
        needed += (Check("models", CheckOutcome.REFUSED, what, "Scale it to nothing, or remove it from the cluster."),)
    if name in load:
        what = f"the pods of {served_by} load {name} by name (--load-model={name})"
        needed += (Check("models", CheckOutcome.REFUSED, what, "Take it out of the chart's list `models` first."),)
    return needed


def models_after(
    context: RolloutContext, held: Mapping[str, tuple[int, ...]], source: Location
) -> tuple[SnapshotModel, ...]:
    """Return the models of a roll-out's snapshot: those served, with the new version in the place of the old.

    For an undeployment, the leaving model or version is left out.

    Models the new version needs are added if they are not served, with the versions of their policies, else the
    newest. Versions pinned by ensembles are added, too. A server does not become ready with an incomplete ensemble.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        held: model -> versions served now. Models other than the changed and the needed ones stay.
        source: repository or snapshot with their files.
    """
    repository, name, version = context.repository, context.name, context.version
    found = {other: SnapshotModel(other, versions, source) for other, versions in held.items() if other != name}
    if context.leaves:
        left = context.remaining(held.get(name, ()))
        return (*found.values(), *([SnapshotModel(name, left, source)] if left else ()))
    keep = context.options.keep_previous
    others_of_it = [v for v in held.get(name, ()) if keep and v != version]
    kept = {*others_of_it[-1:], *(v for v in others_of_it if v in context.pinned)}
    found[name] = SnapshotModel(name, tuple(sorted({version, *kept})), repository)
    for needed, versions in versions_brought(context, held).items():
        found[needed] = SnapshotModel(needed, versions, repository)
    return tuple(found.values())


def versions_brought(context: RolloutContext, held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the models `models_after` adds for the new version's needs. Arguments as there."""
    wanted = {} if context.leaves else versions_needed(context, held)
    return {needed: versions for needed, versions in wanted.items() if versions != held.get(needed)}


def versions_needed(
    context: RolloutContext, held: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the versions of each model the new version needs. A model without versions is left out.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        held: models and versions served already. They stay. `None`: none.
    """
    within = {each: context.ensembles[each] for each in (*context.needs, context.name) if each in context.ensembles}
    found: dict[str, tuple[int, ...]] = {}
    for needed in context.needs:
        entry = find_model(context.repository, needed)
        existing = tuple(each.version for each in entry.versions)
        served = (held or {}).get(needed) or entry.selected or existing[-1:]
        if wanted := {*served, *(pinned_versions(within, needed).keys() & set(existing))}:
            found[needed] = tuple(sorted(wanted))
    return found


def check_relatives(
    context: RolloutContext, models: Sequence[SnapshotModel], served_by: str, load: Sequence[str] = ("*",)
) -> tuple[Check, ...]:
    """Check whether pods will serve the model and whatever it needs.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        models: model -> versions of the snapshot.
        served_by: address of the target, named in the refusals.
        load: the models its pods name to load, or `*`. With an ensemble Triton loads its parts, never the models its
            code asks.
    """
    name = context.name
    needs = models_needed_by(context.ensembles, name)
    lacking = [each for each in needs if each not in {model.name for model in models}]
    if lacking:
        what = f"{name} needs {', '.join(lacking)}, which neither the repository nor {served_by} has"
        return (
            Check("models", CheckOutcome.REFUSED, what, "Add it to the repository first: repo-manager add, or copy."),
        )
    if "*" in load:
        return ()
    steps = {each: config for each, config in context.ensembles.items() if is_ensemble(config)}
    loaded = {*load, *(part for each in load for part in models_needed_by(steps, each))}
    silent = [each for each in (*needs, name) if each not in loaded]
    if not silent:
        return ()
    what = f"the pods of {served_by} load {', '.join(load)} by name and would not load {', '.join(silent)}"
    hint = f"Add {', '.join(silent)} to what they load: the chart's list `models`, or --load-model."
    return (Check("models", CheckOutcome.REFUSED, what, hint),)
