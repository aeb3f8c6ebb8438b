"""Asks the pods of a roll-out as soon as they are ready: for an inference, or for their index when a model leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.rollout.observe import observe
from repo_manager.rollout.result import PodProof
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.smoke import smoke_test
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.kubernetes_status import is_ready
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions
from repo_manager.triton_config.config import ModelConfig

__all__ = ["PodProver"]

_REACH_S = 3.0
_TRIES = 3


class PodProver:
    """Asks each new pod once, as soon as it is ready. Mostly, pods can be reached from inside the cluster only.

    A pod is asked for an inference. After an undeployment, for its index. One answering pod proves pods reachable.
    From then on, an unreachable pod is a failure.
    """

    def __init__(self, context: RolloutContext, connection: ClientOptions) -> None:
        self._folder, self._name, self._version = context.folder, context.name, context.version
        self._leaves, self._context = context.leaves, context
        self._timeout_s, self._report = context.options.smoke_timeout_s, context.note
        self._connection, self._limit = connection, context.call_s
        self._proofs: dict[str, PodProof] = {}
        self._tries: dict[str, int] = {}
        self._reachable = False

    @property
    def proof(self) -> str:
        """The proof in a pod's answer."""
        return "index" if self._leaves else "inference"

    def take(self) -> tuple[PodProof, ...]:
        """Return the proofs since the last call."""
        proofs, self._proofs = tuple(self._proofs.values()), {}
        return proofs

    def prove(self, pods: Sequence[Object], port: int) -> None:
        """Ask the ready pods not asked yet.

        Raises:
            ServerError: a pod answers wrongly or not at all, though pods can be reached.
        """
        for pod in pods:
            name, address = pod["metadata"]["name"], (pod.get("status") or {}).get("podIP")
            if name in self._proofs or not is_ready(pod) or not address:
                continue
            url = f"grpc://[{address}]:{port}" if ":" in address else f"grpc://{address}:{port}"
            latency_ns = self._ask(name, url)
            if latency_ns is None and self._again(name):
                continue
            if latency_ns is None and not self._proofs:
                self._report(f"{url} cannot be reached from here: readiness is all that can be seen of the pods")
            self._proofs[name] = PodProof(name, url, latency_ns)

    def _again(self, pod: str) -> bool:
        """Return whether to ask once more: one unreachable pod is no news where none is reachable."""
        self._tries[pod] = self._tries.get(pod, 0) + 1
        if not self._reachable:
            return False
        if self._tries[pod] >= _TRIES:
            raise ServerUnreachableError(f"pod {pod} is ready and does not answer, though other pods do")
        return True

    def _ask(self, pod: str, url: str) -> int | None:
        with TritonClient.connect(url, self._connection) as client, client.within(self._limit):
            try:
                client.live(timeout_s=_REACH_S)
            except ServerUnreachableError:
                return None
            self._reachable = True
            if self._leaves:
                return self._index_of(pod, client)
            config = ModelConfig.from_message(client.model_config(self._name, self._version, timeout_s=self._timeout_s))
            try:
                result = smoke_test(client, self._folder, self._name, self._version, config, timeout_s=self._timeout_s)
            except ServerRefusedError as exc:
                raise ServerRefusedError(f"pod {pod}: {exc.message}", hint=exc.hint) from exc
        self._report(f"pod {pod}: {self._name}:{self._version} answers ({result.describe_reference()})")
        return result.latency_ns

    def _index_of(self, pod: str, client: TritonClient) -> int:
        """Confirm by a pod's index that the leaving versions are gone. Return how long the answer took."""
        began = time.monotonic_ns()
        ready = observe(client, self._name).ready
        if self._context.remaining(ready) != ready:
            raise ServerRefusedError(f"pod {pod} still serves {self._context.what}")
        self._report(f"pod {pod}: {self._context.what} is not in its index any more")
        return time.monotonic_ns() - began
