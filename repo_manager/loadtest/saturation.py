"""Where more load stops to bring more throughput."""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.loadtest.result import LoadPoint

__all__ = ["find_knee", "is_saturated"]

GAIN = 1.05
KNEE_SHARE = 0.9


def is_saturated(points: Sequence[LoadPoint]) -> bool:
    """Say whether the last doubling of the concurrency raised throughput by less than 5 %, or ended in failure."""
    closed = [point for point in points if point.mode == "concurrency"]
    if closed and closed[-1].outcome == "failed":
        return True
    return len(closed) >= 2 and closed[-1].throughput_per_s < GAIN * closed[-2].throughput_per_s


def find_knee(points: Sequence[LoadPoint]) -> tuple[LoadPoint | None, str]:
    """Return the knee of the closed-loop levels and the rule.

    The knee is the lowest concurrency with at least 90 % of the highest throughput: beyond it, requests mostly wait.
    It takes three levels, and the highest throughput must not be at the highest level by more than 5 %: then the
    server was not saturated.
    """
    closed = sorted((point for point in points if point.mode == "concurrency"), key=lambda point: point.level)
    closed = [point for point in closed if point.outcome != "failed"]
    if len(closed) < 3:
        return None, "a knee takes at least three closed-loop levels"
    best = max(point.throughput_per_s for point in closed)
    if closed[-1].throughput_per_s > GAIN * closed[-2].throughput_per_s:
        return None, "throughput still rises by more than 5 % at the highest level: not saturated"
    knee = next(point for point in closed if point.throughput_per_s >= KNEE_SHARE * best)
    return knee, f"the lowest concurrency with at least {KNEE_SHARE:.0%} of the highest throughput ({best:.0f}/s)"
