"""What a repository remembers that its folders cannot say: numbers given out, deployments, tags.

It is one hidden file in the root, where Triton ignores files, so that it travels with every copy of the repository.
Nothing that is served depends on it: without it the numbers go on from the highest version on disk, and only the
roll-back target and the tags are lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.files import file_lock, read_regular, write_atomic
from repo_manager.repository.layout import LOCK_FILENAME, STATE_FILENAME

__all__ = [
    "Deployment",
    "ModelState",
    "Unproven",
    "change_state",
    "current_version",
    "format_entry",
    "now_text",
    "parse_entry",
    "previous_version",
    "read_state",
    "read_states",
    "repository_lock",
]

_SCHEMA_VERSION = 1
_MAX_DEPLOYMENTS = 50
LOCK_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One change of what is served.

    Attributes:
        version: the version that was deployed.
        at: when, UTC, ISO 8601.
    """

    version: int
    at: str


@dataclasses.dataclass(frozen=True)
class Unproven:
    """A version that a roll-out has begun to serve and has not proven; what is left of a roll-out that was killed.

    Attributes:
        version: the version.
        before: what was served before, to go back to; empty when nothing was.
        at: since when, UTC, ISO 8601.
    """

    version: int
    before: tuple[int, ...]
    at: str


@dataclasses.dataclass(frozen=True)
class ModelState:
    """What is remembered of one model.

    Attributes:
        highest_version: the highest number ever given out; 0 when none.
        deployments: oldest first; the last one is current.
        tags: tag -> version.
        unproven: the version that is on trial; `None` when none is.
        extra: fields of a newer repo-manager, kept as they are.
    """

    highest_version: int = 0
    deployments: tuple[Deployment, ...] = ()
    tags: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unproven: Unproven | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def deployed(self, version: int) -> ModelState:
        """Return the state after a deployment now; a repetition of the current one changes nothing."""
        if self.deployments and self.deployments[-1].version == version:
            return dataclasses.replace(self, unproven=None)
        history = (*self.deployments, Deployment(version, now_text("microseconds")))
        return dataclasses.replace(self, deployments=history[-_MAX_DEPLOYMENTS:], unproven=None)

    def numbered(self, version: int) -> ModelState:
        """Return the state after `version` was given out."""
        return dataclasses.replace(self, highest_version=max(self.highest_version, version))


def now_text(timespec: str = "seconds") -> str:
    """Return the time now, UTC, ISO 8601, to the second or as `datetime.isoformat` takes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def current_version(state: ModelState) -> int | None:
    """Return the version of the last recorded deployment; `None` when there is none."""
    return state.deployments[-1].version if state.deployments else None


def previous_version(state: ModelState, existing: tuple[int, ...]) -> int | None:
    """Return the version to go back to: the last one deployed before the current one that still exists.

    While another version is on trial, that is the current one.
    """
    current = current_version(state)
    if state.unproven is not None and state.unproven.version != current and current in existing:
        return current
    for deployment in reversed(state.deployments):
        if deployment.version != current and deployment.version in existing:
            return deployment.version
    return None


def read_state(root: Path, name: str) -> ModelState:
    """Read what is remembered of a model; an empty state when nothing is.

    Raises:
        RepositoryError: the file is damaged.
        OSError: it cannot be read.
    """
    return _model_of(_read(root), name, root)


def read_states(root: Path) -> dict[str, ModelState]:
    """Read what is remembered of every model, removed ones included.

    Raises:
        RepositoryError: the file is damaged.
        OSError: it cannot be read.
    """
    document = _read(root)
    return {name: _model_of(document, name, root) for name in sorted(document.get("models", {}))}


@contextlib.contextmanager
def repository_lock(root: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the repository's one lock; it is held for renames and small files only, never while copying.

    Raises:
        RepositoryError: another process holds it for longer than `timeout_s`.
        OSError: the root cannot be written.
    """
    with file_lock(root / LOCK_FILENAME, timeout_s=timeout_s):
        yield


def change_state(root: Path, name: str, change: Callable[[ModelState], ModelState], *, staging: Path) -> ModelState:
    """Change what is remembered of a model, atomically; the caller holds the repository's lock.

    Args:
        root: the repository's real path.
        name: the model.
        change: the old state to the new one; an equal one writes nothing.
        staging: a folder for the temporary file, on the same file system.

    Returns:
        The new state.

    Raises:
        RepositoryError: the file is damaged.
        OSError: it cannot be read or written.
    """
    document = _read(root)
    before = _model_of(document, name, root)
    after = change(before)
    if after != before:
        document["schema_version"] = max(_SCHEMA_VERSION, int(document.get("schema_version", _SCHEMA_VERSION)))
        document.setdefault("models", {})[name] = format_entry(after)
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        write_atomic(root / STATE_FILENAME, text.encode(), staging=staging)
    return after


def _read(root: Path) -> dict[str, Any]:
    path = root / STATE_FILENAME
    try:
        document = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc
    if not isinstance(document, dict) or not isinstance(document.get("models", {}), dict):
        raise _damaged(path, "it is not an object with 'models'")
    if not isinstance(document.get("schema_version", 1), int):
        raise _damaged(path, "schema_version is not an integer")
    return document


def parse_entry(entry: Mapping[str, Any]) -> ModelState:
    """Read one model's part of a state file.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: it is damaged.
    """
    known = {"highest_version", "deployments", "tags", "on_trial"}
    trial = entry.get("on_trial")
    return ModelState(
        highest_version=int(entry.get("highest_version", 0)),
        deployments=tuple(Deployment(int(d["version"]), str(d["at"])) for d in entry.get("deployments", ())),
        tags={str(tag): int(version) for tag, version in entry.get("tags", {}).items()},
        unproven=None
        if trial is None
        else Unproven(int(trial["version"]), tuple(int(each) for each in trial["before"]), str(trial["at"])),
        extra={key: value for key, value in entry.items() if key not in known},
    )


def format_entry(state: ModelState) -> dict[str, Any]:
    """Return one model's part of a state file."""
    trial = {} if state.unproven is None else {"on_trial": dataclasses.asdict(state.unproven)}
    return {
        **state.extra,
        **trial,
        "highest_version": state.highest_version,
        "deployments": [dataclasses.asdict(deployment) for deployment in state.deployments],
        "tags": dict(sorted(state.tags.items())),
    }


def _model_of(document: Mapping[str, Any], name: str, root: Path) -> ModelState:
    try:
        return parse_entry(document.get("models", {}).get(name, {}))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as exc:
        raise _damaged(root / STATE_FILENAME, f"the entry of {name!r} is broken: {exc!r}") from exc


def _damaged(path: Path, what: str) -> RepositoryError:
    return RepositoryError(
        f"{path} is damaged: {what}",
        hint="Restore it from a copy, or delete it: versions then go on from the highest on disk, "
        "and only the roll-back target and the tags are lost.",
    )
