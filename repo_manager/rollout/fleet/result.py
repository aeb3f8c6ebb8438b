"""What a roll-out on several servers did, or would do."""

from __future__ import annotations

import dataclasses

from repo_manager.rollout.result import Rollout

__all__ = ["FleetRollout"]


@dataclasses.dataclass(frozen=True)
class FleetRollout:
    """A roll-out on several servers.

    Attributes:
        model: the model.
        version: the version that is served now.
        servers: one result a server, in the order given.
        unavailable: servers that did not answer and were left out, within `max_unavailable`; they serve the
            right version when they start, because the repository says so.
        batch: how many servers at a time.
        changed: whether anything had to be done on any of them.
        dry_run: whether these are the plans alone.
        seconds: duration.
    """

    model: str
    version: int
    servers: tuple[Rollout, ...]
    unavailable: tuple[str, ...]
    batch: int
    changed: bool
    dry_run: bool
    seconds: float
