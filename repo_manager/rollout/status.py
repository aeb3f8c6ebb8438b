"""What a server serves against what the repository says it should."""

from __future__ import annotations

import dataclasses

from repo_manager.repository import Location, ModelEntry, model_state, scan
from repo_manager.rollout.observe import ServedState, observe
from repo_manager.rollout.plan import changed_fields
from repo_manager.server import TritonClient

__all__ = ["ModelStatus", "status"]


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """One model on one server.

    Attributes:
        model: the model.
        url: the server.
        ready: versions that are READY.
        wanted: versions that the repository's policy serves.
        deployed: the version of the last recorded deployment; `None` when there is none.
        deployed_at: its time, UTC, ISO 8601.
        drift: every difference between server and repository, in words; empty when they agree.
    """

    model: str
    url: str
    ready: tuple[int, ...]
    wanted: tuple[int, ...]
    deployed: int | None
    deployed_at: str | None
    drift: tuple[str, ...]


def status(repository: Location, client: TritonClient, names: tuple[str, ...] = ()) -> tuple[ModelStatus, ...]:
    """Compare a server with its repository; nothing is changed.

    Args:
        repository: the repository that the server serves.
        client: of the server.
        names: the models; empty for all that were deployed or are loaded.

    Raises:
        RepositoryError: the repository cannot be read.
        ServerError: the server does not answer.
    """
    found = []
    for entry in scan(repository, deep=False):
        if names and entry.name not in names:
            continue
        state = model_state(repository, entry.name)
        served = observe(client, entry.name)
        if not names and not state.deployments and not served.ready and not served.reasons:
            continue
        last = state.deployments[-1] if state.deployments else None
        found.append(
            ModelStatus(
                model=entry.name,
                url=client.url,
                ready=served.ready,
                wanted=entry.served_versions,
                deployed=None if last is None else last.version,
                deployed_at=None if last is None else last.at,
                drift=_drift(entry, served, None if last is None else last.version),
            )
        )
    return tuple(found)


def _drift(entry: ModelEntry, served: ServedState, deployed: int | None) -> tuple[str, ...]:
    drift = []
    existing = {each.version for each in entry.versions}
    if not served.ready:
        drift.append("it is not loaded" if deployed is not None else "it was never deployed")
    elif served.ready != entry.served_versions:
        wanted = ", ".join(map(str, entry.served_versions)) or "none"
        drift.append(f"READY are {', '.join(map(str, served.ready))}, config.pbtxt serves {wanted}")
    if deployed is not None and deployed not in served.ready and served.ready:
        drift.append(f"version {deployed} was deployed last and is not served")
    drift += [f"version {each} is served and its folder is gone" for each in served.ready if each not in existing]
    drift += [f"version {each}: {reason}" for each, reason in served.reasons.items() if each in entry.served_versions]
    fields = changed_fields(entry.config(), served.config)
    if fields:
        drift.append(f"the server runs it with another {', '.join(fields)} than config.pbtxt says")
    return tuple(drift)
