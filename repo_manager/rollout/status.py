"""The served state against the repository's record of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ConfigError, ServerError, ServerRefusedError, ServerUnreachableError
from repo_manager.optional import deferred
from repo_manager.repository.location import Location
from repo_manager.repository.scan import ModelEntry, scan
from repo_manager.repository.state import Deployment, ModelState
from repo_manager.repository.tags import model_state
from repo_manager.rollout.observe import READY, ServedState, observe
from repo_manager.rollout.plan import differing_fields, obstacle_of
from repo_manager.rollout.targets.urls import To, connect, is_cluster
from repo_manager.server.client import TritonClient
from repo_manager.server.records import local_server
from repo_manager.server.transport import ClientOptions
from repo_manager.summary import Summarized
from repo_manager.triton_config.config import ModelConfig

if TYPE_CHECKING:
    from repo_manager.rollout import cluster_status
else:
    cluster_status = deferred("repo_manager.rollout.cluster_status")

__all__ = ["ModelStatus", "RepositoryStatus", "status"]


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """One model on one server.

    Attributes:
        model: name of a model of the repository. For others see `RepositoryStatus.strangers`.
        url: address of the server. `dns://` gives one entry for each address behind the name.
        ready: READY versions by the server's index, ascending. Empty: none is loaded.
        selected: versions the version policy of config.pbtxt selects.
        deployed: the version of the last recorded deployment. `None` when there is none, or it was undeployed since.
        deployed_at: time of the latest deployment, UTC, ISO 8601.
        overridden: fields a configuration sent with a load sets otherwise than config.pbtxt. A deploy drops it.
        started_at: when the server started, UTC, ISO 8601. `None` when it is not one of ours on this machine.
        restarts: how often `serve` has started it again after it had ended on its own. `None` as for `started_at`.
        restarted: whether it started after the last deployment. `None` as for `started_at`.
        differences: every difference between server and repository, in words. Empty when they agree.
    """

    model: str
    url: str
    ready: tuple[int, ...]
    selected: tuple[int, ...]
    deployed: int | None
    deployed_at: str | None
    overridden: tuple[str, ...]
    started_at: str | None
    restarts: int | None
    restarted: bool | None
    differences: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class RepositoryStatus(Summarized):
    """The served state of a repository.

    Attributes:
        models: one entry a model and server, server by server.
        unreachable: URL of each server without an answer -> why.
        strangers: URL of each server -> models it has loaded from elsewhere, as `NAME:VERSION`. Empty when the status
            is of one model.
        clusters: one entry a target in a cluster.
    """

    models: tuple[ModelStatus, ...]
    unreachable: Mapping[str, str]
    strangers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    clusters: tuple[cluster_status.ClusterStatus, ...] = ()

    def _summary(self) -> Mapping[str, Any]:
        differing = sum(bool(model.differences) for model in self.models)
        return {
            "models": ", ".join(f"{one.model} {list(one.ready)}" for one in self.models) or "none",
            "differing": differing,
            "unreachable": ", ".join(self.unreachable) or None,
            "clusters": ", ".join(each.target for each in self.clusters) or None,
        }


def status(
    repository: Location, to: To, names: Sequence[str] = (), *, connection: ClientOptions | None = None
) -> RepositoryStatus:
    """Compare servers with their repository. Nothing is changed.

    Args:
        repository: the repository the servers serve.
        to: connected clients or URLs, as for `deploy`. `k8s://` and `kserve://` may be among them.
        names: the models. Empty for all deployed or loaded ones.
        connection: how to connect to URLs. `None` connects without TLS and headers.

    Raises:
        UsageError: a URL is not understood.
        RepositoryError: the repository cannot be read.
        ServerUnreachableError: none of the servers answers.
    """
    given = (to,) if isinstance(to, str | TritonClient) else tuple(to)
    found: list[ModelStatus] = []
    silent: dict[str, ServerError] = {}
    strangers: dict[str, tuple[str, ...]] = {}
    clusters = _in_clusters(repository, [text for text in given if is_cluster(text)], connection)
    given = tuple(each for each in given if not is_cluster(each))
    with contextlib.ExitStack() as stack:
        for client in connect(given, connection or ClientOptions(), stack):
            try:
                found += _on_server(repository, client, names)
                if not names and (others := _strangers(repository, client)):
                    strangers[client.url] = others
            except ServerError as exc:
                silent[client.url] = exc
    if silent and not found and not clusters:
        hints = dict.fromkeys(exc.hint for exc in silent.values() if exc.hint)
        raise ServerUnreachableError("; ".join(exc.message for exc in silent.values()), hint=" ".join(hints) or None)
    return RepositoryStatus(tuple(found), {url: exc.message for url, exc in silent.items()}, strangers, clusters)


def _in_clusters(
    repository: Location, targets: Sequence[str | TritonClient], connection: ClientOptions | None
) -> tuple[cluster_status.ClusterStatus, ...]:
    found = []
    for target in map(str, targets):
        timeout_s = (connection or ClientOptions()).timeout_s
        with contextlib.closing(cluster_status.api_of(target, timeout_s)) as api:
            found.append(cluster_status.cluster_status(repository, target, api))
    return tuple(found)


def _strangers(repository: Location, client: TritonClient) -> tuple[str, ...]:
    """Return the loaded models from outside the repository: somebody loaded them with files of their own.

    The index has only models whose folder the server finds. The statistics list all loaded models. A server with model
    namespacing refuses to tell those.
    """
    known = {entry.name for entry in scan(repository, deep=False)}
    try:
        loaded = [(each.name, each.version) for each in client.statistics()]
    except ServerRefusedError:
        loaded = [(each.name, each.version or 0) for each in client.repository_index() if each.state == READY]
    return tuple(f"{name}:{version}" for name, version in loaded if name not in known)


def _on_server(repository: Location, client: TritonClient, names: Sequence[str]) -> list[ModelStatus]:
    server = local_server(client.url)
    found = []
    for entry in scan(repository, deep=False):
        if names and entry.name not in names:
            continue
        state = model_state(repository, entry.name)
        served = observe(client, entry.name)
        is_idle = not served.ready and (bool(state.deployments) or not served.reasons)
        if not names and not state.is_deployed and state.unproven is None and is_idle:
            continue
        last = state.deployments[-1] if state.deployments else None
        config, unreadable = _config_of(entry)
        differing = _differing(entry, config, served)
        obstacle = obstacle_of(repository, entry) if differing else None
        overridden = differing if obstacle is not None and not obstacle.always else ()
        found.append(
            ModelStatus(
                model=entry.name,
                url=client.url,
                ready=served.ready,
                selected=entry.selected,
                deployed=None if last is None else last.version,
                deployed_at=None if last is None else last.at,
                overridden=overridden,
                started_at=None if server is None else _text(server.started_at),
                restarts=None if server is None else server.restarts,
                restarted=None if server is None or last is None else _text(server.started_at) > last.at,
                differences=(
                    *_on_trial(state),
                    *unreadable,
                    *_differences(entry, served, last, differing_fields(config, served.config), overridden),
                ),
            )
        )
    return found


def _config_of(entry: ModelEntry) -> tuple[ModelConfig | None, tuple[str, ...]]:
    """Return a model's configuration; where it cannot be read none, and why: the other models are still compared."""
    try:
        return entry.config(), ()
    except ConfigError as exc:
        return None, (f"{exc.message} (repo-manager verify {entry.name})",)


