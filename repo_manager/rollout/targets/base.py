"""Targets of the engine. The parts of a target change, are proven and are put back one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from repo_manager.errors import RepoManagerError
from repo_manager.rollout.checks import Check
from repo_manager.rollout.result import ServerResult, TrialResult

__all__ = ["JointTarget", "LeftAloneError", "Part", "Target"]


class LeftAloneError(RepoManagerError):
    """Nothing is undone: another process has changed the part since, and its change stays."""


class Part(Protocol):
    """One part of a target, changed on its own: a Triton server, a Deployment, an InferenceService.

    Any method may raise any error: the engine undoes every `touched` part.
    """

    @property
    def label(self) -> str:
        """Its name in messages: a URL, or the name of the object."""

    @property
    def touched(self) -> bool:
        """Whether anything of it may have been changed, so there is something to undo."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """The findings of `Target.check`."""

    def apply(self) -> None:
        """Serve the new version, beside the old one where both can be served. Does nothing where nothing changes."""

    def prove(self) -> None:
        """Check that the new version serves.

        Raises:
            RepoManagerError: the new version does not serve.
        """

    def finish(self) -> None:
        """Serve exactly the planned versions."""

    def undo(self) -> str:
        """Serve the previous versions again, confirm it, and return the served state in words.

        Raises:
            ServerUnreachableError: no answer, and none is needed: after a restart it serves the previous versions.
            LeftAloneError: another process has changed it since, so it was left as it is.
            RepoManagerError: it does not serve it.
        """

    def by_hand(self) -> str:
        """Tell a person how to repair a failed undo."""

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""


class Target(Protocol):
    """Where a version is rolled out to."""

    @property
    def parts(self) -> Sequence[Part]:
        """The parts found by `look`, in the order of their change."""

    @property
    def changes(self) -> bool:
        """Whether anything must be done."""

    @property
    def batch(self) -> int:
        """How many parts change at a time. 1 or more."""

    @property
    def trial(self) -> TrialResult | None:
        """The result of the trial. `None` without."""

    @property
    def before(self) -> tuple[int, ...] | None:
        """The versions in config.pbtxt before the roll-out, for the way back. `None`: it changes none of it."""

    @property
    def brought(self) -> Mapping[str, tuple[int, ...]]:
        """Model -> versions of the needed models served along with the new version, because they were not."""

    def describe(self) -> str:
        """Return its name."""

    def look(self) -> None:
        """Read the served state, and plan. Nothing is changed.

        Raises:
            RepoManagerError: it cannot be seen, or cannot be rolled out to.
        """

    def check(self) -> None:
        """Check the version and every part, for `Part.checks`. The engine refuses."""

    def put_back(self) -> None:
        """Put back the shared files, before any of them is undone."""


class JointTarget:
    """Releases and InferenceServices, in one cluster or several, one after the other. Together or not at all.

    With a canary, each goes through its shares below all of the traffic before the next one begins, and all get all of
    it at the end.

    Args:
        targets: each with its cluster. They share no config.pbtxt.
    """

    batch = 1

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    @property
    def parts(self) -> Sequence[Part]:
        """The parts of all, target by target."""
        return [part for target in self._targets for part in target.parts]

    @property
    def changes(self) -> bool:
        """Whether anything must be done on any of them."""
        return any(target.changes for target in self._targets)

    @property
    def trial(self) -> TrialResult | None:
        """The steps of all, one after the other."""
        trials = [target.trial for target in self._targets if target.trial is not None]
        steps = tuple(step for trial in trials for step in trial.steps)
        return dataclasses.replace(trials[0], steps=steps) if trials else None

    @property
    def before(self) -> None:
        """Nothing: the repository's config.pbtxt stays as it is."""
        return

    @property
    def brought(self) -> Mapping[str, tuple[int, ...]]:
        """The models any of them brings along: one part may serve a model already, and lack it on the next."""
        found: dict[str, tuple[int, ...]] = {}
        for target in self._targets:
            for name, versions in target.brought.items():
                found[name] = tuple(sorted({*found.get(name, ()), *versions}))
        return found

    def describe(self) -> str:
        """Return the targets."""
        return ", ".join(target.describe() for target in self._targets)

    def look(self) -> None:
        """Look at every target before any of them is changed."""
        for target in self._targets:
            target.look()

    def check(self) -> None:
        """Check every target."""
        for target in self._targets:
            target.check()

    def put_back(self) -> None:
        """Do nothing: the targets share nothing."""
