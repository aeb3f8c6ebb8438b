"""The public verbs: put a version into service on whatever target, go back, and take it out of service."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from repo_manager.errors import ConcurrentChangeError, RepositoryError, UsageError
from repo_manager.optional import deferred
from repo_manager.repository.location import Location
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import previous_deployment
from repo_manager.rollout import engine
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.rollout_context import Change, Report, RolloutContext
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.base import JointTarget, Target
from repo_manager.rollout.targets.leaving import LeavingTarget
from repo_manager.rollout.targets.triton import TritonTarget
from repo_manager.rollout.targets.urls import To, connect, is_cluster
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions

if TYPE_CHECKING:
    from repo_manager.rollout.targets import clusters, inference_service, release
    from repo_manager.rollout.trial import canary
else:
    clusters = deferred("repo_manager.rollout.targets.clusters")
    canary = deferred("repo_manager.rollout.trial.canary")

__all__ = ["deploy", "rollback", "undeploy", "version_to_go_back_to"]


def deploy(
    repository: Location,
    name: str,
    version: int,
    to: To,
    *,
    options: RolloutOptions | None = None,
    trial: TrialOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Put a version into service. Put the previous state back when anything of it fails.

    On Triton servers the old and the new version are served together until the new one has answered a real inference
    as ONNX Runtime does. Only then the old one is dropped. So some version answers at every moment. Several servers go
    forward together or not at all. Ctrl-C, SIGTERM and SIGHUP undo an unfinished roll-out.

    With a trial, old and new are served together until the gates have passed. A request without a version goes to the
    higher number while both are served (`ModelLifeCycle::GetModel` of triton-inference-server/core). Such requests are
    on trial from the first moment, and the trial's notes count them.

    Args:
        repository: the repository the target serves.
        name: name of the model to deploy. Models it needs are served with it where they are not yet.
        version: a version in the repository. It replaces those served, except with `keep_previous`.
        to: connected clients, one a server; or URLs (`grpc://host:port`, `http://host:port`, `dns://name:port`,
            `@FILE`); or one `k8s://namespace/release` or `kserve://namespace/name`.
        options: deadline, trial, batch size and the like. `None` takes the defaults.
        trial: how the version is tried first. On one Triton server, or by steps in KServe. `None`: not at all.
        connection: how to connect to URLs, and to pods. `None` connects without TLS and headers.
        report: called with a line of text for each step. From several threads when a batch has more than one server.

    Returns:
        The roll-out's result. A version served already is left as it is, and proven by an inference.

    Raises:
        UsageError: the target is not understood, or cannot have such a trial.
        InputError: recorded requests cannot be read or do not fit.
        RepositoryError: no such model or version, a check speaks against it, or another roll-out of the model is under
            way.
        GateError: a gate failed. The previous state was put back.
        InconclusiveError: a gate is undecided. The previous state was put back.
        ServerRefusedError: the server refused. Nothing was changed.
        ServerUnreachableError: no answer. Changes in the repository are put back.
        RolloutUndoneError: it failed, and the previous state was put back and verified.
        RollbackFailedError: it failed, and so did putting the previous state back.
    """
    options = RolloutOptions() if options is None else options
    if trial is not None:
        trial.check()
    parts = 1 if isinstance(to, str | TritonClient) else max(1, len(to))  # one trial per target
    trial_s = 0.0 if trial is None else trial.longest_s * parts
    context = RolloutContext(repository, Change(name, version), options, report, trial_s=trial_s)
    reached = _reach(to, options)
    with reached as reach, reach.target(context, trial, connection or ClientOptions()) as target, _leases(context):
        return engine.run(target, context)


@contextlib.contextmanager
def _leases(context: RolloutContext) -> Iterator[None]:
    """Hold the models it needs, too: it may be served with it.

    Raises:
        RepositoryError: another roll-out of one of these is under way.
    """
    with contextlib.ExitStack() as stack:
        if not context.options.dry_run:
            store = open_store(context.repository)
            for name in sorted(context.needs):
                stack.enter_context(store.lease(name, timeout_s=context.options.lease_timeout_s))
        yield


