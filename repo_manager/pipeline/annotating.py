"""Roll-outs as annotations in Grafana, where the settings name one: marks in every dashboard with a query for the
tags.

It is separate from `deploying`, which knows no system other than its targets.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from repo_manager.errors import RepoManagerError
from repo_manager.optional import deferred
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.rollout_context import Report
from repo_manager.server.transport import ClientOptions, ServerUrl
from repo_manager.settings import Settings

if TYPE_CHECKING:
    from repo_manager.server import http_wire
else:
    http_wire = deferred("repo_manager.server.http_wire")  # most settings name no Grafana

__all__ = ["annotated"]

_PATH = "/api/annotations"
_TIMEOUT_S = 5.0
_LIMIT_BYTES = 1 << 20
_TAG = "repo-manager"


@contextlib.contextmanager
def annotated(
    settings: Settings, action: str, what: str, options: RolloutOptions, report: Report
) -> Iterator[list[Rollout]]:
    """Mark the time of a roll-out in Grafana, regardless of its outcome. A roll-out without a change is not marked.

    A failed mark is reported, and the roll-out goes on.

    Args:
        settings: the address and token of Grafana. Without a URL nothing is done.
        action: `deploy`, `rollback` or `undeploy`. A tag of the mark, and the first word of its text.
        what: subject of the mark: the model, and the version where it is known.
        options: of the roll-out. A dry run is not marked.
        report: called with a line for a failed mark.
    """
    done: list[Rollout] = []
    if settings.grafana is None or options.dry_run:
        yield done
        return
    began_s = time.time()
    try:
        yield done
    except BaseException as exc:
        outcome = "interrupted" if isinstance(exc, KeyboardInterrupt) else type(exc).__name__
        _mark(settings, began_s, [action, _model(what), "failed"], f"{action} {what}: {outcome}", report)
        raise
    if done and done[0].changed:
        _mark(settings, began_s, [action, _model(what), "done"], f"{action} {what} on {done[0].target}", report)


def _model(what: str) -> str:
    return what.partition(":")[0]


def _mark(settings: Settings, began_s: float, tags: list[str], text: str, report: Report) -> None:
    body = {"time": round(began_s * 1e3), "timeEnd": round(time.time() * 1e3), "tags": [_TAG, *tags], "text": text}
    try:
        options = ClientOptions(
            token=settings.grafana_token,
            root_certificates=settings.tls_ca,
            headers={"Content-Type": "application/json"},
        )
        with contextlib.closing(http_wire.HttpWire(ServerUrl.parse(str(settings.grafana)), options)) as wire:
            status, _, answer = wire.request(
                "POST", _PATH, json.dumps(body).encode(), _TIMEOUT_S, limit_bytes=_LIMIT_BYTES
            )
        if status != 200:
            report(
                f"{settings.grafana} did not take the annotation ({status}): {answer[:200].decode(errors='replace')}"
            )
    except RepoManagerError as exc:
        report(f"no annotation in Grafana: {exc.message}")
