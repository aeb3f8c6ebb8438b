"""The one engine of every roll-out: lease, look, checks, apply, prove, finish, record, or undo.

Signals, the deadline and the rule for unexpected errors are here and nowhere else: whatever goes wrong once something
was touched, expected or not, on whatever target, ends in the same undo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from repo_manager.errors import (
    GateError,
    InconclusiveError,
    RepoManagerError,
    RepositoryError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerUnreachableError,
)
from repo_manager.repository.state import RolloutRecord, record_of
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import begin_trial, end_trial, record_deployment, record_rollout
from repo_manager.rollout.calls import in_waves
from repo_manager.rollout.checks import refuse
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.base import LeftAloneError, Part, Target

__all__ = ["as_interrupts", "run"]

# Servers undone at once. An undo costs a Triton server nothing.
_WIDE = 16
_PARTICIPLES = {"deploy": "deployed", "rollback": "deployed", "undeploy": "undeployed"}


def run(target: Target, context: RolloutContext) -> Rollout:
    """Roll a version out to a target, or undo it.

    Args:
        target: servers or objects in a cluster, the parts to change.
        context: the roll-out's context: model, options, deadline, report.

    Returns:
        The roll-out's result. A version served already is left as it is, and proven by an inference.

    Raises:
        RepositoryError: a check speaks against it, or another roll-out of the model is under way.
        ServerError: it failed before anything was touched.
        GateError: a gate of the trial failed. The previous state was put back.
        InconclusiveError: a gate of the trial is undecided. The previous state was put back.
        RolloutUndoneError: it failed, and the previous state was put back and verified.
        ServerUnreachableError: it failed, the repository was put back, and no touched server answers any more.
        RollbackFailedError: it failed, and so did putting the previous state back.
    """
    if context.options.dry_run:
        return _Run(target, context, lambda: "").plan()
    lease = open_store(context.repository).lease(context.name, timeout_s=context.options.lease_timeout_s)
    with lease as other_holder, as_interrupts():
        context.confirm()
        return _Run(target, context, other_holder).go()


@dataclasses.dataclass
class _Undone:
    """How far an undo came."""

    states: list[str] = dataclasses.field(default_factory=list)
    silent: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    by_hand: list[str] = dataclasses.field(default_factory=list)


class _Run:
    """One roll-out, from a look at the target to the proof on all its parts.

    Args:
        target: servers or objects in a cluster, the parts to change.
        context: the change, its options and the time left.
        other_holder: returns who else holds the model's lease by now. Empty while it is ours.
    """

    def __init__(self, target: Target, context: RolloutContext, other_holder: Callable[[], str]) -> None:
        self._target, self._context, self._other_holder = target, context, other_holder
        self._parts: list[Part] = []
        self._done = 0
        self._begun = False
        self._lock = threading.Lock()

    def plan(self) -> Rollout:
        """Return the plan as a result, with the objections to it."""
        self._target.look()
        self._parts = list(self._target.parts)
        self._target.check()
        return self._result()

    def go(self) -> Rollout:
        """Make the changes, and prove them."""
        context, target = self._context, self._target
        context.settle()
        target.look()
        self._parts = list(target.parts)
        target.check()
        served_by = () if target.changes else tuple(part.label for part in self._parts)
        for part in self._parts:
            refuse(context.what, part.checks, context.options, served_by=served_by, action=context.action)
        before = target.before if target.changes else None
        try:
            if before is not None:
                self._begun = True
                begin_trial(context.repository, context.name, context.version, before)
            if target.changes:
                self._in_batches(self._bring_up)
                self._in_batches(self._finish)
            else:
                self._in_batches(lambda part: part.prove())
            for name, versions in target.brought.items():
                record_deployment(context.repository, name, versions[-1])
            result = self._result()
            record = self._record("done") if result.changed else None
            served = {version for server in result.servers for version in server.previous} & set(before or ())
            record_deployment(context.repository, context.name, result.version, record, before=served)
        except BaseException as exc:
            error = self._undo(exc)
            expected = isinstance(exc, RepoManagerError | KeyboardInterrupt | OSError)
            if error is exc:
                raise
            if not expected and not isinstance(error, RollbackFailedError):
                context.note(error.message.rpartition("\n")[2])
                raise  # a bug of ours keeps its traceback, but its changes are undone
            raise error from exc
        return result

    def _bring_up(self, part: Part) -> None:
        part.apply()
        part.prove()
        if not self._context.leaves:
            self._progress(part, "serves it too")

    def _finish(self, part: Part) -> None:
        part.finish()
        self._progress(part, "no longer serves it" if self._context.leaves else "serves it")

    def _record(self, outcome: str, reason: str = "") -> RolloutRecord:
        """Return this roll-out's entry in the history."""
        context = self._context
        before = sorted({version for part in self._target.parts for version in part.result().previous})
        version = None if context.whole else context.version
        target = self._target.describe()
        return record_of(
            context.action, version, before, target, outcome=outcome, reason=reason, context=context.options.context
        )

    def _in_batches(self, act: Callable[[Part], None]) -> None:
        """Act on every part still answering, a batch at a time."""
        context = self._context

        def act_on(part: Part) -> None:
            self._require_lease()
            try:
                act(part)
            except ServerUnreachableError as exc:
                if context.deadline.left_s <= 0:
                    raise  # the time is up: this server is not to blame
                context.leave_out(part.label, exc)
                context.check_missing()

        self._done = 0
        waiting = list(self._parts)
        while waiting:
            # Each wave is one call, so an error in a wave stops the next one.
            wave, waiting = waiting[: self._target.batch], waiting[self._target.batch :]
            in_waves(wave, self._target.batch, act_on)
        self._parts = [part for part in self._parts if part.label not in context.missing]

    def _require_lease(self) -> None:
        """Check that no other process rolls the model out by now: a lease not renewed in time goes to the next.

        Raises:
            RepositoryError: another process does.
        """
        other = self._other_holder()
        if other:
            raise RepositoryError(f"the lease of {self._context.name} was lost: {other}")

    def _progress(self, part: Part, what: str) -> None:
        if len(self._parts) > 1:
            with self._lock:
                self._done += 1
                self._context.note(f"{part.label}: {what} ({self._done} of {len(self._parts)})")

    def _undo(self, cause: BaseException) -> RepoManagerError:
        """Put back whatever was touched. Return the message for the user."""
        context = self._context
        context.halt()
        failure = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause) or type(cause).__name__
        what = f"{context.what} was not {_PARTICIPLES[context.action]}: {failure}"
        touched = [part for part in self._target.parts if part.touched]
        if not touched:
            self._end_trial()
            nothing = RolloutUndoneError(f"{what}\nNothing was changed.")
            return cause if isinstance(cause, RepoManagerError) else nothing
        undone = _Undone()
        try:
            self._require_lease()  # keeps a newer roll-out by another process
            self._target.put_back()  # first, so a server that starts now reads the old files
            context.note(f"failed: {failure.splitlines()[0]}; putting {_count(touched)} back")
            in_waves(touched[::-1], min(_WIDE, len(touched)), lambda part: _undo_part(part, undone))
        except BaseException as exc:  # noqa: BLE001 - after any error, the user must know that a person has to act
            undone.failed.append("interrupted again" if isinstance(exc, KeyboardInterrupt) else _words(exc))
            undone.by_hand += [part.by_hand() for part in touched]
        if not undone.failed:
            self._end_trial()
        self._record_failure("failed" if undone.failed else "undone", failure)
        return _verdict(what, cause, undone, len(touched))

    def _record_failure(self, outcome: str, failure: str) -> None:
        """Keep it in the history, where that can be written: the roll-out matters more than its record."""
        context = self._context
        with contextlib.suppress(Exception):
            record_rollout(context.repository, context.name, self._record(outcome, failure.splitlines()[0]))

    def _end_trial(self) -> None:
        """Forget the trial. A leftover record does no harm, since the next command looks at the servers."""
        if self._begun:
            with contextlib.suppress(RepoManagerError, OSError):
                end_trial(self._context.repository, self._context.name)

    def _result(self) -> Rollout:
        context, target = self._context, self._target
        servers = tuple(part.result() for part in self._parts)
        left = {version for server in servers for version in context.remaining(server.ready)}
        return Rollout(
            model=context.name,
            version=max(left, default=None) if context.leaves else context.version,
            target=target.describe(),
            servers=servers,
            unavailable=tuple(context.missing),
            batch=target.batch,
            changed=not context.options.dry_run and any(server.changed for server in servers),
            dry_run=context.options.dry_run,
            trial=target.trial,
            seconds=time.monotonic() - context.began,
            events=tuple(context.events),
            action=context.action,
        )


