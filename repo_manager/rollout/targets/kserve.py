"""`--to kserve://namespace/name`: an InferenceService pinned to a snapshot, by steps of canary traffic, or undone.

KServe makes a new revision when `storageUri` changes and sends `canaryTrafficPercent` of the traffic to it; the rest
goes to the revision that was rolled out last. Removing the field promotes the new one, 0 takes all traffic from it.
(kserve, `pkg/controller/v1beta1/inferenceservice/reconcilers/knative/ksvc_reconciler.go`.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from repo_manager.errors import (
    RepoManagerError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
    UsageError,
)
from repo_manager.repository import Location, find_model, record_deployment, scan
from repo_manager.rollout.attempt import Report
from repo_manager.rollout.checks import check_version, refuse
from repo_manager.rollout.result import RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.rollout.targets.api import Api, Kind, Object, using
from repo_manager.rollout.targets.kserve_service import (
    KServeCanary,
    KServeRollout,
    KServeTarget,
    parse_kserve_target,
    previous_on_kserve,
)
from repo_manager.rollout.targets.kserve_status import failure_of, wait_for_service, watch_service
from repo_manager.rollout.targets.kserve_weights import KServeWeights
from repo_manager.rollout.targets.snapshot import SnapshotModel, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import MODELS, SNAPSHOTS, models_text, parse_models, snapshots_beside

__all__ = [
    "KServeCanary",
    "KServeRollout",
    "KServeTarget",
    "KServeWeights",
    "deploy_kserve",
    "parse_kserve_target",
    "previous_on_kserve",
]

_MODE = "serving.kserve.io/deploymentMode"
_WITHOUT_CANARY = frozenset({"RawDeployment", "Standard"})


def deploy_kserve(
    target: KServeTarget,
    repository: Location,
    name: str,
    version: int,
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
    canary: KServeCanary | None = None,
    api: Api | None = None,
) -> KServeRollout:
    """Point an InferenceService at a snapshot with this version, and watch it.

    That the new revision serves is known from KServe's conditions and model status, not from an inference of ours:
    a revision's address is a matter of the cluster's ingress.

    Args:
        target: the InferenceService.
        repository: the repository as this machine sees it.
        name: the model.
        version: the version to serve.
        options: `load_timeout_s` bounds the wait for each step; `None` takes the defaults.
        report: told what is being done.
        canary: steps on the way; `None`: all of the traffic at once, when the revision is ready.
        api: the cluster; `None`: the one that the kubeconfig names.

    Raises:
        UsageError: the percentages do not ascend between 1 and 99, or this InferenceService cannot have a canary.
        RepositoryError: no such version, it is damaged or not signed; nothing was changed.
        ServerError: the API server refused or did not answer; nothing was changed.
        RolloutUndoneError: it failed, and the previous `storageUri` is back and ready.
        RollbackFailedError: it failed, and so did putting it back.
    """
    canary = KServeCanary() if canary is None else canary
    canary.check()
    options = RolloutOptions() if options is None else options
    entry = find_model(repository, name)
    entry.version(version)
    refuse(name, version, check_version(repository, entry, version, signed_by=options.signed_by), options)
    with using(api) as cluster:
        rollout = _KServeRollout(target, repository.resolve(), (name, version), options, report, cluster)
        return rollout.run(canary)


class _KServeRollout:
    """One roll-out, from its plan to its end."""

    def __init__(
        self,
        target: KServeTarget,
        repository: Location,
        what: tuple[str, int],
        options: RolloutOptions,
        report: Report,
        api: Api,
    ) -> None:
        self.target, self.repository, self.options, self.api, self._tell = target, repository, options, api, report
        self.name, self.version = what
        self.began, self.events, self.begun = time.monotonic(), list[str](), False
        self.before = api.custom(Kind.INFERENCE_SERVICE, target.namespace, target.name)
        self.known = failure_of(self.before)
        self.format = _format_of(self.before)
        self.uri = str(self.before["spec"]["predictor"][self.format]["storageUri"])
        self.annotations: Mapping[str, str] = self.before["metadata"].get("annotations") or {}

    def run(self, canary: KServeCanary) -> KServeRollout:
        """Write the snapshot and go to it step by step; or back."""
        percents = canary.percents
        mode = self.annotations.get(_MODE) or (self.before.get("status") or {}).get("deploymentMode", "")
        if percents and mode in _WITHOUT_CANARY:
            raise UsageError(
                f"{self.target} runs in KServe's {mode} mode, which has no canary",
                hint="Leave the percentages out, or weight two services by an HTTPRoute (deploy/gateway).",
            )
        snapshot = write_snapshot(snapshots_of(self.repository), self._models(), dry_run=self.options.dry_run)
        after = f"{self.annotations.get(SNAPSHOTS) or snapshots_beside(self.uri)}/{snapshot.id}"
        changed = after != self.uri
        if self.options.dry_run or not changed:
            return self._result(after, snapshot.models, percents, "", changed=False)
        with as_interrupts():
            try:
                revision = self._go(after, models_text(snapshot.models), canary)
                record_deployment(self.repository, self.name, self.version)
            except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
                raise self._undo(exc) from exc
        return self._result(after, snapshot.models, percents, revision, changed=True)

    def _models(self) -> list[SnapshotModel]:
        held = parse_models(self.annotations.get(MODELS))
        if held is None:
            entries = scan(self.repository, deep=False)
            held = {entry.name: entry.served_versions for entry in entries if entry.served_versions}
        others = [SnapshotModel(each, held[each], self.repository) for each in sorted(held) if each != self.name]
        return [*others, SnapshotModel(self.name, (self.version,), self.repository)]

    def _go(self, after: str, models: str, canary: KServeCanary) -> str:
        """Change what is served, then only the share; return the new revision's name."""
        first, *more = [*canary.percents, 100]
        self._note(f"{self.uri} -> {after}, {first} % of the traffic")
        predictor: Object = {self.format: {"storageUri": after}}
        predictor["canaryTrafficPercent"] = None if first == 100 else first
        version = self.before["metadata"]["resourceVersion"]
        metadata = {"resourceVersion": version, "annotations": {MODELS: models}}
        self.begun = True
        try:
            self._patch({"metadata": metadata, "spec": {"predictor": predictor}})
        except ServerRefusedError:  # Nothing was changed: nothing is to be put back, least of all over another's.
            self.begun = False
            raise
        revision = self._wait(first)
        for percent in more:
            self._watch(first, canary.step_s)
            canary.gate(first)
            self._note(f"{percent} % of the traffic")
            self._patch({"spec": {"predictor": {"canaryTrafficPercent": None if percent == 100 else percent}}})
            revision = self._wait(percent)
            first = percent
        return revision

    def _undo(self, cause: BaseException) -> RepoManagerError:
        """Take the traffic from the new revision at once, then put everything back; return what to tell the user."""
        failure = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
        what = f"{self.name}:{self.version} was not deployed to {self.target}: {failure}"
        if not self.begun:
            return cause if isinstance(cause, RepoManagerError) else RolloutUndoneError(what)
        self._note(f"failed: {failure.splitlines()[0]}; putting {self.uri} back")
        percent = self.before["spec"]["predictor"].get("canaryTrafficPercent")
        try:
            now = self.api.custom(Kind.INFERENCE_SERVICE, self.target.namespace, self.target.name)
            self.known = failure_of(now)
            if now["spec"]["predictor"].get("canaryTrafficPercent") is not None:
                self._patch({"spec": {"predictor": {"canaryTrafficPercent": 0}}})
            self._patch(
                {
                    "metadata": {"annotations": {MODELS: self.annotations.get(MODELS)}},
                    "spec": {"predictor": {self.format: {"storageUri": self.uri}, "canaryTrafficPercent": percent}},
                }
            )
            self._wait(100 if percent is None else percent)
        except (RepoManagerError, KeyboardInterrupt) as exc:
            return RollbackFailedError(
                f"{what}\nPutting the previous state back failed: {exc or 'interrupted again'}",
                hint=f"By hand: kubectl edit inferenceservice {self.target.name} -n {self.target.namespace}; "
                f"storageUri was {self.uri}",
            )
        return RolloutUndoneError(f"{what}\nThe previous state was put back: it serves {self.uri}.")

    def _patch(self, patch: Object) -> None:
        self.api.patch_custom(Kind.INFERENCE_SERVICE, self.target.namespace, self.target.name, patch)

    def _watch(self, percent: int, seconds: float) -> None:
        """See that the service stays as it is for a while.

        Raises:
            ServerError: it does not.
        """
        if seconds > 0:
            self._note(f"watched at {percent} % for {seconds:g} s")
            watch_service(self.api, self.target.namespace, self.target.name, percent, seconds=seconds)

    def _wait(self, percent: int) -> str:
        return wait_for_service(
            self.api,
            self.target.namespace,
            self.target.name,
            percent,
            timeout_s=self.options.load_timeout_s,
            report=self._note,
            known=self.known,
        )

    def _result(
        self, after: str, models: Mapping[str, tuple[int, ...]], steps: tuple[int, ...], revision: str, *, changed: bool
    ) -> KServeRollout:
        return KServeRollout(
            target=str(self.target),
            model=self.name,
            version=self.version,
            before=self.uri,
            after=after,
            models=models,
            steps=steps,
            revision=revision,
            changed=changed,
            dry_run=self.options.dry_run,
            seconds=time.monotonic() - self.began,
            events=tuple(self.events),
        )

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._tell(event)


def _format_of(service: Object) -> str:
    """Return under which key the predictor names its storage: `model`, or the older `triton`."""
    predictor = service["spec"]["predictor"]
    for key in ("model", "triton"):
        if (predictor.get(key) or {}).get("storageUri"):
            return key
    raise ServerRefusedError(
        f"InferenceService {service['metadata']['name']} names no storageUri under predictor.model",
        hint="deploy/kserve has one that does.",
    )
