"""What a server says of a model right now; nothing here changes anything."""

from __future__ import annotations

import dataclasses
import time

from repo_manager.errors import ServerRefusedError
from repo_manager.server import TritonClient
from repo_manager.triton_config import ModelConfig

__all__ = ["ServedState", "observe", "wait_until_only_ready"]

_POLL_S = 0.02
_BUSY = {"LOADING", "UNLOADING"}
READY = "READY"


@dataclasses.dataclass(frozen=True)
class ServedState:
    """A model on a server.

    Attributes:
        url: the server.
        ready: versions that are READY, ascending. Says nothing of whether they answer: a killed stub stays READY.
        busy: versions that are loading or unloading.
        reasons: Triton's reason for versions that are neither, where it gives one.
        config: what the server runs the model with; `None` when it is not loaded.
    """

    url: str
    ready: tuple[int, ...]
    busy: tuple[int, ...]
    reasons: dict[int, str]
    config: ModelConfig | None

    @property
    def sentence(self) -> str:
        """Say what is served, for a person."""
        if not self.ready:
            return f"{self.url} serves no version of it"
        plural = "s" if len(self.ready) > 1 else ""
        return f"{self.url} serves version{plural} {', '.join(map(str, self.ready))}"


def observe(client: TritonClient, name: str) -> ServedState:
    """Ask a server what it serves of a model.

    Raises:
        ServerUnreachableError: no answer.
        ServerRefusedError: the server refuses to tell.
    """
    entries = client.versions(name)
    ready = tuple(sorted(version for version, entry in entries.items() if entry.state == READY))
    config = None
    if ready:
        try:
            config = ModelConfig.from_message(client.model_config(name))
        except ServerRefusedError:
            ready = ()  # unloaded since the index was read
    return ServedState(
        url=client.url,
        ready=ready,
        busy=tuple(sorted(version for version, entry in entries.items() if entry.state in _BUSY)),
        reasons={version: entry.reason for version, entry in entries.items() if entry.reason and entry.state != READY},
        config=config,
    )


def wait_until_only_ready(
    client: TritonClient, name: str, wanted: tuple[int, ...], timeout_s: float, *, settled: bool = False
) -> ServedState:
    """Wait until exactly these versions are READY; return the last state seen.

    Whether it is the wanted one is for the caller to see.

    Args:
        client: of the server.
        name: the model.
        wanted: the versions, ascending.
        timeout_s: how long.
        settled: wait also until nothing is on its way (a dropped version stays UNLOADING until its last request has
            ended and its process is gone).
    """
    deadline = time.monotonic() + timeout_s
    while True:
        state = observe(client, name)
        if state.ready == wanted and not (settled and state.busy):
            return state
        if not state.busy and set(wanted) - set(state.ready):
            return state  # nothing is on its way, so waiting changes nothing
        if time.monotonic() >= deadline:
            return state
        time.sleep(_POLL_S)
