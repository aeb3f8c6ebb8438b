"""The file a repository keeps its state in: read, changed atomically, and refused when it is damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.files import file_lock, read_regular, write_atomic
from repo_manager.repository.layout import LOCK_FILENAME, STATE_FILENAME
from repo_manager.repository.state import Deployment, KeptLoadTest, ModelState, RolloutRecord, Unproven

__all__ = [
    "change_state",
    "format_entry",
    "parse_entry",
    "read_state",
    "read_states",
    "repository_lock",
]

_SCHEMA_VERSION = 1
_NOTHING = 0  # represents no version: older releases expect a number and then use the version before it
LOCK_TIMEOUT_S = 120.0


def read_state(root: Path, name: str) -> ModelState:
    """Read a model's record. An empty state when nothing is.

    Raises:
        RepositoryError: the file is damaged.
        OSError: it cannot be read.
    """
    return _model_of(_read(root), name, root)


def read_states(root: Path) -> dict[str, ModelState]:
    """Read every model's record, removed models included.

    Raises:
        RepositoryError: the file is damaged.
        OSError: it cannot be read.
    """
    document = _read(root)
    return {name: _model_of(document, name, root) for name in sorted(document.get("models", {}))}


@contextlib.contextmanager
def repository_lock(root: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the repository's one lock. It is held for renames and small files only, never while copying.

    Raises:
        RepositoryError: another process holds it for longer than `timeout_s`.
        OSError: the root cannot be written.
    """
    with file_lock(root / LOCK_FILENAME, timeout_s=timeout_s):
        yield


def change_state(root: Path, name: str, change: Callable[[ModelState], ModelState], *, staging: Path) -> ModelState:
    """Change a model's record, atomically. The caller holds the repository's lock.

    Args:
        root: the repository's real path. The state file is directly in it.
        name: model whose record changes. Without one it begins with an empty record.
        change: the old state to the new one. An equal one writes nothing.
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
    known = {"highest_version", "deployments", "tags", "on_trial", "history", "skipped", "load_tests"}
    trial = entry.get("on_trial")
    return ModelState(
        highest_version=int(entry.get("highest_version", 0)),
        skipped=tuple(int(each) for each in entry.get("skipped", ())),
        deployments=tuple(
            Deployment(int(each["version"]) or None, str(each["at"])) for each in entry.get("deployments", ())
        ),
        tags={str(tag): int(version) for tag, version in entry.get("tags", {}).items()},
        unproven=None
        if trial is None
        else Unproven(int(trial["version"]), tuple(int(each) for each in trial["before"]), str(trial["at"])),
        history=tuple(RolloutRecord.parse(each) for each in entry.get("history", ())),
        load_tests=tuple(
            KeptLoadTest(int(each["version"]), dict(each["report"])) for each in entry.get("load_tests", ())
        ),
        extra={key: value for key, value in entry.items() if key not in known},
    )


def format_entry(state: ModelState) -> dict[str, Any]:
    """Return one model's part of a state file."""
    trial = {} if state.unproven is None else {"on_trial": dataclasses.asdict(state.unproven)}
    history = {"history": [record.format() for record in state.history]} if state.history else {}
    tests = [{"version": each.version, "report": each.report} for each in state.load_tests]
    return {
        **state.extra,
        **trial,
        **history,
        **({"skipped": list(state.skipped)} if state.skipped else {}),
        **({"load_tests": tests} if tests else {}),
        "highest_version": state.highest_version,
        "deployments": [{"version": each.version or _NOTHING, "at": each.at} for each in state.deployments],
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
        "and only the roll-back version and the tags are lost.",
    )
