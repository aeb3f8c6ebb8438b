"""Roll-outs as Kubernetes Events, beside the controllers' own: `kubectl describe` and `kubectl events` show them."""

from __future__ import annotations

import socket
import time

from repo_manager.errors import ServerError
from repo_manager.repository.state import now_text
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.api_objects import Object

__all__ = ["Events"]

_COMPONENT = "repo-manager"
_LONGEST = 1024


class Events:
    """The Events of one object. A roll-out never fails for want of an event.

    Args:
        api: connected API of the cluster.
        item: the Deployment or InferenceService, as it was read.
        context: the roll-out's context: model, options, deadline, report.
    """

    def __init__(self, api: Api, item: Object, context: RolloutContext) -> None:
        self._api, self._item, self._context = api, item, context
        self._refused = False

    def tell(self, reason: str, text: str, *, warning: bool = False) -> None:
        """Write an Event.

        Args:
            reason: the Event's `reason`: one word in CamelCase, as `RolloutStarted`.
            text: the event, for a person.
            warning: whether it is one, else it is normal.
        """
        if self._refused:
            return
        metadata, now = self._item["metadata"], now_text()
        space = metadata.get("namespace", "default")
        about = {"apiVersion": self._item.get("apiVersion", "apps/v1"), "kind": self._item.get("kind", "Deployment")}
        about |= {key: metadata[key] for key in ("name", "uid", "resourceVersion") if key in metadata}
        event = {
            "metadata": {"name": f"{metadata['name']}.{time.time_ns():x}", "namespace": space},
            "involvedObject": {**about, "namespace": space},
            "reason": reason,
            "message": f"{self._context.action} {self._context.what}: {text}"[:_LONGEST],
            "type": "Warning" if warning else "Normal",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": _COMPONENT, "host": socket.gethostname()},
            "reportingComponent": _COMPONENT,
            "reportingInstance": socket.gethostname(),
        }
        try:
            self._api.create_event(space, event)
        except ServerError as exc:
            self._refused = True
            self._context.note(f"no Events are written of {metadata['name']}: {exc.message}")
