"""What the engine rolls out to: a target, whose parts change, are proven and are put back one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from repo_manager.errors import RepoManagerError
from repo_manager.rollout.checks import Check
from repo_manager.rollout.result import ServerResult, TrialResult

__all__ = ["LeftAloneError", "Part", "Target"]


class LeftAloneError(RepoManagerError):
    """Nothing is undone: somebody else has changed the part since, and that change stays."""


class Part(Protocol):
    """One part of a target that changes by itself: a Triton server, a Deployment, an InferenceService.

    Any method may raise whatever it wants: the engine undoes every part that is `touched`.
    """

    @property
    def label(self) -> str:
        """Its name in messages: a URL, or the name of the object."""

    @property
    def touched(self) -> bool:
        """Whether anything of it may have been changed, so that there is something to undo."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """What `Target.check` found."""

    def apply(self) -> None:
        """Serve the new version, beside the old one where both can be served. Does nothing where nothing changes."""

    def prove(self) -> None:
        """See that the new version serves.

        Raises:
            RepoManagerError: it does not.
        """

    def finish(self) -> None:
        """Serve exactly what was planned."""

    def undo(self) -> str:
        """Serve what was served before, see that it does, and return what is served, in words.

        Raises:
            ServerUnreachableError: no answer, and none is needed: what starts again serves what it served before.
            LeftAloneError: somebody else has changed it since, so it was left as it is.
            RepoManagerError: it does not serve it.
        """

    def by_hand(self) -> str:
        """Say what a person has to do when the undo failed."""

    def result(self) -> ServerResult:
        """Describe what was done, or what would be."""


class Target(Protocol):
    """Where a version is rolled out to."""

    @property
    def parts(self) -> Sequence[Part]:
        """The parts that `look` found, in the order in which they change."""

    @property
    def changes(self) -> bool:
        """Whether anything has to be done."""

    @property
    def batch(self) -> int:
        """How many parts change at a time; 1 or more."""

    @property
    def trial(self) -> TrialResult | None:
        """What the trial showed; `None` without."""

    @property
    def before(self) -> tuple[int, ...] | None:
        """The versions that config.pbtxt, which a roll-out changes, goes back to; `None`: it changes none of it."""

    def describe(self) -> str:
        """Return what it is called."""

    def look(self) -> None:
        """See what is served, and plan; nothing is changed.

        Raises:
            RepoManagerError: it cannot be seen, or cannot be rolled out to.
        """

    def check(self) -> None:
        """Check the version and every part, for `Part.checks`; the engine refuses."""

    def put_back(self) -> None:
        """Put back what the parts share, before any of them is undone."""
