"""What a roll-out did, and how it is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.rollout.fleet.amount import NONE, ONE, Amount
from repo_manager.rollout.plan import RolloutPlan
from repo_manager.rollout.smoke import SmokeResult

if TYPE_CHECKING:  # it takes the options
    from repo_manager.rollout.checks import Check

__all__ = ["Rollout", "RolloutOptions"]


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How to roll out.

    Attributes:
        keep_previous: leave the previous version loaded, so that going back is only a policy change.
        dry_run: plan only.
        deadline_s: for everything up to the proof on the last server; going back has time of its own.
        load_timeout_s: deadline of one load on the server.
        settle_timeout_s: how long the server may take until exactly the wanted versions are READY.
        smoke_timeout_s: deadline of the smoke inference.
        reconnect_timeout_s: how long to wait, when things are put back, for a server that has stopped answering.
        lease_timeout_s: how long to wait for another roll-out of the same model.
        retries: how often a call is made again when the server was out of reach, or busy, for a moment.
        signed_by: public keys one of which has to vouch for the version; empty asks for no signature.
        force: go on against a check that rests on an estimate (memory).
        batch: of a fleet: how many servers at a time; at least one.
        max_unavailable: of a fleet: how many servers may not answer without failing the whole.
    """

    keep_previous: bool = False
    dry_run: bool = False
    deadline_s: float = 3600.0
    load_timeout_s: float = 600.0
    settle_timeout_s: float = 60.0
    smoke_timeout_s: float = 60.0
    reconnect_timeout_s: float = 10.0
    lease_timeout_s: float = 0.0
    retries: int = 2
    signed_by: tuple[Path, ...] = ()
    force: bool = False
    batch: Amount = ONE
    max_unavailable: Amount = NONE


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A roll-out that succeeded, or its plan.

    Attributes:
        model: the model.
        version: the version that is served now.
        url: the server.
        plan: what was predicted.
        checks: what was looked at before anything was touched; empty when nothing had to be done.
        changed: whether anything had to be done; `False` for what was deployed already, and for a dry run.
        dry_run: whether this is the plan alone.
        ready: versions that are READY now, by the server's index.
        previous: versions that were READY before.
        smoke: the inference that proved it; `None` for a dry run.
        mended: the version was READY and did not answer, and was unloaded and loaded again.
        draining: versions that were dropped and still end their last requests, or their process.
        seconds: duration.
        events: what was done, in order.
    """

    model: str
    version: int
    url: str
    plan: RolloutPlan
    checks: tuple[Check, ...]
    changed: bool
    dry_run: bool
    ready: tuple[int, ...]
    previous: tuple[int, ...]
    smoke: SmokeResult | None
    mended: bool
    draining: tuple[int, ...]
    seconds: float
    events: tuple[str, ...]
