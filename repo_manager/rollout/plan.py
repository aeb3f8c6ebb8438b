"""The effect of a roll-out, predicted from Triton's reload rules (docs/triton-reload.md) before anything is
changed."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Collection, Iterator, Sequence

from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.scan import ModelEntry, find_model
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_state
from repo_manager.rollout.observe import ServedState, observe
from repo_manager.rollout.prediction.files import Fingerprint, read_fingerprint
from repo_manager.rollout.prediction.rules import (
    IN_PLACE,
    INSTANCES,
    VersionFate,
    VersionPlan,
    changed_config_fields,
    instances_differ,
)
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, takes_sequences

__all__ = [
    "Obstacle",
    "Relative",
    "RolloutPlan",
    "VersionFate",
    "VersionPlan",
    "differing_fields",
    "hidden_changes",
    "obstacle_of",
    "plan_deploy",
    "plan_from",
    "plan_undeploy",
]

_CLOCKS_APART_NS = 60 * 10**9  # a file server's clock may run this far ahead of ours


@dataclasses.dataclass(frozen=True)
class Relative:
    """A model a roll-out of another one touches.

    Attributes:
        model: name of the other model.
        versions: versions served now, or after the roll-out.
        reason: its relation to the other one: a part of it, or an ensemble of it.
    """

    model: str
    versions: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """A roll-out before it happens.

    Attributes:
        model: name of the model to roll out.
        version: the version to serve. `None`: none of the model will be.
        url: address of the server, as given, or `a server to be started`.
        ready_before: versions READY when the server was asked, ascending.
        ready_after: versions READY after the roll-out.
        policy_before: the repository's policy as it is in config.pbtxt: versions, `latest:n` or `all`.
        steps: action and reason for each version served now or afterwards, ascending.
        peak_bytes: size of the version folders loaded at the same time, at the worst moment.
        new_bytes: size of the folders still to be loaded, the room the server needs now.
        notes: remarks, on a difference between the server's configuration and the repository's for instance.
        brings: needed models not served yet. They are served and proven first, and undone with it.
        dependents: served models in need of it. They are asked after each change.
    """

    model: str
    version: int | None
    url: str
    ready_before: tuple[int, ...]
    ready_after: tuple[int, ...]
    policy_before: tuple[int, ...] | str
    steps: tuple[VersionPlan, ...]
    peak_bytes: int
    new_bytes: int
    notes: tuple[str, ...]
    brings: tuple[Relative, ...] = ()
    dependents: tuple[Relative, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything must be done, on the server or in config.pbtxt."""
        moves = any(step.action is not VersionFate.KEEP for step in self.steps)
        return moves or bool(self.brings) or self.policy_before != self.ready_after

    @property
    def is_hindered(self) -> bool:
        """Whether a load alone would do nothing."""
        return any(step.action is VersionFate.NOTHING for step in self.steps)


