"""How a gateway shares traffic, as rich renderables; apart from the tables of roll-outs, which have versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from repo_manager.report.layout import key_values

if TYPE_CHECKING:
    from repo_manager.rollout.traffic import Traffic

__all__ = ["traffic_view"]


def traffic_view(traffic: Traffic) -> list[RenderableType]:
    """Show the shares of the two Services, and of before."""
    stable, canary = traffic.services
    pairs: list[tuple[str, object]] = [("route", f"{traffic.route} at {traffic.cluster}")]
    would = "would be " if traffic.dry_run else ""
    if traffic.steps:
        pairs.append(("before", f"{canary} {_percent(traffic.before)}, {stable} {_percent(1 - traffic.before)}"))
    pairs.append(("traffic", f"{would}{canary} {_percent(traffic.share)}, {stable} {_percent(1 - traffic.share)}"))
    if len(traffic.steps) > 1:
        pairs.append(("steps", ", ".join(map(_percent, traffic.steps))))
    return [key_values(pairs)]


def _percent(share: float) -> str:
    return f"{share * 100:g} %"