def _undo_part(part: Part, undone: _Undone) -> None:
    """Undo one part. A failure does not keep the others from being undone."""
    try:
        undone.states.append(part.undo())
    except LeftAloneError as exc:
        undone.left.append(exc.message)
    except ServerUnreachableError as exc:
        undone.silent.append(f"{part.label} does not answer ({exc.message})")
    except Exception as exc:  # noqa: BLE001 - a bug in one part must not stop the undo of the others
        undone.failed.append(f"{part.label}: {_words(exc)}")
        undone.by_hand.append(part.by_hand())


def _verdict(what: str, cause: BaseException, undone: _Undone, touched: int) -> RepoManagerError:
    """Return an error with the outcome of a roll-out and its undo."""
    if undone.failed:
        return RollbackFailedError(
            f"{what}\nPutting the previous state back failed: " + "; ".join(undone.failed),
            hint="\n".join(dict.fromkeys(undone.by_hand)),
        )
    if undone.silent and not undone.states:
        server = "the server does" if touched == 1 else "the servers do"
        return ServerUnreachableError(
            f"{what}\nconfig.pbtxt is as it was before, but {server} not answer any more: " + "; ".join(undone.silent),
            hint="A server whose start loads the model has its previous versions then. A running one may serve both: "
            "run the same command again once it answers.",
        )
    left = f"{'; '.join(sorted(undone.left))}." if undone.left else ""
    if undone.left and not undone.states + undone.silent:
        message = f"{what}\nNothing was put back: {left}"
    else:
        message = f"{what}\nThe previous state was put back: {'; '.join(sorted(undone.states + undone.silent))}."
        message += f" But {left}" if left else ""
    if isinstance(cause, GateError | InconclusiveError):
        return type(cause)(message)  # a gate keeps its exit code, and the message holds its hint
    return RolloutUndoneError(message)


def _words(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__


def _count(parts: Sequence[Part]) -> str:
    return parts[0].label if len(parts) == 1 else f"{len(parts)} servers"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP, too (in the main thread; elsewhere nothing changes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            previous[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