def rollback(
    repository: Location,
    name: str,
    to: To,
    *,
    options: RolloutOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Go back to the version deployed before the current one, with the same proof as `deploy`.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model. Its recorded roll-outs give the version to go back to.
        to: a server, a cluster target, or several of one kind.
        options: settings of the roll-out. `None`: the defaults.
        connection: TLS, headers and deadlines of clients. `None`: the defaults of `ClientOptions`.
        report: called with one line per step.

    Raises:
        RepositoryError: there is none, or it is another one by the time the roll-out begins, and as `deploy`.
        RepoManagerError: as `deploy`.
    """
    with _reach(to, options or RolloutOptions()) as reach:
        version = reach.previous(repository, name)

        def confirm() -> None:
            now = reach.previous(repository, name)
            if now != version:
                raise ConcurrentChangeError(
                    f"{name} was deployed by somebody else at the same time: the version before is {now} now, not "
                    f"{version}",
                    hint="Nothing was changed. See `repo-manager status`, then run the command again.",
                )

        change = Change(name, version, "rollback")
        context = RolloutContext(repository, change, options or RolloutOptions(), report, confirm=confirm)
        with reach.target(context, None, connection or ClientOptions()) as target:
            return engine.run(target, context)


def undeploy(
    repository: Location,
    name: str,
    version: int | None,
    to: To,
    *,
    options: RolloutOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Take a model, or one version of it, out of service, and confirm it by every server's index.

    The version stays published. `rollback` serves the previous versions again, and `serve` no longer loads the model
    when it starts. On failure, unloaded versions are loaded again.

    Args:
        repository: the repository the target serves.
        name: name of the model to take out of service. Models it needs stay served.
        version: one version. `None`: all of them.
        to: a server, a cluster target, or several of one kind.
        options: deadline and the like. `None` takes the defaults.
        connection: how to connect to URLs, and to pods. `None` connects without TLS and headers.
        report: called with a line of text for each step.

    Raises:
        RepositoryError: a served model needs it, or another roll-out of the model is under way.
        RepoManagerError: as `deploy`.
    """
    options = options or RolloutOptions()
    context = RolloutContext(repository, Change(name, version, "undeploy"), options, report)
    with _reach(to, options) as reach, reach.target(context, None, connection or ClientOptions()) as target:
        return engine.run(target, context)


def version_to_go_back_to(repository: Location, name: str) -> int:
    """Return the version that `rollback` deploys on Triton servers.

    Raises:
        RepositoryError: no earlier deployment is known whose version is still there.
    """
    version = previous_deployment(repository, name)
    if version is None:
        raise RepositoryError(
            f"{name} has no earlier deployment to go back to",
            hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION",
        )
    return version


@dataclasses.dataclass(frozen=True)
class _Reach:
    """The targets named by `to`: servers, or something in clusters, each with its cluster."""

    servers: tuple[str | TritonClient, ...] = ()
    clusters: tuple[tuple[release.Release | inference_service.InferenceService, Api], ...] = ()

    def previous(self, repository: Location, name: str) -> int:
        """Return the version before the current one.

        Raises:
            RepositoryError: there is none, or it is not the same in every cluster.
        """
        if not self.clusters:
            return version_to_go_back_to(repository, name)
        found = {
            str(each): clusters.cluster_kind_of(each).previous(each, repository, name, api)
            for each, api in self.clusters
        }
        if len(set(found.values())) > 1:
            told = ", ".join(f"{version} in {where}" for where, version in found.items())
            raise RepositoryError(f"The version of {name} before is {told}", hint="Go back in one cluster at a time.")
        return next(iter(found.values()))

    @contextlib.contextmanager
    def target(
        self, context: RolloutContext, trial: TrialOptions | None, connection: ClientOptions
    ) -> Iterator[Target]:
        """Connect to it.

        Raises:
            UsageError: it cannot have such a trial.
        """
        with contextlib.ExitStack() as stack:
            if not self.clusters:
                clients = connect(self.servers, connection, stack)
                for client in clients:
                    stack.enter_context(client.within(context.call_s))
                yield _on_servers(context, clients, trial)
                return
            found: list[Target] = []
            for each, api in self.clusters:
                stack.enter_context(api.within(context.call_s))
                found.append(clusters.cluster_kind_of(each).target(context, each, api, trial, connection))
            yield found[0] if len(found) == 1 else JointTarget(found)


@contextlib.contextmanager
def _reach(to: To, options: RolloutOptions) -> Iterator[_Reach]:
    """Read `to`. Connect to the clusters where it names one.

    Raises:
        UsageError: it is not understood, or names something in a cluster among other things.
    """
    given = (to,) if isinstance(to, str | TritonClient) else tuple(to)
    found = list(dict.fromkeys(str(each) for each in given if is_cluster(each)))
    if found and any(not is_cluster(each) for each in given):
        raise UsageError(
            f"{found[0]} is a whole deployment and cannot be mixed with servers",
            hint="Deploy to the servers by a command of their own. Several of k8s:// and kserve:// can go together.",
        )
    if not found:
        yield _Reach(given)
        return
    with contextlib.ExitStack() as stack:

        def cluster(context: str | None) -> Api:
            return stack.enter_context(contextlib.closing(Api(options.deadline_s, context)))

        named = [clusters.parse_cluster(text) for text in found]
        yield _Reach(clusters=tuple((each, cluster(each.context)) for each in named))


def _on_servers(context: RolloutContext, clients: Sequence[TritonClient], trial: TrialOptions | None) -> Target:
    if context.leaves:
        return LeavingTarget(context, clients)
    target = TritonTarget(context, clients)
    if trial is None:
        return target
    if len(clients) > 1:
        raise UsageError(
            "--shadow and --canary try a version on one server",
            hint="Try it on one of them with --to; then deploy to all: those serving it already are left alone.",
        )
    return canary.CanaryTarget(target, context, trial, clients[0].another)
