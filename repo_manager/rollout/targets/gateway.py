"""Weights of a Gateway API HTTPRoute: a canary of two releases behind one address, without KServe."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence

from repo_manager.errors import ServerRefusedError
from repo_manager.files import document
from repo_manager.rollout.targets.api import Api, Kind, pause
from repo_manager.rollout.targets.api_objects import Object

__all__ = ["GatewayWeights", "backends_of"]

_WHOLE = 100


class GatewayWeights:
    """The canary's share in every rule with both Services of a route, for `repo_manager.rollout.trial.canary`.

    Args:
        namespace: namespace of the HTTPRoute, where the account needs the rights to read and patch it.
        route: name of the HTTPRoute. Every rule of it with both Services gets the weights.
        services: the Service of the old version and the one of the new.
        api: connected API of the cluster.
        timeout_s: how long a gateway may take to accept a change.

    Raises:
        ServerRefusedError: no rule of the route names both.
    """

    def __init__(
        self, namespace: str, route: str, services: tuple[str, str], api: Api, *, timeout_s: float = 60.0
    ) -> None:
        self._namespace, self._route, self._api, self._timeout_s = namespace, route, api, timeout_s
        self._stable, self._canary = services
        found = list(self._rules(api.custom(Kind.HTTP_ROUTE, namespace, route)))
        if not found:
            raise ServerRefusedError(
                f"No rule of HTTPRoute {namespace}/{route} sends to both {self._stable} and {self._canary}",
                hint=f"Such a route: {document('kubernetes.md')}",
            )
        self._before = [_weights_of(rule) for rule in found]
        self._fraction = self._share()
        self.touched = False

    def _share(self) -> float:
        """Return the canary's share in the first rule. A weight left out is 1."""
        held = {name: 1 if weight is None else weight for name, weight in self._before[0].items()}
        both = held[self._stable] + held[self._canary]
        return held[self._canary] / both if both else 0.0

    def set_weight(self, fraction: float) -> None:
        """Give the canary this share, and wait until every gateway has accepted it.

        Raises:
            ServerError: the API server or a gateway refused it, or another process changed the route.
        """
        share = round(fraction * _WHOLE)
        self._set([{self._canary: share, self._stable: _WHOLE - share}] * len(self._before))
        self._fraction = fraction

    def put_back(self) -> None:
        """Give both the weights they had before, and wait as for `set_weight`.

        Raises:
            ServerError: as there.
        """
        self._set(self._before)
        self._fraction = self._share()

    def described(self) -> str:
        """Return the weights of before, for a person."""
        rules = (
            ", ".join(f"{name} {1 if weight is None else weight}" for name, weight in each.items())
            for each in self._before
        )
        return "; ".join(dict.fromkeys(rules))

    def _set(self, weights: Sequence[Mapping[str, int | None]]) -> None:
        route = copy.deepcopy(self._api.custom(Kind.HTTP_ROUTE, self._namespace, self._route))
        for rule, wanted in zip(self._rules(route), weights, strict=False):
            for backend in rule["backendRefs"]:
                if backend["name"] in (self._stable, self._canary):
                    weight = wanted[backend["name"]]
                    if weight is None:
                        backend.pop("weight", None)
                    else:
                        backend["weight"] = weight
        # A merge patch replaces the whole list. The resourceVersion keeps it from overwriting another's change.
        patch = {
            "metadata": {"resourceVersion": route["metadata"]["resourceVersion"]},
            "spec": {"rules": route["spec"]["rules"]},
        }
        self._api.patch_custom(Kind.HTTP_ROUTE, self._namespace, self._route, patch)
        self.touched = True
        self._wait()

    def current(self) -> float:
        """Return the latest share. Before, the one the route has."""
        return self._fraction

    def _rules(self, route: Object) -> Iterator[Object]:
        for rule in route["spec"].get("rules") or ():
            names = {backend["name"] for backend in rule.get("backendRefs") or ()}
            if {self._stable, self._canary} <= names:
                yield rule

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            route = self._api.custom(Kind.HTTP_ROUTE, self._namespace, self._route)
            waiting = list(_not_accepted(route))
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise ServerRefusedError(f"HTTPRoute {self._namespace}/{self._route}: " + "; ".join(waiting))
            pause()


def backends_of(api: Api, namespace: str, route: str) -> tuple[str, str]:
    """Return the first two backends of the first rule with two.

    Args:
        api: connected API of the cluster.
        namespace: namespace of the HTTPRoute. Those of its backends are not looked at.
        route: name of the HTTPRoute. It is read, not changed.

    Raises:
        ServerError: there is no such route, or none of its rules has two.
    """
    found = api.custom(Kind.HTTP_ROUTE, namespace, route)
    for rule in found["spec"].get("rules") or ():
        names = [str(backend["name"]) for backend in rule.get("backendRefs") or ()]
        if len(names) > 1:
            return names[0], names[1]
    raise ServerRefusedError(
        f"No rule of HTTPRoute {namespace}/{route} sends to two Services",
        hint=f"Such a route: {document('kubernetes.md')}",
    )


def _weights_of(rule: Object) -> dict[str, int | None]:
    return {str(backend["name"]): backend.get("weight") for backend in rule["backendRefs"]}


def _not_accepted(route: Object) -> Iterator[str]:
    parents = (route.get("status") or {}).get("parents") or ()
    if not parents:
        yield "no gateway has taken it"
    for parent in parents:
        name = (parent.get("parentRef") or {}).get("name", "a gateway")
        conditions = {each["type"]: each for each in parent.get("conditions") or ()}
        for kind in ("Accepted", "ResolvedRefs"):
            found = conditions.get(kind) or {}
            old = found.get("observedGeneration", 0) < route["metadata"].get("generation", 0)
            if old or found.get("status") != "True":
                yield f"{name}: {kind} is {found.get('status', 'not told')} {found.get('message', '')}".rstrip()