def plan_deploy(
    repository: Location, name: str, version: int, client: TritonClient, *, keep_previous: bool = False
) -> RolloutPlan:
    """Predict the effect of deploying a version. Nothing is changed.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model, in the repository and on the server.
        version: the version to deploy. It must be in the repository.
        client: connected client of the server.
        keep_previous: keep the previous version loaded.

    Raises:
        RepositoryError: no such model or version.
        ServerError: the server does not answer.
    """
    entry = find_model(repository, name)
    entry.version(version)
    return plan_from(
        entry, version, observe(client, name), keep_previous=keep_previous, obstacle=obstacle_of(repository, entry)
    )


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why the server would answer a load with 200 and do nothing.

    Attributes:
        reason: why the load would do nothing, for a person.
        always: on any change, else only where the server differs from a repository unchanged since.
        way_out: the roll-out's remedy in words, appended to the reason of the version.
    """

    reason: str
    always: bool
    way_out: str


_AZURE = Obstacle(
    "Triton sees no change on Azure Blob Storage (server#6958)",
    always=True,
    way_out="the model is unloaded and loaded, and answers nothing until then",
)
_OVERRIDE = Obstacle(
    "config.pbtxt has not changed since the last deployment, so a configuration sent with a load is in the way",
    always=False,
    way_out="config.pbtxt is written again first, which drops it",
)


def obstacle_of(repository: Location, entry: ModelEntry) -> Obstacle | None:
    """Return the known obstacle to a load alone, or `None`.

    Where the server's configuration is not the file's although the file is older than the last deployment, the server
    runs another one sent by the load API. Files in object storage have no times to judge by.
    """
    if not open_store(repository).traits.changes_visible:
        return _AZURE
    deployments = model_state(repository, entry.name).deployments
    folder = local_folder(entry.path)
    if not deployments or folder is None:
        return None
    try:
        written = (folder / CONFIG_FILENAME).stat().st_mtime
    except OSError:
        return None
    return _OVERRIDE if written <= _seconds(deployments[-1].at) else None


def _seconds(at: str) -> float:
    # Python 3.10 does not parse the `Z`.
    return datetime.datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def _files(entry: ModelEntry) -> tuple[Fingerprint, Fingerprint] | None:
    """Return the model's folder as it is, and as a load at the last deployment can have seen it at most.

    `None` where it is not known: nothing was deployed yet, or the files are in object storage.
    """
    folder = local_folder(entry.path)
    if folder is None:
        return None
    now, deployments = read_fingerprint(folder), model_state(folder.parent, entry.name).deployments
    if now is None or not deployments:
        return None
    return now, now.as_of(round(_seconds(deployments[-1].at) * 1e9))


def plan_from(
    entry: ModelEntry,
    version: int,
    served: ServedState,
    *,
    keep_previous: bool,
    pinned: Collection[int] = (),
    obstacle: Obstacle | None = None,
) -> RolloutPlan:
    """Predict from the state of the repository and the server.

    Args:
        entry: the model and its versions, as `scan` lists them.
        version: the version to serve. Whether `entry` has it is not checked.
        served: the server's versions and configuration now.
        keep_previous: leave the newest other version served, and those pinned.
        pinned: versions ensembles ask for by number. Without `keep_previous` they change nothing.
        obstacle: reason why a load would do nothing. `None`: there is none.
    """
    existing = {each.version for each in entry.versions}
    others = (set(served.ready) & existing) - {version}
    kept = {max(others), *(others & set(pinned))} if keep_previous and others else set()
    after = tuple(sorted({version} | kept))
    config = entry.config()
    changed = differing_fields(config, served.config)
    steps = [_step(each, after, served, changed, _hindered(entry, after, obstacle)) for each in {*after, *served.ready}]
    files = _files(entry)
    if files is not None and (entry.policy != after or not set(after) <= set(served.ready)):
        steps = [_with_files(step, *files) for step in steps]
    notes = list(hidden_changes(entry))
    if config is not None and config.unknown_fields:
        fields = ", ".join(config.unknown_fields)
        notes.append(
            f"config.pbtxt has fields that a Triton which does not know them refuses at the next load: {fields}"
        )
    gone = sorted(set(served.ready) - existing)
    if gone:
        numbers = ", ".join(map(str, gone))
        notes.append(f"version {numbers} is served, but its folder is gone: once dropped it cannot be loaded again")
    if config is not None and served.ready and takes_sequences(config.message()):
        notes += _ending_sequences(entry.name, served.ready, after, steps)
    sizes = {each.version: each.size_bytes or 0 for each in entry.versions}
    coming = {step.version for step in steps if step.version in after and step.version not in served.ready}
    twice = {step.version for step in steps if step.version in served.ready and step.action in _LOADS}
    return RolloutPlan(
        model=entry.name,
        version=version,
        url=served.url,
        ready_before=served.ready,
        ready_after=after,
        policy_before=entry.policy,
        steps=tuple(sorted(steps, key=lambda step: step.version)),
        peak_bytes=sum(sizes.get(each, 0) for each in (*served.ready, *coming, *twice)),
        new_bytes=sum(sizes.get(each, 0) for each in (*coming, *twice)),
        notes=tuple(notes),
    )


def _ending_sequences(
    name: str, ready: tuple[int, ...], after: tuple[int, ...], steps: Sequence[VersionPlan]
) -> Iterator[str]:
    """Name the live sequences that lose their state: Triton keeps it in the answering version."""
    asked = max(ready)  # by requests without a version
    if asked != max(after):
        kept = " Those that name it go on." if asked in after else ""
        yield (
            f"sequences of {name} that are live end: their next request goes to version {max(after)}, which has not "
            f"seen their first one, so Triton refuses it.{kept}"
        )
    elif any(step.version == asked and step.action in _LOADS for step in steps):
        yield f"sequences of {name} that are live end: version {asked} is loaded again, without their state"


def plan_undeploy(
    entry: ModelEntry, served: ServedState, after: tuple[int, ...], *, keeps: Sequence[str] = ()
) -> RolloutPlan:
    """Describe the effect of taking a model or a version out of service.

    Args:
        entry: the model and its versions, as `scan` lists them.
        served: the server's versions and configuration now.
        after: the versions to keep, ascending. Empty: the whole model leaves.
        keeps: models it needs. They stay served.
    """
    steps = [
        VersionPlan(version, VersionFate.KEEP, "it stays")
        if version in after
        else VersionPlan(version, VersionFate.DROP, "it is undeployed")
        for version in served.ready
    ]
    notes = [f"{', '.join(keeps)}: needed by it only where it is served; undeploy leaves them as they are"]
    return RolloutPlan(
        model=entry.name,
        version=max(after, default=None),
        url=served.url,
        ready_before=served.ready,
        ready_after=after,
        policy_before=entry.policy,
        steps=tuple(steps),
        peak_bytes=0,
        new_bytes=0,
        notes=tuple(notes) if keeps else (),
    )


_LOADS = (VersionFate.LOAD, VersionFate.RELOAD, VersionFate.NOTHING)


def _with_files(step: VersionPlan, now: Fingerprint, deployed: Fingerprint) -> VersionPlan:
    """Return the fate of a version whose files have changed since the last deployment: the next load reloads it."""
    if step.action not in (VersionFate.KEEP, VersionFate.UPDATE) or now.version_ns(step.version) <= deployed.version_ns(
        step.version
    ):
        return step
    own = now.times_ns.get(str(step.version), 0) > deployed.version_ns(step.version)
    what = "its folder has" if own else f"{now.newest_beside}, beside the versions, has"
    return VersionPlan(step.version, VersionFate.RELOAD, f"{what} changed since the last deployment")


def hidden_changes(entry: ModelEntry) -> tuple[str, ...]:
    """Name the obstacles that hide all changes of a model's folder from Triton. Empty when nothing does."""
    folder = local_folder(entry.path)
    now = None if folder is None else read_fingerprint(folder)
    if now is None:
        return ()
    if now.lookalikes:
        return (
            f"{', '.join(now.lookalikes)} in the model's folder is taken for a second {CONFIG_FILENAME}: Triton sees "
            "no change of the model until it is removed",
        )
    if now.newest_ns > time.time_ns() + _CLOCKS_APART_NS:
        return (
            f"{now.newest_entry} is dated ahead: once Triton has loaded it, it sees no change until then; touch the "
            "file, then unload the model and load it",
        )
    return ()


