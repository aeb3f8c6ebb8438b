"""What the engine rolls out to: a target of one or more parts, and what all steps of one roll-out share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.repository import Location, find_model
from repo_manager.rollout.checks import Check, check_version, refuse
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import ServerResult, TrialResult
from repo_manager.rollout.retry import Deadline, retried

__all__ = ["Context", "Part", "Report", "Target"]

Report = Callable[[str], None]
Result = TypeVar("Result")


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


class Context:
    """What all steps of one roll-out share: what is rolled out, how, the time left, and what was done so far.

    Args:
        repository: the repository that is served.
        name: the model.
        version: the version to serve.
        options: how to roll out.
        report: told what is being done; from several threads when a batch has more than one server.
        trial_s: how long a trial takes, on top of the deadline.

    Raises:
        RepositoryError: no such model or version.
    """

    def __init__(
        self,
        repository: Location,
        name: str,
        version: int,
        options: RolloutOptions,
        report: Report,
        *,
        trial_s: float = 0.0,
    ) -> None:
        self.repository, self.name, self.version = repository.resolve(), name, version
        self.options, self._tell = options, report
        self.entry = find_model(self.repository, name)
        self.folder = self.entry.version(version).path
        self.deadline = Deadline(options.deadline_s + trial_s)
        self.began = time.monotonic()
        self.events: list[str] = []
        self.missing: dict[str, ServerUnreachableError] = {}
        self.total = 1
        self._halted = threading.Event()
        self._lock = threading.Lock()
        self._changing = threading.RLock()

    @property
    def may_miss(self) -> int:
        """How many servers may be missing."""
        return self.options.max_unavailable.of(self.total)

    def note(self, event: str) -> None:
        """Record what is being done, and tell it; an undo goes on although it cannot be told."""
        self.events.append(event)
        with contextlib.suppress(Exception) if self._halted.is_set() else contextlib.nullcontext():
            self._tell(event)

    def halt(self) -> None:
        """Let what runs in other threads go no further; a change that they have begun ends first."""
        with self._changing:
            self._halted.set()

    def change(self, act: Callable[[], object]) -> None:
        """Change something that the parts share, config.pbtxt for instance.

        Raises:
            ServerRefusedError: the roll-out was called off: nothing is changed behind the undo's back.
        """
        with self._changing:
            self._go_on()
            act()

    def retried(self, call: Callable[[], Result]) -> Result:
        """Call, and call again when the server cannot be reached or is busy for a moment.

        Raises:
            ServerError: the last call's; or the roll-out was called off meanwhile.
        """
        self._go_on()
        return retried(call, retries=self.options.retries, report=self.note, deadline=self.deadline)

    def _go_on(self) -> None:
        if self._halted.is_set():
            raise ServerRefusedError(f"the roll-out of {self.name}:{self.version} was called off")

    def check_version(self) -> tuple[Check, ...]:
        """Check what is the same on every server, before one is asked to read it."""
        return check_version(self.repository, self.entry, self.version, signed_by=self.options.signed_by)

    def refused_version(self) -> tuple[Check, ...]:
        """Check the version before anything else is asked, and refuse it.

        Raises:
            RepositoryError: something speaks against it.
        """
        checks = self.check_version()
        refuse(self.name, self.version, checks, self.options)
        return checks

    def leave_out(self, label: str, exc: ServerUnreachableError) -> None:
        """Go on without a server that does not answer; `check_missing` says whether that is allowed."""
        with self._lock:
            self.missing[label] = exc
            count = len(self.missing)
        if self.total > 1:
            self.note(f"{label} does not answer ({count} of at most {self.may_miss} that may be missing)")

    def check_missing(self) -> None:
        """See whether the servers that are missing may be.

        Raises:
            ServerUnreachableError: it is one too many; with each one's reason.
        """
        missing = list(self.missing.values())
        if missing and self.total == 1:
            raise missing[0]
        if len(missing) > self.may_miss:
            raise ServerUnreachableError(
                f"{len(missing)} of {self.total} servers do not answer, at most {self.may_miss} may be missing: "
                + "; ".join(exc.message for exc in missing),
                hint="Start them, or allow it: --max-unavailable.",
            )
        if len(missing) >= self.total:
            raise ServerUnreachableError(f"None of the servers answers: {', '.join(self.missing)}")
