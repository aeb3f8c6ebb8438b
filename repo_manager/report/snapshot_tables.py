"""Snapshots, and what clusters serve, as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table

__all__ = ["pinned_view"]


def pinned_view(made: Any) -> list[RenderableType]:
    """Show a `pipeline.snapshot.Pinned`: the snapshot, how it differs from what was pinned, the values that pin it."""
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


def _numbers(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "-"
