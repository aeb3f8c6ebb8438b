"""What a roll-out will do, predicted from Triton's reload rules (docs/triton-reload.md) before anything is changed."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from repo_manager.repository import Location, ModelEntry, find_model
from repo_manager.rollout.observe import ServedState, observe
from repo_manager.server import TritonClient
from repo_manager.triton_config import ModelConfig

__all__ = ["Action", "RolloutPlan", "VersionPlan", "changed_fields", "plan_deploy", "plan_from"]

# triton-inference-server/core, `ModelLifeCycle`: a change of these alone reloads nothing.
_FREE_FIELDS = ("version_policy", "instance_group")


class Action(str, enum.Enum):
    """What the server will do with one version."""

    LOAD = "load"
    KEEP = "keep"
    RELOAD = "reload"
    DROP = "drop"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class VersionPlan:
    """One version's fate and why."""

    version: int
    action: Action
    reason: str


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """A roll-out before it happens.

    Attributes:
        model: the model.
        version: the version that will be served.
        url: the server.
        ready_before: versions that are READY now.
        ready_after: versions that will be.
        policy_before: the repository's policy as it stands in config.pbtxt: versions, `latest:n` or `all`.
        steps: every version's fate.
        peak_bytes: size of the version folders that are loaded at the same time, at the worst moment.
        notes: what is worth knowing, a difference between the server's configuration and the repository's for instance.
    """

    model: str
    version: int
    url: str
    ready_before: tuple[int, ...]
    ready_after: tuple[int, ...]
    policy_before: tuple[int, ...] | str
    steps: tuple[VersionPlan, ...]
    peak_bytes: int
    notes: tuple[str, ...]

    @property
    def changes(self) -> bool:
        """Whether anything has to be done, on the server or in config.pbtxt."""
        return any(step.action is not Action.KEEP for step in self.steps) or self.policy_before != self.ready_after


def plan_deploy(
    repository: Location, name: str, version: int, client: TritonClient, *, keep_previous: bool = False
) -> RolloutPlan:
    """Predict what deploying a version will do; nothing is changed.

    Raises:
        RepositoryError: no such model or version.
        ServerError: the server does not answer.
    """
    entry = find_model(repository, name)
    entry.version(version)
    return plan_from(entry, version, observe(client, name), keep_previous=keep_previous)


def plan_from(entry: ModelEntry, version: int, served: ServedState, *, keep_previous: bool) -> RolloutPlan:
    """Predict from what the repository and the server say."""
    config = entry.config()
    existing = {each.version for each in entry.versions}
    others = (set(served.ready) & existing) - {version}
    kept = {max(others)} if keep_previous and others else set()
    after = tuple(sorted({version} | kept))
    changed = changed_fields(config, served.config)
    steps = []
    for each in sorted({*after, *served.ready}):
        if each not in after:
            steps.append(VersionPlan(each, Action.DROP, "it is not among the versions to serve"))
        elif each not in served.ready:
            steps.append(VersionPlan(each, Action.LOAD, served.reasons.get(each) or "it is not loaded"))
        elif changed:
            fields = ", ".join(changed)
            steps.append(VersionPlan(each, Action.RELOAD, f"config.pbtxt differs from the loaded one in {fields}"))
        else:
            steps.append(VersionPlan(each, Action.KEEP, "it is loaded, and nothing that it depends on has changed"))
    notes = []
    gone = sorted(set(served.ready) - existing)
    if gone:
        numbers = ", ".join(map(str, gone))
        notes.append(f"version {numbers} is served, but its folder is gone: once dropped it cannot be loaded again")
    sizes = {each.version: each.size_bytes or 0 for each in entry.versions}
    loaded = set(served.ready) | {step.version for step in steps if step.action is Action.LOAD}
    twice = {step.version for step in steps if step.action is Action.RELOAD}
    return RolloutPlan(
        model=entry.name,
        version=version,
        url=served.url,
        ready_before=served.ready,
        ready_after=after,
        policy_before=entry.policy,
        steps=tuple(steps),
        peak_bytes=sum(sizes.get(each, 0) for each in loaded) + sum(sizes.get(each, 0) for each in twice),
        notes=tuple(notes),
    )


def changed_fields(repository: ModelConfig | None, served: ModelConfig | None) -> tuple[str, ...]:
    """Return the fields that the repository's configuration sets otherwise than the server runs with.

    The server fills in defaults, so only what config.pbtxt says is compared.
    """
    if repository is None or served is None:
        return ()
    free = (*_FREE_FIELDS, "name")
    return tuple(name for name in _different(repository.message(), served.message()) if name not in free)


def _different(ours: Any, theirs: Any) -> list[str]:
    """Return the fields that one message sets and that are not so in the other."""
    return [
        field.name
        for field, value in ours.ListFields()
        # An empty message is a setting too: `dynamic_batching {}`.
        if (field.has_presence and not theirs.HasField(field.name)) or not _within(value, getattr(theirs, field.name))
    ]


def _within(ours: Any, theirs: Any) -> bool:
    """Say whether everything that one value sets is so in the other."""
    if hasattr(ours, "ListFields"):
        return not _different(ours, theirs)
    if hasattr(ours, "items"):  # a map
        return all(key in theirs and _within(value, theirs[key]) for key, value in ours.items())
    if not isinstance(ours, str | bytes) and hasattr(ours, "__len__"):
        return len(ours) == len(theirs) and all(map(_within, ours, theirs))
    return bool(ours == theirs)
