"""Taking Triton servers' copies of a model, or of one version of it, out of service: unloaded, and proven by the
server's index.

Nothing comes up, so nothing is done in the first half of a roll-out. A failure loads the model again wherever it was
unloaded. A model undeployed as a whole keeps its config.pbtxt, whose policy selects the start of its next deployment.
`serve` does not load it, because the record lists no deployed version.
"""

from __future__ import annotations

import dataclasses

from repo_manager.errors import ServerRefusedError
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.rollout.calls import in_waves
from repo_manager.rollout.checks import Check, check_needed
from repo_manager.rollout.observe import require_control, wait_until_only_ready
from repo_manager.rollout.plan import RolloutPlan, plan_undeploy
from repo_manager.rollout.result import ServerResult
from repo_manager.rollout.targets.relatives import Family
from repo_manager.rollout.targets.triton import WIDE, TritonTarget
from repo_manager.rollout.targets.triton_part import TritonPart
from repo_manager.triton_config.ensembles import is_ensemble

__all__ = ["LeavingTarget"]


class LeavingTarget(TritonTarget):
    """One or more servers of one repository, from which a model or a version leaves."""

    @property
    def changes(self) -> bool:
        """Whether any server serves it."""
        return any(part.plan.ready_before != part.plan.ready_after for part in self.parts)

    @property
    def before(self) -> None:
        """Nothing: no version is on trial, so a killed roll-out leaves nothing to settle."""
        return

    def look(self) -> None:
        """Ask every server for its served state, and plan."""
        family = Family(self._context)
        self.parts = self._look_at(lambda client: LeavingPart(self._context, client, family))
        self._original = read_config_bytes(self._context.repository, self._context.name)
        left = {version for part in self.parts for version in part.plan.ready_after}
        for part in self.parts:
            part.original = self._original
            if part.plan.ready_after:  # all servers share one config.pbtxt
                part.plan = dataclasses.replace(part.plan, ready_after=tuple(sorted(left)))

    def check(self) -> None:
        """Check on every server who needs the model, and whether it can be unloaded."""

        def check(part: TritonPart) -> None:
            part.checks = part.check_server()

        if self.changes:
            in_waves(self.parts, min(WIDE, len(self.parts)), check)


class LeavingPart(TritonPart):
    """One server, from which a model or a version leaves."""

    def _planned(self) -> RolloutPlan:
        context = self.context
        ensemble = is_ensemble(config) if (config := context.ensembles.get(context.name)) is not None else False
        return plan_undeploy(
            context.entry,
            self.before,
            context.remaining(self.before.ready),
            keeps=context.needs if ensemble else (),
        )

    def check_server(self) -> tuple[Check, ...]:
        """Check whether a served model needs it.

        Raises:
            ServerRefusedError: the server would refuse to unload it.
        """
        context, after = self.context, self.plan.ready_after
        context.retried(lambda: require_control(self.client))
        if after:
            return context.check_pinned(self.before.ready, after, self.relatives.ready)
        return check_needed(context.what, self.relatives.dependents)

    def apply(self) -> None:
        """Do nothing: nothing comes up."""

    def prove(self) -> None:
        """Do nothing: nothing came up."""

    def finish(self) -> None:
        """Unload it, and confirm it by the server's index.

        Raises:
            ServerRefusedError: the index still lists it.
        """
        context, after = self.context, self.plan.ready_after
        if self.before.ready == after:
            return
        self.touched = True
        if after:
            self._write_policy(after)
            self.load()
        else:
            self.note(f"unloading {context.name}")
            context.retried(self._unload)
        state = wait_until_only_ready(self.client, context.name, after, context.options.settle_timeout_s)
        if state.ready != after:
            raise ServerRefusedError(
                f"{state.sentence}, expected {', '.join(map(str, after)) or 'none'}", hint="The server's log says why."
            )
        self._state = state
        self.relatives.prove(state.ready)

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""
        gone = self._state.ready != self.before.ready
        return dataclasses.replace(super().result(), changed=gone, proof="index" if gone else "none")
