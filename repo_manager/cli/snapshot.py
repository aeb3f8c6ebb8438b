"""Snapshots for clusters: snapshot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, Output, check_outputs
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.pipeline.snapshot import snapshot
from repo_manager.report.snapshot_tables import pinned_view
from repo_manager.rollout.options import RolloutOptions
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class SnapshotFlags:
    """What is pinned, and where."""

    values: Path | None = option(
        "--values",
        metavar="FILE.yaml",
        help="Pin it in this values file, which holds the pin alone. What the file pins now stays, but for the models "
        "that are named.",
    )
    mounted: str | None = option(
        "--mounted",
        metavar="URL|DIR",
        help="The repository as the pods see it [default: what --values says, else the same as --repository].",
    )
    keep_previous: bool = option(
        "--keep-previous",
        sets=(RolloutOptions, "keep_previous"),
        help="Serve the previous version beside the new one, and what ensembles pin.",
    )
    drop_pinned: bool = option(
        "--drop-pinned",
        sets=(RolloutOptions, "drop_pinned"),
        help="Take a version out of service although an ensemble pins it; Triton then drops the ensemble.",
    )
    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        sets=(RolloutOptions, "signed_by"),
        help="Refuse a version that no such key signed (may be given often) [default: the settings' signed_by].",
    )


@app.command("snapshot")
@grouped
def snapshot_command(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[:VERSION]]...",
            help="The new versions; without any, every model as its policy serves it.",
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
    """Freeze what pods are to serve as a snapshot, and print the chart's values that pin it, for Argo CD or Flux.

    The versions are checked as for `deploy`. No cluster is asked and none is changed: whoever applies the values rolls
    the snapshot out.
    """
    terminal = output.terminal()
    check_outputs(flags.values)
    settings = settings_of(RolloutOptions, flags)
    settings["signed_by"] = settings["signed_by"] or load_settings().signed_by
    options = RolloutOptions(**settings, dry_run=dry_run)
    made = snapshot(
        place.root(),
        tuple(targets or ()),
        values=flags.values,
        mounted=flags.mounted,
        options=options,
        report=terminal.reporter(),
    )
    terminal.result(made, *pinned_view(made))
