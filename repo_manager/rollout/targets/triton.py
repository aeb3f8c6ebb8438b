"""Triton servers of one repository, one or many: load old and new together, prove the new one, drop the old one.

They share one config.pbtxt, whose version policy decides the next load. So at any moment every server answers, and the
undo of an unproven version is one more load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from repo_manager.errors import ServerUnreachableError, UsageError
from repo_manager.repository.configuration import read_config_bytes, write_config_bytes
from repo_manager.repository.tags import model_state
from repo_manager.rollout.calls import in_waves
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.relatives import Family, Needed, put_back
from repo_manager.rollout.targets.triton_part import LEFT_ALONE, TritonPart
from repo_manager.server.client import TritonClient

__all__ = ["WIDE", "TritonTarget"]

# Servers asked at once. A look costs a server nothing.
WIDE = 16


class TritonTarget:
    """One or more servers of one repository.

    First every server serves the old and the new version and proves the new one. Only when all have, the old one is
    dropped, again a batch at a time.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        clients: one connected client per server.

    Raises:
        UsageError: no server.
    """

    trial = None

    def __init__(self, context: RolloutContext, clients: Sequence[TritonClient]) -> None:
        if not clients:
            raise UsageError(
                f"No server to {context.action} {context.what} {'from' if context.leaves else 'to'}",
                hint="Give at least one URL.",
            )
        self._context, self._clients = context, clients
        context.total = len(clients)
        self.batch = max(1, context.options.batch.of(len(clients)))
        self.parts: list[TritonPart] = []
        self._needed: tuple[Needed, ...] = ()
        self._original: bytes | None = None

    @property
    def changes(self) -> bool:
        """Whether anything must be done, on a server or in config.pbtxt."""
        return any(part.plan.changes for part in self.parts)

    @property
    def before(self) -> tuple[int, ...] | None:
        """The versions all servers serve now. Where there are none, those config.pbtxt serves apart from the new
        version."""
        ready = {version for part in self.parts for version in part.before.ready}
        state = model_state(self._context.repository, self._context.name)
        left = state.unproven
        if left is not None:
            ready -= {left.version}
            ready |= {version for version in left.before if version in ready or not ready}
        known = tuple(sorted(ready)) or self._context.entry.selected
        return tuple(version for version in known if version != self._context.version)

    @property
    def brought(self) -> Mapping[str, tuple[int, ...]]:
        """The models some server has to serve first, because the model needs them."""
        return {each.name: each.versions for each in self._needed}

    def describe(self) -> str:
        """Return the servers' URLs."""
        return ", ".join(client.url for client in self._clients)

    def look(self) -> None:
        """Ask every server for its served state, and plan."""
        family = Family(self._context)
        self.parts = self._look_at(lambda client: TritonPart(self._context, client, family))
        after = {version for part in self.parts for version in part.plan.ready_after}
        for part in self.parts:  # all servers share one config.pbtxt
            part.plan = dataclasses.replace(part.plan, ready_after=tuple(sorted(after)))
        meanwhile = tuple(sorted({version for part in self.parts for version in part.loaded_meanwhile()}))
        self._original = read_config_bytes(self._context.repository, self._context.name)
        self._needed = family.needed([part.relatives.ready for part in self.parts])
        for part in self.parts:
            part.meanwhile, part.original, part.relatives.needed = meanwhile, self._original, self._needed
            brings, dependents = part.relatives.plan()
            part.plan = dataclasses.replace(part.plan, brings=brings, dependents=dependents)

    def _look_at(self, part_of: Callable[[TritonClient], TritonPart]) -> list[TritonPart]:
        """Make a part of every answering server.

        Raises:
            ServerUnreachableError: more do not answer than may be missing.
        """

        def look_at(client: TritonClient) -> TritonPart | None:
            try:
                return part_of(client)
            except ServerUnreachableError as exc:
                self._context.leave_out(client.url, exc)
                return None

        found = in_waves(self._clients, min(WIDE, len(self._clients)), look_at)
        self._context.check_missing()
        return [part for part in found if part is not None]

    def check(self) -> None:
        """Check the version once, and every server. Served versions only where keys are given."""
        if not self.changes and not self._context.options.signed_by:
            return
        context = self._context
        loads = {step.version for part in self.parts for step in part.plan.steps if step.action not in LEFT_ALONE}
        shared = (*context.check_version(self.brought), *context.check_others(sorted(loads)))

        def check(part: TritonPart) -> None:
            part.checks = (*shared, *part.check_server()) if self.changes else shared

        in_waves(self.parts, min(WIDE, len(self.parts)), check)
        if not self._context.options.dry_run:
            for part in self.parts:
                part.tell_plan()

    def put_back(self) -> None:
        """Restore config.pbtxt."""
        write_config_bytes(self._context.repository, self._context.name, self._original)
        put_back(self._context, self._needed)
