"""Waiting for a Deployment to become what its template says, with an eye on what can go wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.rollout.targets.api import Api, Object
from repo_manager.rollout.targets.template import SNAPSHOT
from repo_manager.rollout.targets.watch import Trouble, judge, new_pods

__all__ = ["wait_for_rollout"]

_POLL_S = 1.0
_SILENCE_S = 60.0


def wait_for_rollout(
    api: Api,
    namespace: str,
    deployment: Object,
    url: str,
    *,
    timeout_s: float,
    report: Callable[[str], None],
    look: Callable[[Sequence[Object]], None] = lambda _: None,
) -> Object:
    """Wait until every pod of a Deployment serves a snapshot; return the Deployment as it is then.

    Args:
        api: the cluster.
        namespace: the Deployment's.
        deployment: as it was read before.
        url: what its pods have to serve.
        timeout_s: how long it may take.
        report: told whenever something changes.
        look: shown the new pods at every turn; what it raises ends the wait.

    Raises:
        ServerRefusedError: it will not come to an end, did not within `timeout_s`, or somebody else has changed it.
        ServerUnreachableError: the API server gave no answer for a minute.
    """
    name = deployment["metadata"]["name"]
    labels = deployment["spec"]["selector"].get("matchLabels") or {}
    deadline = time.monotonic() + timeout_s
    heard, told = time.monotonic(), ""
    while True:
        try:
            now = api.deployment(namespace, name)
            if now is None:
                raise ServerRefusedError(f"Deployment {namespace}/{name} was deleted meanwhile")
            pods = new_pods(api.pods(namespace, labels), url)
            heard = time.monotonic()
        except ServerUnreachableError:
            if time.monotonic() > min(deadline, heard + _SILENCE_S):
                raise
            time.sleep(_POLL_S)
            continue
        _still_ours(now, url)
        progress = judge(now, pods)
        if progress.note != told:
            report(f"{name}: {progress.note}")
            told = progress.note
        if progress.trouble is not None:
            raise _failure(api, namespace, progress.trouble)
        look(pods)
        if progress.done:
            return now
        if time.monotonic() > deadline:
            raise ServerRefusedError(
                f"Deployment {name} was not rolled out within {timeout_s:g} s: {progress.note}",
                hint="--timeout allows it longer.",
            )
        time.sleep(_POLL_S)


def _still_ours(deployment: Object, url: str) -> None:
    annotations = deployment["spec"]["template"].get("metadata", {}).get("annotations") or {}
    found = annotations.get(SNAPSHOT, url)
    if found != url:
        raise ServerRefusedError(
            f"Somebody else changed Deployment {deployment['metadata']['name']} meanwhile: it is to serve {found}"
        )


def _failure(api: Api, namespace: str, trouble: Trouble) -> ServerRefusedError:
    text = trouble.what
    if trouble.pod is not None and trouble.container is not None:
        tail = api.log_tail(namespace, trouble.pod, trouble.container)
        text += f"; its log ends:\n{tail}" if tail else ""
    return ServerRefusedError(text)
