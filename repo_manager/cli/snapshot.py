"""Snapshots for clusters, and the removal of unused versions and snapshots: snapshot, fetch, gc."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, Output, check_keys, check_outputs
from repo_manager.cli.repository_options import AnyModelName, RepositoryFlag, model_versions
from repo_manager.errors import RepositoryError, UsageError
from repo_manager.pipeline.snapshot import fetch, pinned_by, snapshot
from repo_manager.report.repository_tables import removals_view
from repo_manager.report.snapshot_tables import fetched_view, pinned_view, snapshot_removals_view
from repo_manager.repository.location import Location
from repo_manager.repository.remove import gc
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.snapshot_cache import hold_snapshot
from repo_manager.rollout.snapshot_gc import SnapshotRemovals, gc_snapshots
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class SnapshotFlags:
    """The models to pin, and the place of the snapshot."""

    values: Path | None = option(
        "--values",
        metavar="FILE.yaml",
        help="Pin it in this values file, which holds only the pin. Models not named keep the version pinned now.",
    )
    mounted: str | None = option(
        "--mounted",
        metavar="URL|DIR",
        help="The repository's URL for the pods [default: the one in --values, else the same as --repository].",
    )
    keep_previous: bool = option(
        "--keep-previous",
        sets=(RolloutOptions, "keep_previous"),
        help="Also serve the previous version, and the versions pinned by ensembles.",
    )
    drop_pinned: bool = option(
        "--drop-pinned",
        sets=(RolloutOptions, "drop_pinned"),
        help="Undeploy a version even if an ensemble pins it. Triton then unloads the ensemble.",
    )
    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        sets=(RolloutOptions, "signed_by"),
        help="Refuse versions without a signature by this key (may be given often) [default: the settings' signed_by].",
    )


@app.command("snapshot")
@grouped
def snapshot_command(
    named_versions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[:VERSION]]...",
            help="The new versions \\[default: every model, as its version policy selects].",
            show_default=False,
            autocompletion=model_versions,
        ),
    ] = None,
    *,
    place: RepositoryFlag,
    flags: SnapshotFlags,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Freeze the versions for pods as a snapshot, and print the chart's values that pin it, for Argo CD or Flux.

    The versions are checked as for `deploy`. No cluster is contacted or changed. The tool that applies the values
    rolls the snapshot out.
    """
    terminal = output.terminal()
    check_outputs(flags.values)
    check_keys(flags.signed_by)
    settings = settings_of(RolloutOptions, flags)
    settings["signed_by"] = settings["signed_by"] or load_settings().signed_by
    options = RolloutOptions(**settings, dry_run=dry_run)
    made = snapshot(
        place.root(),
        tuple(named_versions or ()),
        values=flags.values,
        mounted=flags.mounted,
        options=options,
        report=terminal.reporter(),
    )
    terminal.result(made, *pinned_view(made))


@dataclasses.dataclass(frozen=True)
class FetchFlags:
    """Where a snapshot is kept, and how it is checked."""

    link: Path | None = option(
        "--link", metavar="FILE", help="Make this a symbolic link to the snapshot's folder, for --model-repository."
    )
    keep: int = option(
        "--keep",
        sets=(fetch, "keep"),
        min=0,
        help="Number of unused snapshots to keep beside it.",
    )
    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        help="Refuse versions without a signature by this key (may be given often) [default: the settings' signed_by].",
    )
    hold: bool = option(
        "--hold",
        default=False,
        help="Stay until SIGTERM, and protect the snapshot from removal (for a pod's sidecar).",
    )


@app.command("fetch")
@grouped
def fetch_command(
    url: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help="Its URL or folder: REPOSITORY.snapshots/ID.", show_default=False)
    ],
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="The folder for snapshots. Pods of a node share one.")],
    *,
    flags: FetchFlags,
    output: Output,
) -> None:
    """Copy a snapshot to this machine, and check all its files and signatures.

    A complete snapshot on this machine is not fetched again. Damaged files are.
    """
    terminal = output.terminal()
    keys = tuple(flags.signed_by or ())
    with fetch(
        url, cache, signed_by=keys, keep=flags.keep, link=flags.link, report=terminal.reporter()
    ) as snapshot_here:
        terminal.result(snapshot_here, *fetched_view(snapshot_here))
        if flags.hold:
            hold_snapshot(snapshot_here)


@dataclasses.dataclass(frozen=True)
class GcFlags:
    """The rule for old versions."""

    keep: int = option("--keep", sets=(gc, "keep"), min=1, help="Number of newest versions to keep.")
    older_than: float | None = seconds_option(
        "--older-than",
        sets=(gc, "older_than_s"),
        least=0.0,
        needs_unit=True,
        help="Only versions of at least this age: 30d, 12h.",
    )
    snapshots: bool = option(
        "--snapshots",
        default=False,
        help="Remove unused snapshots of the repository instead: those that no target of --to and no file of --values "
        "names.",
    )
    to: list[str] | None = option(
        "--to",
        metavar="URL",
        help="With --snapshots: every k8s://namespace/release and kserve://namespace/name that serves snapshots of "
        "the repository (may be given often).",
    )
    values: list[Path] | None = option(
        "--values",
        metavar="FILE.yaml",
        help="With --snapshots: every values file that pins one (may be given often).",
    )

    def removed_snapshots(self, root: Location, *, dry_run: bool) -> SnapshotRemovals:
        """Remove the snapshots that nothing names."""
        age = {} if self.older_than is None else {"older_than_s": self.older_than}
        return gc_snapshots(root, tuple(self.to or ()), pinned=pinned_by(self.values or ()), dry_run=dry_run, **age)


@app.command("gc")
@grouped
def gc_command(
    name: AnyModelName = None,
    *,
    flags: GcFlags,
    place: RepositoryFlag,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Remove old versions. What is deployed, selected by the version policy, tagged, or a roll-back version stays.

    With --snapshots, remove the snapshots no Deployment, ReplicaSet, pod, InferenceService, history of roll-outs or
    values file names.
    """
    root = place.root()
    if flags.snapshots:
        if name is not None:
            raise UsageError("--snapshots removes whole snapshots, not versions of one model", hint="Leave NAME out.")
        removed = flags.removed_snapshots(root, dry_run=dry_run)
        output.terminal().result(removed, *snapshot_removals_view(removed))
        return
    if flags.to or flags.values:
        raise UsageError("--to and --values are for --snapshots")
    result = gc(root, name, **settings_of(gc, flags), dry_run=dry_run)
    terminal = output.terminal()
    for failure in result.failed:
        terminal.warn(f"{failure} (nothing of this model was removed)")
    terminal.result(result, *removals_view(result.removals, dry_run=dry_run))
    if result.failed:
        raise typer.Exit(RepositoryError.exit_code)