def _on_trial(state: ModelState) -> tuple[str, ...]:
    left = state.unproven
    if left is None:
        return ()
    return (
        f"version {left.version} is on trial since {left.at}: its roll-out runs now, or was killed before the proof "
        "(then deploy finishes it, and rollback undoes it)",
    )


def _text(moment_s: float) -> str:
    """Return a time as deployments are recorded, so they compare as texts."""
    moment = datetime.datetime.fromtimestamp(moment_s, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _differing(entry: ModelEntry, config: ModelConfig | None, served: ServedState) -> tuple[str, ...]:
    """Return the fields, including the version policy, where the server deviates from the file."""
    if config is None or served.config is None:
        return ()
    # A version kept through a policy change keeps the old policy in its own configuration. Only READY shows the policy
    # in force.
    policy = ("version_policy",) if served.ready and served.ready != entry.selected else ()
    return (*differing_fields(config, served.config), *policy)


def _differences(
    entry: ModelEntry,
    served: ServedState,
    last: Deployment | None,
    fields: tuple[str, ...],
    overridden: tuple[str, ...],
) -> tuple[str, ...]:
    found = []
    existing = {each.version for each in entry.versions}
    deployed = None if last is None else last.version
    if not served.ready and last is None:
        found.append("it was never deployed")
    elif not served.ready and deployed is not None:
        found.append("it is not loaded")
    elif served.ready and last is not None and deployed is None:
        found.append(f"it was undeployed, and version {', '.join(map(str, served.ready))} is ready")
    elif served.ready and served.ready != entry.selected:
        wanted = ", ".join(map(str, entry.selected)) or "none"
        found.append(f"version {', '.join(map(str, served.ready))} is ready, the policy selects {wanted}")
    if deployed is not None and deployed not in served.ready and served.ready:
        found.append(f"version {deployed} was deployed last and is not ready")
    found += [f"version {each} is ready and its folder is gone" for each in served.ready if each not in existing]
    reasons = served.reasons.items() if last is None or deployed is not None else ()
    found += [f"version {each}: {reason}" for each, reason in reasons if each in entry.selected]
    if served.is_listed_twice:
        found.append("the server has several models of this name, in several repositories (--model-namespacing)")
    if served.hidden:
        found.append(f"what it runs with is unknown: the server does not show its configuration ({served.hidden})")
    if overridden:
        found.append(
            f"a configuration sent with a load overrides {', '.join(overridden)} of config.pbtxt; deploy drops it"
        )
    elif fields:
        found.append(f"the server runs it with another {', '.join(fields)} than config.pbtxt says; deploy applies it")
    return tuple(found)
