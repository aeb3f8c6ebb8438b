"""State shared by all steps of one roll-out: the change, its options, the time left, and the events so far."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.onnx_model.runtime import runtime_within
from repo_manager.repository.configuration import settle_trial
from repo_manager.repository.ensembles import ensembles_in, models_needed
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model
from repo_manager.repository.signing import SignatureCheck
from repo_manager.repository.stores import open_store
from repo_manager.rollout.calls import Deadline, Result, retried
from repo_manager.rollout.checks import Check, check_loaded, check_pinned, check_signatures, check_version, refuse
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Action
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.ensembles import pinned_versions

__all__ = ["Change", "Report", "RolloutContext"]

_RECONNECT_S = 1.5

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Change:
    """The change one roll-out makes.

    Attributes:
        name: name of the model to roll out.
        version: the version to serve, or to take out of service. `None` with `undeploy`: every version.
        action: `deploy`, `rollback` or `undeploy`: decides the words, and the record.
    """

    name: str
    version: int | None
    action: Action = "deploy"

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


class RolloutContext:
    """State shared by all steps of one roll-out: the change, its options, the time left, and the events so far.

    Args:
        repository: the repository the servers serve.
        change: the model, the version, and the action.
        options: deadline, batch size, trial, signatures and other settings of the roll-out.
        report: called with a line of text for each step. From several threads when a batch has more than one server.
        trial_s: how long a trial takes, on top of the deadline.
        confirm: asked when no other process can roll the model out any more: raises if the decision no longer holds.

    Raises:
        RepositoryError: no such model or version.
    """

    def __init__(
        self,
        repository: Location,
        change: Change,
        options: RolloutOptions,
        report: Report,
        *,
        trial_s: float = 0.0,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        self.confirm = confirm
        self.repository, self.name, self.action, self.what = (
            repository.resolve(),
            change.name,
            change.action,
            str(change),
        )
        self.options, self._tell = options, report
        self.entry = find_model(self.repository, change.name)
        self.whole = change.version is None
        newest = max((each.version for each in self.entry.versions), default=0)
        self.version = newest if change.version is None else change.version
        self.folder = self.entry.path / str(self.version) if self.whole else self.entry.version(self.version).path
        self.deadline = Deadline(options.deadline_s + trial_s)
        self.began = time.monotonic()
        self.events: list[str] = []
        self.missing: dict[str, ServerUnreachableError] = {}
        self.vouched: list[SignatureCheck] = []
        self.total = 1
        self._halted = threading.Event()
        self._lock = threading.Lock()
        self._changing = threading.RLock()

    @property
    def leaves(self) -> bool:
        """Whether something is taken out of service, rather than put into it."""
        return self.action == "undeploy"

    def remaining(self, served: Sequence[int]) -> tuple[int, ...]:
        """Return the served versions an undeployment leaves."""
        return () if self.whole else tuple(version for version in served if version != self.version)

    def settle(self) -> None:
        """Put config.pbtxt back to the proven state, where a roll-out was killed before its proof. Holds the lease."""
        if settle_trial(self.repository, self.name, self.note):
            self.entry = find_model(self.repository, self.name)

    @property
    def may_miss(self) -> int:
        """How many servers may be missing."""
        return self.options.max_unavailable.of(self.total)

    def note(self, event: str) -> None:
        """Record the step at hand, and report it. An undo goes on although it is unknown."""
        self.events.append(event)
        with contextlib.suppress(Exception) if self._halted.is_set() else contextlib.nullcontext():
            self._tell(event)

    def call_s(self, most_s: float) -> float:
        """Return how long the next call to a server may take. Once the roll-out is undone, as long as it needs.

        Raises:
            ServerUnreachableError: no time is left.
        """
        return most_s if self._halted.is_set() else self.deadline.remaining_s(most_s)

    @property
    def reconnect_s(self) -> float:
        """How long an undo waits for a silent server: not long after a short deadline."""
        return min(self.options.reconnect_timeout_s, max(_RECONNECT_S, self.options.deadline_s / 2))

    def halt(self) -> None:
        """Stop further work in other threads. A change they have begun ends first."""
        with self._changing:
            self._halted.set()

    def change(self, act: Callable[[], object]) -> None:
        """Change something the parts share, config.pbtxt for instance.

        Raises:
            ServerRefusedError: the roll-out was called off: nothing is changed behind the undo's back.
        """
        with self._changing:
            self._go_on()
            act()

    def retried(self, call: Callable[[], Result]) -> Result:
        """Call, and call again when the server cannot be reached or is busy for a moment.

        Raises:
            ServerError: the last call's, or the roll-out was called off by then.
        """
        self._go_on()
        return retried(call, retries=self.options.retries, report=self.note, deadline=self.deadline)

    def _go_on(self) -> None:
        if self._halted.is_set():
            raise ServerRefusedError(f"the roll-out of {self.what} was called off")

    def check_version(self, serving: Mapping[str, tuple[int, ...]]) -> tuple[Check, ...]:
        """Make the checks common to all servers, before one is asked to read the files.

        Args:
            serving: model -> versions served first, because this one needs them.
        """
        self.vouched.clear()
        with runtime_within(self.call_s(self.options.deadline_s)):
            return check_version(
                self.repository,
                self.entry,
                self.version,
                signed_by=self.options.signed_by,
                vouched=self.vouched,
                serving=serving,
            )

    def check_others(self, versions: Sequence[int]) -> tuple[Check, ...]:
        """Check under a policy the other versions the roll-out makes a server load."""
        others = [version for version in versions if version != self.version]
        if not others or not self.options.signed_by:
            return ()
        return (check_signatures(self.repository, self.name, others, self.options.signed_by, self.vouched),)

    def check_loaded(self, config: ModelConfig | None) -> None:
        """Under a policy, check a server's fresh load against the signatures checked before it.

        Args:
            config: the model's configuration. `None`: it has none, or it cannot be parsed.

        Raises:
            RepositoryError: it is not.
        """
        keys = self.options.signed_by
        if keys:
            check_loaded(self.repository, self.entry, self.version, keys, self.vouched, config)

    @functools.cached_property
    def ensembles(self) -> Mapping[str, ModelConfig]:
        """The repository's ensembles, and the models whose code asks others."""
        return ensembles_in(open_store(self.repository))

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """The models this one needs, directly or through others, in the order of loading."""
        return models_needed(open_store(self.repository), self.name, self.ensembles)

    @functools.cached_property
    def pinned(self) -> Mapping[int, tuple[str, ...]]:
        """The versions of the model pinned by ensembles of the repository, each with the ensembles."""
        return pinned_versions(self.ensembles, self.name)

    def check_pinned(
        self, before: Sequence[int], after: Sequence[int], served: Collection[str] | None = None
    ) -> tuple[Check, ...]:
        """Check whether an ensemble would lose a version it asks for by number.

        Args:
            before: versions served now. Those absent from `after` count as lost.
            after: the versions served after the roll-out.
            served: models that the server serves. `None`: all ensembles are to be served.
        """
        return check_pinned(self.name, self.pinned, before, after, self.options, served)

    def refused_version(self, serving: Mapping[str, tuple[int, ...]]) -> tuple[Check, ...]:
        """Check the version before anything else is asked, and refuse it; `serving` as in `check_version`.

        Raises:
            RepositoryError: an ensemble asks for a version that leaves, and `drop_pinned` is off.
        """
        checks = self.check_version(serving)
        refuse(self.what, checks, self.options)
        return checks

    def leave_out(self, label: str, exc: ServerUnreachableError) -> None:
        """Go on without a silent server. `check_missing` says whether allowed."""
        with self._lock:
            self.missing[label] = exc
            count = len(self.missing)
        if self.total > 1:
            self.note(f"{label} does not answer ({count} of at most {self.may_miss} that may be missing)")

    def check_missing(self) -> None:
        """Check whether the missing servers are within the limit.

        Raises:
            ServerUnreachableError: it is one too many. With each one's reason.
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
