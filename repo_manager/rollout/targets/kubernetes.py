"""`--to k8s://namespace/release`: a snapshot rolled out through the release's Deployments, one after the other.

The served state is in the pod template, so every restarted or added pod serves it too. A load request through a
Service would reach one pod, and that pod would forget it (triton-inference-server/server#3001, #3471).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.repository.location import Location
from repo_manager.rollout.checks import Check
from repo_manager.rollout.result import PodProof, ServerResult, SnapshotChange
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.api import Api, change_unless_changed, patiently
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.base import LeftAloneError
from repo_manager.rollout.targets.events import Events
from repo_manager.rollout.targets.kubernetes_status import wait_for_rollout
from repo_manager.rollout.targets.pods import PodProver
from repo_manager.rollout.targets.release import Release, find_deployments
from repo_manager.rollout.targets.snapshot import (
    check_leaving,
    check_relatives,
    models_after,
    models_served,
    versions_brought,
    versions_needed,
)
from repo_manager.rollout.targets.snapshot_files import Snapshot, SnapshotModel, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import ServedTemplate, keeper_of, patch_back, patch_for, read_template
from repo_manager.server.transport import ClientOptions

__all__ = ["KubernetesTarget"]


class KubernetesTarget:
    """A release, whose Deployments go to a snapshot one after the other.

    The snapshot holds everything the release serves, with the new version in the place of the old one. It is written
    beside the repository. New pods are asked for an inference where they can be reached from here.

    Args:
        context: of the roll-out. `load_timeout_s` is the longest time without progress.
        release: address of the release. `look` finds its Deployments.
        api: connected API of the cluster.
        connection: how to talk to the pods' gRPC endpoint.
    """

    batch = 1
    trial = None

    def __init__(self, context: RolloutContext, release: Release, api: Api, connection: ClientOptions) -> None:
        self.context, self.release, self.api = context, release, api
        self.prover = PodProver(context, connection)
        self.checks: tuple[Check, ...] = ()
        self.brought: Mapping[str, tuple[int, ...]] = {}
        self.parts: list[DeploymentPart] = []
        self._models: Sequence[SnapshotModel] = ()
        self._snapshot: Snapshot | None = None

    @property
    def changes(self) -> bool:
        """Whether a pod template must be changed."""
        return any(part.changes for part in self.parts)

    def describe(self) -> str:
        """Return `k8s://namespace/release`."""
        return str(self.release)

    def look(self) -> None:
        """Check the version, read the Deployments, and find the snapshot to serve."""
        if not self.context.leaves:
            self.checks = self.context.refused_version(versions_needed(self.context))
        deployments = find_deployments(self.release, self.api)
        served = [read_template(deployment) for deployment in deployments]
        for deployment in deployments:
            if deployment["spec"].get("paused"):
                name = deployment["metadata"]["name"]
                raise ServerRefusedError(
                    f"Deployment {name} is paused: no change of it is rolled out",
                    hint=f"kubectl rollout resume deployment/{name} -n {self.release.namespace}",
                )
        self._name_keeper(deployments[0])
        held, source = self._held(served[0])
        self._models = models_after(self.context, held, source)
        self.brought = versions_brought(self.context, held)
        if self.context.leaves:
            self.checks = check_leaving(self.context, held, str(self.release), served[0].load)
        else:
            after = next(model.versions for model in self._models if model.name == self.context.name)
            self.checks += self.context.check_pinned(held.get(self.context.name, ()), after)
            self.checks += check_relatives(self.context, self._models, str(self.release), served[0].load)
        planned = write_snapshot(
            snapshots_of(self.context.repository), self._models, signed_by=self.context.options.signed_by, dry_run=True
        )
        self.parts = [DeploymentPart(self, *each, held, planned) for each in zip(deployments, served, strict=True)]

    def check(self) -> None:
        """Do nothing more: the version was checked before the cluster was asked."""

    @property
    def before(self) -> None:
        """Nothing: the repository's config.pbtxt stays as it is."""
        return

    def put_back(self) -> None:
        """Do nothing: the Deployments share a snapshot only, kept for the next time."""

    def write(self) -> None:
        """Write the snapshot, unless it is there."""
        if self._snapshot is None:
            self._snapshot = made = write_snapshot(
                snapshots_of(self.context.repository), self._models, signed_by=self.context.options.signed_by
            )
            self.context.note(f"snapshot {made.id}: {'written' if made.created else 'there already'}")

    def _name_keeper(self, deployment: Object) -> None:
        """Return whether another process may put the roll-out back."""
        keeper = keeper_of(deployment)
        if keeper is not None:
            what = "" if self.context.leaves else f" {self.context.name}:{self.context.version}"
            self.context.note(
                f"{keeper} applies {deployment['metadata']['name']} and may put this roll-out back; with it, pin a "
                f"snapshot in Git instead: repo-manager snapshot{what}"
            )

    def _held(self, first: ServedTemplate) -> tuple[Mapping[str, tuple[int, ...]], Location]:
        """Return the release's models, and the place of their files. Report the versions a snapshot of the repository
        pins."""
        repository = self.context.repository
        models, source = models_served(repository, first.url, first.snapshots, str(self.release), first.load)
        if source != repository:
            return models, source
        others = ", ".join(f"{name}:{max(models[name])}" for name in sorted(models) if name != self.context.name)
        if others:
            self.context.note(f"{self.release} serves the repository itself; as it is now, the snapshot pins {others}")
        return models, repository


