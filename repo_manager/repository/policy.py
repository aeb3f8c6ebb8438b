"""What is served: the version policy in config.pbtxt, and the record of deployments."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import write_atomic
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import check_no_link, find_folder, open_repository
from repo_manager.repository.scan import existing_versions
from repo_manager.repository.state import (
    ModelState,
    change_state,
    previous_version,
    read_state,
    read_states,
    repository_lock,
)
from repo_manager.repository.stores.staging import staged
from repo_manager.triton_config import CONFIG_FILENAME, parse_config, replace_version_policy, served_versions
from repo_manager.triton_config.config import read_config_text

__all__ = [
    "existing_model",
    "model_state",
    "model_states",
    "previous_deployment",
    "record_deployment",
    "set_served_versions",
]


def set_served_versions(repository: Path, name: str, versions: Iterable[int]) -> tuple[int, ...]:
    """Change which versions the next load serves: one atomic replacement of config.pbtxt.

    Only the `version_policy` field's text changes. Comments, layout and fields of a newer Triton stay. When the file
    already says so it is not touched.

    Args:
        repository: the root.
        name: the model.
        versions: the versions to serve; each must exist.

    Returns:
        The versions that were served before, ascending.

    Raises:
        RepositoryError: no such model or version, or the disk refuses; the file is then as it was.
        ConfigError: config.pbtxt is broken, or `versions` is empty.
    """
    wanted = tuple(sorted(set(versions)))
    with disk_errors(f"change the served versions of {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        with staged(root) as staging, repository_lock(root):
            existing = existing_versions(folder)
            missing = [version for version in wanted if version not in existing]
            if missing:
                raise RepositoryError(
                    f"model {name!r} has no version {', '.join(map(str, missing))}; "
                    f"it has {', '.join(map(str, existing)) or 'none'}",
                    hint=f"`repo-manager show {name}` lists them.",
                )
            path = folder / CONFIG_FILENAME
            text = read_config_text(path)
            previous = served_versions(parse_config(text, where=str(path)), existing)
            changed = replace_version_policy(text, wanted, where=str(path))
            if changed != text:
                write_atomic(path, changed.encode(), staging=staging)
    return previous


def record_deployment(repository: Path, name: str, version: int) -> None:
    """Remember that a version is what is served now, for `previous_deployment`.

    Raises:
        RepositoryError: no such model, or the disk refuses.
    """
    with disk_errors(f"record the deployment of {name}"):
        root = open_repository(repository)
        existing_model(root, name)
        with staged(root) as staging, repository_lock(root):
            change_state(root, name, lambda state: state.deployed(version), staging=staging)


def previous_deployment(repository: Path, name: str) -> int | None:
    """Return the version to go back to: deployed before the current one, and still there; `None` when none is.

    Raises:
        RepositoryError: no such model, or the record is damaged.
    """
    with disk_errors(f"read the deployments of {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        return previous_version(read_state(root, name), existing_versions(folder))


def model_state(repository: Path, name: str) -> ModelState:
    """Return everything that is remembered of a model: deployments, tags, the highest number given out.

    Raises:
        RepositoryError: no such repository, or the record is damaged.
    """
    with disk_errors(f"read the state of {name}"):
        return read_state(open_repository(repository), name)


def model_states(repository: Path) -> dict[str, ModelState]:
    """Return what is remembered of every model, removed ones included, by one read.

    Raises:
        RepositoryError: no such repository, or the record is damaged.
    """
    with disk_errors(f"read the state of {repository}"):
        return read_states(open_repository(repository))


def existing_model(root: Path, name: str) -> Path:
    """Return the folder of a model that is going to be changed, or whose record is read.

    Raises:
        RepositoryError: there is none of that name, or it is a symbolic link.
    """
    folder = find_folder(root, name)
    if folder is None:
        raise RepositoryError(f"{root} has no model {name!r}", hint="`repo-manager list` shows the models.")
    check_no_link(folder)
    return folder