def _hindered(entry: ModelEntry, after: tuple[int, ...], obstacle: Obstacle | None) -> Obstacle | None:
    """Return the obstacle if it is in the way of this change.

    An override does not when the policy changes: config.pbtxt is then newer, and Triton drops the override.
    """
    if obstacle is None or obstacle.always or entry.policy == after:
        return obstacle
    return None


def _step(
    version: int, after: tuple[int, ...], served: ServedState, changed: tuple[str, ...], obstacle: Obstacle | None
) -> VersionPlan:
    """Return one version's fate."""
    fields = ", ".join(changed)
    if version not in after:
        action, reason = VersionFate.DROP, "it is not among the versions to serve"
    elif version not in served.ready:
        # Triton serves another version under this policy, so another load does not change this.
        stuck = obstacle is not None and (obstacle.always or bool(served.ready)) and version not in served.reasons
        action = VersionFate.NOTHING if stuck else VersionFate.LOAD
        reason = served.reasons.get(version) or "it is not loaded"
    elif changed:
        in_place = changed == (INSTANCES,)
        action = VersionFate.NOTHING if obstacle is not None else VersionFate.UPDATE if in_place else VersionFate.RELOAD
        reason = IN_PLACE if in_place else f"config.pbtxt differs from the loaded one in {fields}"
    else:
        action, reason = VersionFate.KEEP, "it is loaded, and nothing that it depends on has changed"
    if action is VersionFate.NOTHING and obstacle is not None:
        reason = f"{reason}, and a load would do nothing: {obstacle.reason}. So {obstacle.way_out}"
    return VersionPlan(version, action, reason)


def differing_fields(repository: ModelConfig | None, served: ModelConfig | None) -> tuple[str, ...]:
    """Return the fields where the server's configuration differs from config.pbtxt, except for the version policy.

    Fields absent from the file and filled in by the server are no difference.

    Args:
        repository: configuration of the repository. `None`: there is none.
        served: configuration the server runs. `None`: unknown.
    """
    if repository is None or served is None:
        return ()
    instances = (INSTANCES,) if instances_differ(served, repository) else ()
    return (*changed_config_fields(served, repository), *instances)
