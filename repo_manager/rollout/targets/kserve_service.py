"""The InferenceService that `kserve://namespace/name` names, what a roll-out of it did, and what it served before."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository import Location, find_model, model_state
from repo_manager.rollout.targets.api import Api, Kind, using
from repo_manager.rollout.targets.template import MODELS, parse_models

__all__ = ["KServeCanary", "KServeRollout", "KServeTarget", "parse_kserve_target", "previous_on_kserve"]

_TARGET = re.compile(r"kserve://(?P<namespace>[a-z0-9][-a-z0-9]*)/(?P<name>[a-z0-9][-a-z0-9.]*)/?")


@dataclasses.dataclass(frozen=True)
class KServeTarget:
    """An InferenceService in the cluster that the kubeconfig names."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"kserve://{self.namespace}/{self.name}"


@dataclasses.dataclass(frozen=True)
class KServeRollout:
    """A roll-out that succeeded, or its plan.

    Attributes:
        target: `kserve://namespace/name`.
        model: the model.
        version: the version that is served now.
        before: the `storageUri` before.
        after: the snapshot that it names now.
        models: everything that the snapshot holds.
        steps: percentages of the traffic that the new revision got before it got all.
        revision: the new revision's name; empty where KServe runs without Knative.
        changed: whether anything had to be done; `False` for a dry run.
        dry_run: whether this is the plan alone.
        seconds: duration.
        events: what was done, in order.
    """

    target: str
    model: str
    version: int
    before: str
    after: str
    models: Mapping[str, tuple[int, ...]]
    steps: tuple[int, ...]
    revision: str
    changed: bool
    dry_run: bool
    seconds: float
    events: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class KServeCanary:
    """The way from nothing to all of the traffic; without it, the new revision gets all when it is ready.

    Attributes:
        percents: ascending shares of the traffic on the way, without the 100.
        step_s: for how long the service is watched at each share, in seconds.
        gate: called after each with its percentage; what it raises undoes the roll-out.
    """

    percents: tuple[int, ...] = ()
    step_s: float = 0.0
    gate: Callable[[int], None] = lambda _: None

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: the percentages do not ascend between 1 and 99.
        """
        between = all(0 < percent < 100 for percent in self.percents)
        if not between or list(self.percents) != sorted(set(self.percents)):
            raise UsageError(f"Canary percentages {list(self.percents)} do not ascend between 1 and 99")


def parse_kserve_target(text: str) -> KServeTarget:
    """Read `kserve://namespace/name`.

    Raises:
        UsageError: it is none.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no InferenceService", hint="Write it as kserve://NAMESPACE/NAME.")
    return KServeTarget(match["namespace"], match["name"])


def previous_on_kserve(target: KServeTarget, repository: Location, name: str, *, api: Api | None = None) -> int:
    """Return the version of a model to go back to: the one deployed before the one that the InferenceService serves.

    Raises:
        RepositoryError: the repository remembers none.
        ServerError: the API server refused or did not answer.
    """
    with using(api) as cluster:
        service = cluster.custom(Kind.INFERENCE_SERVICE, target.namespace, target.name)
    held = parse_models((service["metadata"].get("annotations") or {}).get(MODELS)) or {}
    current = max(held.get(name, (0,)))
    existing = {entry.version for entry in find_model(repository, name).versions}
    for deployment in reversed(model_state(repository, name).deployments):
        if deployment.version != current and deployment.version in existing:
            return deployment.version
    raise RepositoryError(
        f"{target} has no earlier roll-out of {name} to go back to",
        hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION --to {target}",
    )
