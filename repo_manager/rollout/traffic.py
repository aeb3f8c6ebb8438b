"""The traffic of an HTTPRoute, shifted from one Service to another in steps. Put back when anything of it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from repo_manager.errors import RepoManagerError, RollbackFailedError, RolloutUndoneError, ServerError, UsageError
from repo_manager.rollout.engine import as_interrupts
from repo_manager.rollout.rollout_context import Report
from repo_manager.rollout.targets.address import ClusterAddress, form_of
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.gateway import GatewayWeights, backends_of

__all__ = ["Route", "Traffic", "parse_shares", "shift_traffic"]

_NAME = r"[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?"


@dataclasses.dataclass(frozen=True)
class Route(ClusterAddress):
    """An HTTPRoute: `gateway://namespace/route`."""

    SCHEME: ClassVar[str] = "gateway"
    FORM: ClassVar[re.Pattern[str]] = form_of("gateway", _NAME, _NAME)
    IS_NOT: ClassVar[tuple[str, str]] = ("HTTPRoute", "Write it as gateway://NAMESPACE/ROUTE.")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How a route shares traffic.

    Attributes:
        route: `gateway://namespace/route`, with `?context=NAME` where it was given.
        cluster: the API server's address and the context of the kubeconfig.
        services: the Service of the old version, and the one of the new.
        before: the new one's share before, 0 to 1.
        share: its share now. Of a dry run, the planned one.
        steps: the shares it got on the way, the last one included. Empty where nothing was asked for.
        dry_run: true when nothing was changed, and `share` is only planned.
    """

    route: str
    cluster: str
    services: tuple[str, str]
    before: float
    share: float
    steps: tuple[float, ...]
    dry_run: bool


def parse_shares(text: str) -> tuple[float, ...]:
    """Parse `10%`, or `10%,50%,100%`.

    Raises:
        UsageError: one is no percentage between 0 and 100.
    """
    found = []
    for part in text.split(","):
        number = part.strip().removesuffix("%")
        if not number.replace(".", "", 1).isdecimal() or float(number) > 100:
            raise UsageError(f"--share {text}: {part.strip()!r} is no share", hint="For instance 10%, or 10%,50%,100%.")
        found.append(float(number) / 100)
    return tuple(found)


def shift_traffic(
    route: str,
    steps: Sequence[float] = (),
    *,
    services: tuple[str | None, str | None] = (None, None),
    step_s: float = 120.0,
    dry_run: bool = False,
    report: Report = lambda _: None,
) -> Traffic:
    """Give a Service of an HTTPRoute a share of the traffic, in steps. Each is accepted by every gateway first.

    On any failure, Ctrl-C and SIGTERM the weights of before come back.

    Args:
        route: `gateway://namespace/route`, with `?context=NAME` where the kubeconfig has several.
        steps: shares, 0 to 1, one after the other. Empty only reads.
        services: the Service of the old version, and of the new. `None` takes the first and the second of the first
            rule with two.
        step_s: how long each share but the last stays.
        dry_run: only report the planned change.
        report: called with a line of text for each step.

    Raises:
        UsageError: the route or a share cannot be read.
        ServerError: there is no such route, or the first share was refused. Nothing was changed.
        RolloutUndoneError: a share was not accepted, and the weights of before came back.
        RollbackFailedError: the old weights did not come back.
    """
    target = Route.parse(route)
    wrong = [step for step in steps if not 0 <= step <= 1]
    if wrong:
        raise UsageError(f"a share of {wrong[0] * 100:g} % is not between 0 and 100 %")
    with contextlib.closing(Api(context=target.context)) as api, as_interrupts():
        found = backends_of(api, target.namespace, target.name)
        chosen = (services[0] or found[0], services[1] or found[1])
        weights = GatewayWeights(target.namespace, target.name, chosen, api)
        before = weights.current()
        if not dry_run and steps:
            with _put_back(weights, str(target)):
                for index, step in enumerate(steps):
                    report(f"{chosen[1]}: {step * 100:g} % of the traffic")
                    weights.set_weight(step)
                    if index < len(steps) - 1:
                        time.sleep(step_s)
        share = steps[-1] if steps else before
        return Traffic(str(target), api.where, chosen, before, share, tuple(steps), dry_run)


@contextlib.contextmanager
def _put_back(weights: GatewayWeights, route: str) -> Iterator[None]:
    """Put the weights of before back when the block fails."""
    try:
        yield
    except BaseException as exc:
        what = "interrupted" if isinstance(exc, KeyboardInterrupt) else str(exc)
        if not weights.touched:
            raise
        try:
            weights.put_back()
        except (ServerError, KeyboardInterrupt) as failure:
            raise RollbackFailedError(
                f"{route}: {what}\nThe weights of before could not be put back: {failure}",
                hint=f"By hand: kubectl edit httproute; they were {weights.described()}.",
            ) from exc
        if not isinstance(exc, RepoManagerError | KeyboardInterrupt):
            raise
        raise RolloutUndoneError(f"{route}: {what}\nThe weights of before are back: {weights.described()}.") from exc
