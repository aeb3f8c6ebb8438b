"""`--to k8s://namespace/release`: a snapshot rolled out through the release's Deployments, watched, or undone.

The served state is in the pod template, so a pod that restarts or is scaled up serves it too. A load request through
a Service would reach one pod, and that pod would forget it (triton-inference-server/server#3001, #3471).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from repo_manager.errors import (
    RepoManagerError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
)
from repo_manager.repository import Location, find_model, record_deployment, scan
from repo_manager.rollout.attempt import Report
from repo_manager.rollout.checks import check_version, refuse
from repo_manager.rollout.result import RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.rollout.targets.api import Api, Object, using
from repo_manager.rollout.targets.prove import PodProver
from repo_manager.rollout.targets.release import (
    KubernetesTarget,
    find_deployments,
    parse_kubernetes_target,
    previous_on_kubernetes,
)
from repo_manager.rollout.targets.result import DeploymentRollout, KubernetesRollout
from repo_manager.rollout.targets.snapshot import Snapshot, SnapshotModel, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import (
    ServedTemplate,
    patch_back,
    patch_for,
    read_template,
)
from repo_manager.rollout.targets.wait import wait_for_rollout
from repo_manager.server import ClientOptions

__all__ = [
    "KubernetesRollout",
    "KubernetesTarget",
    "deploy_kubernetes",
    "parse_kubernetes_target",
    "previous_on_kubernetes",
]


def deploy_kubernetes(
    target: KubernetesTarget,
    repository: Location,
    name: str,
    version: int,
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
    connection: ClientOptions | None = None,
    api: Api | None = None,
) -> KubernetesRollout:
    """Serve a version on every pod of a release.

    A snapshot of everything that the release serves, with this version in place of the old one, is written beside the
    repository; then each Deployment's pod template is pointed at it, one Deployment after the other. New pods are
    asked for an inference where they can be reached from here. Whatever fails, all templates are put back.

    Args:
        target: the release.
        repository: the repository as this machine sees it.
        name: the model.
        version: the version to serve.
        options: `load_timeout_s` bounds the wait for one Deployment; `None` takes the defaults.
        report: told what is being done.
        connection: how to talk to the pods' gRPC endpoint.
        api: the cluster; `None`: the one that the kubeconfig names.

    Raises:
        RepositoryError: no such version, it is damaged or not signed; nothing was changed.
        ServerRefusedError: the API server refused, or the release is not one that can be rolled out.
        ServerUnreachableError: the API server does not answer; nothing was changed.
        RolloutUndoneError: it failed, and the pods serve again what they served.
        RollbackFailedError: it failed, and so did putting it back.
    """
    options = RolloutOptions() if options is None else options
    entry = find_model(repository, name)
    folder = entry.version(version).path
    refuse(name, version, check_version(repository, entry, version, signed_by=options.signed_by), options)
    prover = PodProver(folder, name, version, connection or ClientOptions(), options.smoke_timeout_s, report)
    with using(api) as cluster:
        rollout = _KubernetesRollout(target, repository, (name, version), options, report, cluster)
        return rollout.plan_only() if options.dry_run else rollout.run(prover)


class _KubernetesRollout:
    """One roll-out, from its plan to its proof."""

    def __init__(
        self,
        target: KubernetesTarget,
        repository: Location,
        what: tuple[str, int],
        options: RolloutOptions,
        report: Report,
        api: Api,
    ) -> None:
        self.target, self.repository, self.options, self.api = target, repository.resolve(), options, api
        self.name, self.version = what
        self._tell = report
        self.events: list[str] = []
        self.began = time.monotonic()
        self.snapshot_id = ""
        self.deployments = find_deployments(target, api)
        self.served = [read_template(deployment) for deployment in self.deployments]
        for deployment in self.deployments:
            if deployment["spec"].get("paused"):
                raise ServerRefusedError(
                    f"Deployment {deployment['metadata']['name']} is paused: no change of it is rolled out",
                    hint=f"kubectl rollout resume deployment/{deployment['metadata']['name']} -n {target.namespace}",
                )

    def plan_only(self) -> KubernetesRollout:
        """Say what would be done."""
        snapshot = write_snapshot(snapshots_of(self.repository), self._models(), dry_run=True)
        return self._result(snapshot, [self._unchanged(d, s, snapshot) for d, s in self._pairs()], changed=False)

    def run(self, prover: PodProver) -> KubernetesRollout:
        """Write the snapshot, roll it out, prove it; or put everything back."""
        snapshot = write_snapshot(snapshots_of(self.repository), self._models())
        self.snapshot_id = snapshot.id
        self._note(f"snapshot {snapshot.id}: {'written' if snapshot.created else 'there already'}")
        done: list[DeploymentRollout] = []
        begun: list[tuple[Object, ServedTemplate]] = []
        with as_interrupts():
            try:
                for deployment, served in self._pairs():
                    done.append(self._roll(deployment, served, snapshot, prover, begun))
                record_deployment(self.repository, self.name, self.version)
            except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
                raise self._undo(begun, exc) from exc
        return self._result(snapshot, done, changed=any(each.changed for each in done))

    def _pairs(self) -> list[tuple[Object, ServedTemplate]]:
        return list(zip(self.deployments, self.served, strict=True))

    def _held(self) -> Mapping[str, tuple[int, ...]]:
        """Return what the release serves: as the last roll-out recorded, else what its pods load of the repository."""
        first = self.served[0]
        if first.models is not None:
            return first.models
        entries = scan(self.repository, deep=False)
        wanted = [entry for entry in entries if "*" in first.load or entry.name in first.load]
        return {entry.name: entry.served_versions for entry in wanted if entry.served_versions}

    def _models(self) -> list[SnapshotModel]:
        """Return what the snapshot has to hold: what the release serves, with the new version in its place."""
        held, first = self._held(), self.served[0]
        earlier = snapshots_of(self.repository) / first.url.rstrip("/").rpartition("/")[2]
        source = earlier if _is_snapshot(earlier, first) else self.repository
        others = [SnapshotModel(other, versions, source) for other, versions in held.items() if other != self.name]
        kept = tuple(v for v in held.get(self.name, ()) if self.options.keep_previous and v != self.version)[-1:]
        served = tuple(sorted({self.version, *kept}))
        return [*others, SnapshotModel(self.name, served, self.repository)]

    def _roll(
        self,
        deployment: Object,
        served: ServedTemplate,
        snapshot: Snapshot,
        prover: PodProver,
        begun: list[tuple[Object, ServedTemplate]],
    ) -> DeploymentRollout:
        """Roll one Deployment."""
        url = f"{served.snapshots}/{snapshot.id}"
        changed = url != served.url
        if changed:
            self._note(f"{served.deployment}: {served.url} -> {url}")
            begun.append((deployment, served))
            patch = patch_for(deployment, served, (url, snapshot.models), before=self._held())
            try:
                self.api.patch_deployment(self.target.namespace, served.deployment, patch)
            except ServerRefusedError:  # Nothing was changed: nothing is to be put back, least of all over another's.
                begun.pop()
                raise
        final = wait_for_rollout(
            self.api,
            self.target.namespace,
            deployment,
            url,
            timeout_s=self.options.load_timeout_s,
            report=self._note,
            look=lambda pods: prover.prove(pods, served.grpc_port),
        )
        replicas = final["spec"].get("replicas", 1)
        proofs = prover.take()
        return DeploymentRollout(served.deployment, served.url, url, replicas, changed, proofs)

    def _undo(self, begun: list[tuple[Object, ServedTemplate]], cause: BaseException) -> RepoManagerError:
        """Put the pod templates back; return what to tell the user."""
        failure = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
        what = f"{self.name}:{self.version} was not deployed to {self.target}: {failure}"
        if not begun:
            return cause if isinstance(cause, RepoManagerError) else RolloutUndoneError(f"{what}\nNothing was changed.")
        self._note(f"failed: {failure.splitlines()[0]}; putting {len(begun)} Deployment(s) back")
        failed = []
        for deployment, served in reversed(begun):
            try:
                self._put_back(deployment, served)
            except (RepoManagerError, KeyboardInterrupt) as exc:
                reason = "interrupted again" if isinstance(exc, KeyboardInterrupt) else str(exc)
                failed.append(f"{served.deployment}: {reason}")
        if failed:
            return RollbackFailedError(
                f"{what}\nPutting the pod templates back failed: " + "; ".join(failed),
                hint=f"By hand: kubectl rollout undo deployment/NAME -n {self.target.namespace}; before, they served "
                + ", ".join(f"{served.url} ({served.deployment})" for _, served in begun),
            )
        before = ", ".join(dict.fromkeys(served.url for _, served in begun))
        return RolloutUndoneError(f"{what}\nThe pod templates were put back: they serve {before}.")

    def _put_back(self, deployment: Object, served: ServedTemplate) -> None:
        """Restore one pod template and wait for its pods.

        Raises:
            ServerError: it does not come back, or somebody else has changed it: then it is left as it is.
        """
        space, name = self.target.namespace, served.deployment
        now = self.api.deployment(space, name)
        if now is not None and read_template(now).url != f"{served.snapshots}/{self.snapshot_id}":
            raise ServerRefusedError(f"it serves {read_template(now).url} by now, and is left so")
        self.api.patch_deployment(space, name, patch_back(deployment, served))
        timeout_s = self.options.load_timeout_s
        wait_for_rollout(self.api, space, deployment, served.url, timeout_s=timeout_s, report=self._note)

    def _unchanged(self, deployment: Object, served: ServedTemplate, snapshot: Snapshot) -> DeploymentRollout:
        replicas = deployment["spec"].get("replicas", 1)
        url = f"{served.snapshots}/{snapshot.id}"
        return DeploymentRollout(served.deployment, served.url, url, replicas, url != served.url, ())

    def _result(self, snapshot: Snapshot, done: list[DeploymentRollout], *, changed: bool) -> KubernetesRollout:
        proofs = [proof for each in done for proof in each.proofs]
        answered = any(proof.latency_ns is not None for proof in proofs)
        return KubernetesRollout(
            target=str(self.target),
            model=self.name,
            version=self.version,
            snapshot=done[0].after,
            models=snapshot.models,
            deployments=tuple(done),
            changed=changed,
            dry_run=self.options.dry_run,
            proof="inference" if answered else "readiness" if proofs else "none",
            seconds=time.monotonic() - self.began,
            events=tuple(self.events),
        )

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._tell(event)


def _is_snapshot(place: Location, served: ServedTemplate) -> bool:
    """Say whether the snapshot that the pods serve can be read from here: then the other models are taken from it."""
    try:
        return bool(served.models) and all(
            set(versions) <= {entry.version for entry in find_model(place, name).versions}
            for name, versions in (served.models or {}).items()
        )
    except RepoManagerError:
        return False