class DeploymentPart:
    """One Deployment of the release.

    Args:
        target: the release that owns it.
        deployment: the Deployment as it was read. `apply` fails if its spec, replicas aside, was changed since.
        served: the snapshot or repository its pods serve.
        held: models and versions the release serves.
        planned: the snapshot to serve. It need not be written yet: `apply` does it.
    """

    def __init__(
        self,
        target: KubernetesTarget,
        deployment: Object,
        served: ServedTemplate,
        held: Mapping[str, tuple[int, ...]],
        planned: Snapshot,
    ) -> None:
        self._target, self._context, self._api = target, target.context, target.api
        self._deployment, self._served, self._held, self._planned = deployment, served, held, planned
        self._url = f"{served.snapshots}/{planned.id}"
        self._replicas: int = deployment["spec"].get("replicas", 1)
        self._pods: tuple[PodProof, ...] = ()
        self._events = Events(self._api, deployment, self._context)
        self.touched = self._restored = False
        before = held.get(self._context.name, ())
        leaves_nothing = self._context.leaves and self._context.remaining(before) == before
        self.changes = self._url != served.url and not leaves_nothing

    @property
    def label(self) -> str:
        """The Deployment's name, with its context where named."""
        context = self._target.release.context
        return self._name if context is None else f"{self._name} in {context}"

    @property
    def _name(self) -> str:
        return self._served.deployment

    @property
    def checks(self) -> tuple[Check, ...]:
        """Of the version."""
        return self._target.checks

    def apply(self) -> None:
        """Point the pod template at the snapshot."""
        self._target.write()
        if not self.changes:
            return
        self._context.note(f"{self.label}: {self._served.url} -> {self._url}, at {self._api.where}")
        patch = patch_for(self._deployment, self._served, (self._url, self._planned.models), before=self._held)
        space, api = self._target.release.namespace, self._api
        self.touched = True
        try:
            change_unless_changed(
                self._deployment,
                lambda: api.deployment(space, self._name),
                lambda body: api.patch_deployment(space, self._name, body),
                patch,
            )
        except ServerRefusedError:  # nothing was changed, so an undo must not touch another's change
            self.touched = False
            raise
        self._events.tell("RolloutStarted", f"{self._served.url} -> {self._url}")

    def prove(self) -> None:
        """Wait until every pod serves the snapshot, and ask the reachable ones."""
        if self._context.leaves and not self.changes:
            return
        self._target.write()
        prover, timeout_s = self._target.prover, self._context.options.load_timeout_s
        self._context.deadline.remaining_s(timeout_s)
        self._replicas = self._wait(self._url, timeout_s, lambda pods: prover.prove(pods, self._served.grpc_port))
        self._pods = prover.take()

    def finish(self) -> None:
        """Report the end: the old pods are gone."""
        if self.touched:
            self._events.tell("RolloutDone", f"{self._replicas} pods serve {self._url}")

    def undo(self) -> str:
        """Restore the pod template and wait for its pods.

        Raises:
            LeftAloneError: another process has changed it.
            ServerRefusedError: the pods do not come back.
        """
        space = self._target.release.namespace
        try:
            now = patiently(lambda: self._api.deployment(space, self._name))
            url = self._url if now is None else read_template(now).url
            if url not in (self._url, self._served.url):
                raise LeftAloneError(f"{self.label} serves {url}, to which somebody else has changed it")
            if url == self._url:  # otherwise the change never arrived or somebody undid it
                body = patch_back(self._deployment, self._served)
                patiently(lambda: self._api.patch_deployment(space, self._name, body))
            self._restored = True
            self._wait(self._served.url, self._context.options.load_timeout_s, lambda _: None)
        except ServerUnreachableError as exc:  # the API server stays unreachable, unlike a restarting server
            raise ServerRefusedError(exc.message, hint=exc.hint) from exc
        self._events.tell("RolloutUndone", f"put back, it serves {self._served.url}", warning=True)
        return f"the pods of {self.label} were put back: they serve {self._served.url}"

    def by_hand(self) -> str:
        """Tell a person how to repair a failed undo."""
        self._events.tell("RolloutFailed", f"not put back; before, it served {self._served.url}", warning=True)
        space, name = self._target.release.namespace, self._name
        if self._target.release.context is not None:
            space += f" --context {self._target.release.context}"
        if self._restored:
            return (
                f"The template of {name} is as it was before, and its pods do not come up. See why: "
                f"kubectl describe deployment/{name} -n {space}, and kubectl get pods -n {space}"
            )
        before = f"before, it served {self._served.url}"
        if self._served.variable is None:
            return f"By hand: kubectl edit deployment/{name} -n {space}, and set --model-repository; {before}"
        return (
            f"By hand: kubectl set env deployment/{name} -n {space} -c {self._served.container} "
            f"{self._served.variable}={self._served.url}; {before}"
        )

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""
        name = self._context.name
        answered = any(proof.latency_ns is not None for proof in self._pods)
        return ServerResult(
            name=self.label,
            changed=self.changes,
            ready=self._planned.models.get(name, ()),
            previous=self._held.get(name, ()),
            proof=self._target.prover.proof if answered else "readiness" if self._pods else "none",
            checks=self.checks,
            snapshot=SnapshotChange(
                self._served.url, self._url, self._planned.models, replicas=self._replicas, pods=self._pods
            ),
        )

    def _wait(self, url: str, timeout_s: float, look: Callable[[Sequence[Object]], None]) -> int:
        """Wait until every pod serves a URL. Return how many there will be."""
        final = wait_for_rollout(
            self._api,
            self._target.release.namespace,
            self._deployment,
            url,
            timeout_s=timeout_s,
            report=self._context.note,
            look=look,
            progressed=lambda: self._context.deadline.allow(self._context.options.load_timeout_s),
        )
        return int(final["spec"].get("replicas", 1))
