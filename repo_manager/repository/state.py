"""What a repository remembers its folders cannot say: numbers given out, deployments, tags.

It is one hidden file in the root, where Triton ignores files, so it travels with every copy of the repository. No
served version depends on it: without it the numbers go on from the highest version on disk, and only the roll-back
target and the tags are lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from repo_manager.errors import RepositoryError

__all__ = [
    "Deployment",
    "KeptLoadTest",
    "ModelState",
    "RolloutRecord",
    "Unproven",
    "current_version",
    "history_of",
    "now_text",
    "previous_version",
    "record_of",
]

_MAX_DEPLOYMENTS = 50
_MAX_HISTORY = 100
_MAX_LOAD_TESTS, _MAX_LOAD_TESTS_OF_VERSION = 40, 5
_OTHER_NUMBER = "Take the next free number there: --new-number."
_MAX_SKIPPED = 1000


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One change of the served versions.

    Attributes:
        version: the version deployed. `None`: the model was taken out of service.
        at: when, UTC, ISO 8601. Of versions others had put into service, the moment they were found.
    """

    version: int | None
    at: str


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """One roll-out as `history` shows it, whether it succeeded or not.

    Attributes:
        at: when it ended, UTC, ISO 8601.
        action: `deploy`, `rollback` or `undeploy`. Empty when the record does not say.
        version: the version deployed or taken out. `None`: every version of the model.
        before: the versions served before. Empty when none was.
        target: address of the roll-out: the servers' URLs, `k8s://...` or `kserve://...`.
        outcome: `done`. `undone`: it failed, and the previous state was put back. `failed`: so did putting it back.
        by: the user and the machine, `user@host`. With a context of the settings `user@host (NAME)`.
        reason: why it failed, in one line. Empty when it did not.
        extra: fields of a newer repo-manager, kept as they are.
    """

    at: str
    action: str
    version: int | None
    before: tuple[int, ...]
    target: str
    outcome: str
    by: str
    reason: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> RolloutRecord:
        """Read a record as it is in a state file. Missing fields are empty.

        Raises:
            TypeError, ValueError, AttributeError: it is damaged.
        """
        texts = {name: str(entry.get(name, "")) for name in ("at", "action", "target", "outcome", "by", "reason")}
        version = entry.get("version")
        return cls(
            **texts,
            version=None if version is None else int(version),
            before=tuple(int(each) for each in entry.get("before", ())),
            extra={key: value for key, value in entry.items() if key not in {*texts, "version", "before"}},
        )

    def format(self) -> dict[str, Any]:
        """Return it as a state file holds it."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        return {**self.extra, **own}


@dataclasses.dataclass(frozen=True)
class KeptLoadTest:
    """A load test of a version.

    Attributes:
        version: number of the version under load.
        report: as JSON, without the data only charts need.
    """

    version: int
    report: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Unproven:
    """A version a roll-out has begun to serve and has not proven. The remains of a killed roll-out.

    Attributes:
        version: number of the version not proven.
        before: the versions served before, to go back to. Empty when nothing was.
        at: since when, UTC, ISO 8601.
    """

    version: int
    before: tuple[int, ...]
    at: str


@dataclasses.dataclass(frozen=True)
class ModelState:
    """The record of one model.

    Attributes:
        highest_version: the highest number ever given out. 0 when none.
        skipped: numbers below it, never given out because a copy kept its number. The last 1,000 of them.
        deployments: oldest first. The last one is current.
        tags: tag -> number of its version. A version may have several.
        unproven: the version on trial. `None` when none is.
        history: roll-outs, the latest last. Those of repo-manager releases without a history are in `deployments`
            alone.
        load_tests: those kept, the latest last.
        extra: fields of a newer repo-manager, kept as they are.
    """

    highest_version: int = 0
    skipped: tuple[int, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    tags: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unproven: Unproven | None = None
    history: tuple[RolloutRecord, ...] = ()
    load_tests: tuple[KeptLoadTest, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_deployed(self) -> bool:
        """Whether the last successful roll-out left a version in service."""
        return current_version(self) is not None

    def deployed(self, version: int | None) -> ModelState:
        """Return the state after a deployment now, `None`: of nothing. A repetition of the current one changes
        nothing.

        A model never deployed is not taken out of service either.

        Args:
            version: version of the model. `None`: the newest, or the server's choice.
        """
        if current_version(self) == version:
            return dataclasses.replace(self, unproven=None)
        history = (*self.deployments, Deployment(version, now_text("microseconds")))
        return dataclasses.replace(self, deployments=history[-_MAX_DEPLOYMENTS:], unproven=None)

    def recorded(self, record: RolloutRecord) -> ModelState:
        """Return the state with a roll-out in its history."""
        return dataclasses.replace(self, history=(*self.history, record)[-_MAX_HISTORY:])

    def measured(self, test: KeptLoadTest) -> ModelState:
        """Return the state with a load test. The latest five of a version stay, and forty of the model."""
        kept = (*self.load_tests, test)
        surplus = [each for each in kept if each.version == test.version][:-_MAX_LOAD_TESTS_OF_VERSION]
        kept = tuple(each for each in kept if each not in surplus)
        return dataclasses.replace(self, load_tests=kept[-_MAX_LOAD_TESTS:])

    def found(self, served: Collection[int]) -> ModelState:
        """Return the state after versions were found to be served. Those the record knows change nothing."""
        if not served or current_version(self) in served:
            return self
        return self.deployed(max(served))

    def numbered(self, version: int) -> ModelState:
        """Return the state after `version` was given out, and perhaps every number below it."""
        return dataclasses.replace(self, highest_version=max(self.highest_version, version))

    def number_for(self, wanted: int | None, used: Sequence[int]) -> int:
        """Return the number for a new version.

        Args:
            wanted: the number it must have. `None` takes the next one.
            used: numbers present in the repository, whatever the record says.

        Raises:
            RepositoryError: the wanted number is in use, or was given out before.
        """
        highest = max(0, self.highest_version, *used)
        if wanted is None:
            return highest + 1
        if wanted in used:
            raise RepositoryError(f"version {wanted} is there already, with other content", hint=_OTHER_NUMBER)
        if wanted <= highest and wanted not in self.skipped:
            raise RepositoryError(
                f"version {wanted} may have been there before: numbers up to {highest} are given out, and none is "
                "given out twice",
                hint=_OTHER_NUMBER,
            )
        return wanted

    def given_out(self, version: int, used: Sequence[int], *, kept: bool = False) -> ModelState:
        """Return the state after `number_for` gave out a version. It remembers the numbers in between as free.

        Args:
            version: number from `number_for`. It is not free any more, unless `kept`.
            used: numbers of existing versions, as for `number_for`.
            kept: it stays free until the version is there, so a copy killed can be made again.
        """
        between = range(max(0, self.highest_version, *used) + 1, version)
        own = (version,) if kept else ()
        skipped = (*self.without_free(version).skipped, *between[-_MAX_SKIPPED:], *own)
        return dataclasses.replace(self.numbered(version), skipped=skipped[-_MAX_SKIPPED:])

    def without_free(self, *versions: int) -> ModelState:
        """Return the state with these numbers no longer free."""
        return dataclasses.replace(self, skipped=tuple(each for each in self.skipped if each not in versions))


def record_of(
    action: str,
    version: int | None,
    before: Sequence[int],
    target: str,
    *,
    outcome: str = "done",
    reason: str = "",
    context: str | None = None,
) -> RolloutRecord:
    """Return a record of a roll-out this process ends now. Its fields as in `RolloutRecord`.

    Args:
        action: the command that ends: `deploy`, `rollback` or `undeploy`. Not checked.
        version: version rolled out. `None`: the model was taken out of service.
        before: versions served before the roll-out. Empty: none was.
        target: address of the roll-out: the servers' URLs, `k8s://...` or `kserve://...`.
        outcome: `done`, `undone` (it failed, and was put back) or `failed` (so did putting it back).
        reason: reason, as the error message quotes it.
        context: name of the context. `None`: no context was used.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have a number and no name
        user = str(os.getuid())
    by = f"{user}@{socket.gethostname()}" + (f" ({context})" if context else "")
    return RolloutRecord(now_text("microseconds"), action, version, tuple(before), target, outcome, by, reason)


def history_of(state: ModelState) -> tuple[RolloutRecord, ...]:
    """Return a model's roll-outs, oldest first. Of those before there was a history only version and time are known."""
    first = state.history[0].at if state.history else None
    older = [each for each in state.deployments if first is None or each.at < first]
    known = [
        RolloutRecord(each.at, "deploy" if each.version else "undeploy", each.version, (), "", "done", "")
        for each in older
    ]
    return (*known, *state.history)


def now_text(timespec: str = "seconds") -> str:
    """Return the time now, UTC, ISO 8601, to the second or as `datetime.isoformat` takes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def current_version(state: ModelState) -> int | None:
    """Return the version of the last recorded deployment, or `None` when there is none, or it was taken out of
    service.
    """
    return state.deployments[-1].version if state.deployments else None


def previous_version(state: ModelState, existing: tuple[int, ...]) -> int | None:
    """Return the version to go back to: the last existing one deployed before the current one.

    While another version is on trial, the current one is meant.
    """
    current = current_version(state)
    if state.unproven is not None and state.unproven.version != current and current in existing:
        return current
    for deployment in reversed(state.deployments):
        if deployment.version != current and deployment.version in existing:
            return deployment.version
    return None
