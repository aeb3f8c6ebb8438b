"""Snapshots, and the served state of clusters, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table

if TYPE_CHECKING:
    from repo_manager.rollout.cluster_status import ClusterStatus, PartStatus
    from repo_manager.rollout.snapshot_cache import CachedSnapshot
    from repo_manager.rollout.snapshot_gc import SnapshotRemovals

__all__ = ["cluster_view", "fetched_view", "pinned_view", "snapshot_removals_view"]


def pinned_view(made: Any) -> list[RenderableType]:
    """Show a `pipeline.snapshot.Pinned`: the snapshot, its differences from the pinned one, the values for it."""
    pin = made.pin
    rows = [
        [name, _numbers(pin.before.get(name, ())), _numbers(pin.models.get(name, ()))]
        for name in sorted({*pin.models, *pin.before})
        if pin.models.get(name) != pin.before.get(name)
    ]
    state = "dry run: not written" if pin.dry_run else "written" if pin.created else "it was there already"
    pairs: list[tuple[str, object]] = [("snapshot", f"{pin.url} ({state})")]
    if pin.previous is not None:
        pairs.append(("pinned before", pin.previous))
    views: list[RenderableType] = [key_values(pairs)]
    if rows:
        before = "the policies serve" if pin.previous is None else "pinned before"
        views.append(make_table("Changes", ["model", before, "snapshot"], rows))
    views.append(Text(made.values.rstrip("\n")))
    if made.file is not None:
        done = "would change" if pin.dry_run and made.changed else "written" if made.changed else "unchanged"
        views.append(Text(f"{made.file}: {done}" + (". Commit it." if done == "written" else "")))
    return views


def fetched_view(made: CachedSnapshot) -> list[RenderableType]:
    """Show a snapshot now on this machine."""
    how = "fetched" if made.fetched else "there already"
    pairs: list[tuple[str, object]] = [
        ("snapshot", f"{made.id} ({how}, every file checked, {made.seconds:.1f} s)"),
        ("folder", made.folder),
        ("size", f"{made.size_bytes / 1e6:.1f} MB"),
    ]
    if made.removed:
        pairs.append(("removed", ", ".join(made.removed)))
    rows = [[name, _numbers(versions)] for name, versions in sorted(made.models.items())]
    return [key_values(pairs), make_table("Models", ["model", "versions"], rows)]


def _numbers(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "-"


def cluster_view(status: ClusterStatus) -> list[RenderableType]:
    """Show the served state of a release or an InferenceService, pod by pod."""
    views: list[RenderableType] = [Text(f"{status.target} at {status.cluster}", style="bold")]
    for part in status.parts:
        views.append(key_values(_facts(part)))
        rows = [
            [
                pod.name,
                Text("yes" if pod.ready else f"no: {pod.note}", style="" if pod.ready else "yellow"),
                _models(pod.models),
                "as above" if pod.url == part.url else pod.url or "not known",
                pod.restarts,
                pod.node or "-",
            ]
            for pod in part.pods
        ]
        columns = ["pod", "ready", "versions ready", "serves", "restarts", "node"]
        views.append(make_table(None, columns, rows, right="restarts", drop="node,serves"))
    lines = [Text(each, style="yellow") for each in status.differences]
    return [*views, *(lines or [Text("Everything is as it was rolled out.", style="green")])]


def _facts(part: PartStatus) -> list[tuple[str, object]]:
    ready = sum(pod.ready for pod in part.pods)
    wanted = sum(not pod.ending for pod in part.pods) if part.wanted is None else part.wanted
    seen = "" if part.observed in (None, part.generation) else f", its controller has seen {part.observed}"
    owners = [f"{what} {manager}" for what, manager in part.owners.items()]
    applied = [] if part.keeper is None else [f"{part.keeper} applies it"]
    return [
        (part.kind, part.name),
        ("serves", part.url),
        ("models", _models(part.models)),
        ("pods", f"{ready} of {wanted} ready"),
        ("generation", f"{part.generation}{seen}"),
        ("set by", ", ".join([*owners, *applied]) or "not known"),
    ]


def _models(models: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name}:{','.join(map(str, versions))}" for name, versions in sorted(models.items())) or "-"


def snapshot_removals_view(found: SnapshotRemovals) -> list[RenderableType]:
    """Show the removed snapshots, and why the others stay."""
    done = "would be removed" if found.dry_run else "removed"
    rows = [[name, done] for name in found.removed] + [[name, f"stays: {why}"] for name, why in found.kept.items()]
    if not rows:
        return [Text("There is no snapshot.")]
    return [make_table(None, ["snapshot", "what happens"], rows)]
