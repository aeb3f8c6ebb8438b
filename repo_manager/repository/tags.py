"""Names for versions, past deployments, and the way from a typed text to a version."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from repo_manager.errors import RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import version_number
from repo_manager.repository.location import Location, LocationLike
from repo_manager.repository.look import changeable_model
from repo_manager.repository.state import (
    KeptLoadTest,
    ModelState,
    RolloutRecord,
    Unproven,
    current_version,
    now_text,
    previous_version,
)
from repo_manager.repository.stores import open_store

__all__ = [
    "begin_trial",
    "end_trial",
    "model_state",
    "model_states",
    "previous_deployment",
    "record_deployment",
    "record_load_test",
    "record_rollout",
    "remove_tag",
    "resolve_version",
    "set_tag",
    "validate_tag",
]

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_RESERVED = ("latest", "all", "newest")  # `serve: newest` in repository.yaml is no tag


def validate_tag(tag: str) -> str:
    """Return `tag` when it cannot be mistaken for a number or a version policy.

    Raises:
        RepositoryError: it is not valid.
    """
    if not _TAG.fullmatch(tag) or tag in _RESERVED:
        raise RepositoryError(
            f"{tag[:100]!r} cannot be a tag: expected up to 64 letters, digits, '_', '-' and '.', starting with a "
            f"letter or '_', and none of {', '.join(_RESERVED)}"
        )
    return tag


def set_tag(repository: LocationLike, name: str, tag: str, version: int, *, dry_run: bool = False) -> int | None:
    """Give a version a name. A tag is at one version of a model at a time.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model of the version. Another model may have the same tag.
        tag: up to 64 letters, digits, `_`, `-` and `.`, not `latest`, `all` or `newest`.
        version: number of an existing version. The tag leaves its earlier version.
        dry_run: check only, and change nothing.

    Returns:
        The tag's version before. `None` when none had.

    Raises:
        RepositoryError: the tag is not valid, or there is no such model or version.
    """
    validate_tag(tag)
    with disk_errors(f"tag {name}"):
        store = open_store(repository)
        view = changeable_model(store, name, record=True)
        if version not in view.versions:
            raise RepositoryError(f"model {name!r} has no version {version} to tag")

        def change(state: ModelState) -> ModelState:
            return dataclasses.replace(state, tags={**state.tags, tag: version})

        if not dry_run:
            store.change_state(name, change, needs=version)
        return view.state.tags.get(tag)


def remove_tag(repository: LocationLike, name: str, tag: str, *, dry_run: bool = False) -> int:
    """Take a tag away.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model with the tag. Its versions stay.
        tag: the tag alone, without the model's name. It must exist.
        dry_run: check only, and change nothing.

    Returns:
        The tag's version before.

    Raises:
        RepositoryError: there is no such model or tag.
    """
    with disk_errors(f"untag {name}"):
        store = open_store(repository)
        tags = changeable_model(store, name, record=True).state.tags
        if tag not in tags:
            raise RepositoryError(f"model {name!r} has no tag {tag!r}; it has {', '.join(tags) or 'none'}")

        def change(state: ModelState) -> ModelState:
            return dataclasses.replace(state, tags={t: v for t, v in state.tags.items() if t != tag})

        if not dry_run:
            store.change_state(name, change)
        return tags[tag]


def resolve_version(repository: LocationLike, target: str) -> tuple[str, int]:
    """Turn `NAME`, `NAME:VERSION`, `NAME:TAG` or `NAME:latest` into a model and an existing version.

    `NAME` alone is the newest version.

    Raises:
        RepositoryError: there is no such model, version or tag.
    """
    name, _, wanted = target.partition(":")
    with disk_errors(f"look up {target}"):
        view = changeable_model(open_store(repository), name, record=True)
        if not view.versions:
            raise RepositoryError(f"model {name!r} has no version")
        if wanted in ("", "latest"):
            return name, view.versions[-1]
        number = view.state.tags.get(wanted, version_number(wanted))
        if number is None or number not in view.versions:
            known = [*map(str, view.versions), *view.state.tags]
            raise RepositoryError(
                f"model {name!r} has no version {wanted!r}; it has {', '.join(known)}",
                hint=f"`repo-manager show {name}` lists them.",
            )
        return name, number


def record_deployment(
    repository: Location,
    name: str,
    version: int | None,
    record: RolloutRecord | None = None,
    *,
    before: Collection[int] = (),
) -> None:
    """Record a version as the served one, for `previous_deployment`. Write nothing if this is recorded already.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model whose roll-out has ended. It must exist.
        version: the version. `None`: nothing of the model is served any more.
        record: of the roll-out, for the history. `None` when nothing had to be done.
        before: versions served until now. Where the record does not know them, the newest becomes the deployment
            before this one: versions put into service by another process can be gone back to as well.

    Raises:
        RepositoryError: no such model, or the store refuses.
    """

    def change(state: ModelState) -> ModelState:
        now = (state if version is None or version == current_version(state) else state.found(before)).deployed(version)
        return now if record is None else now.recorded(record)

    with disk_errors(f"record a deployment of {name}"):
        store = open_store(repository)
        state = changeable_model(store, name, record=True).state
        if change(state) != state:
            store.change_state(name, change)


def record_rollout(repository: Location, name: str, record: RolloutRecord) -> None:
    """Keep a failed roll-out in the history. The served versions do not change.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model of the failed roll-out.
        record: the failed roll-out, from `record_of`. The latest 100 of a model stay.

    Raises:
        RepositoryError: the store refuses.
    """
    with disk_errors(f"record a roll-out of {name}"):
        open_store(repository).change_state(name, lambda state: state.recorded(record))


def record_load_test(repository: LocationLike, name: str, test: KeptLoadTest) -> None:
    """Keep a load test with its version. Of a version the latest five stay.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model under load. It must have the version of `test`.
        test: result of the load test.

    Raises:
        RepositoryError: there is no such model or version, or the store refuses.
    """
    with disk_errors(f"keep a load test of {name}"):
        store = open_store(repository)
        if test.version not in changeable_model(store, name).versions:
            raise RepositoryError(f"model {name!r} has no version {test.version} in {store.location}")
        store.change_state(name, lambda state: state.measured(test), needs=test.version)


def begin_trial(repository: Location, name: str, version: int, before: tuple[int, ...]) -> None:
    """Record a version as unproven, before a server is asked to load it.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: model a server is about to load.
        version: the version to prove. An earlier trial's record is replaced.
        before: the versions served until it is proven.

    Raises:
        RepositoryError: no such model, or the store refuses.
    """
    unproven = Unproven(version, before, now_text())
    with disk_errors(f"record the trial of {name}:{version}"):
        open_store(repository).change_state(name, lambda state: dataclasses.replace(state, unproven=unproven))


def end_trial(repository: Location, name: str) -> None:
    """Drop the record of a version on trial: it was taken out of service again.

    Raises:
        RepositoryError: no such model, or the store refuses.
    """
    with disk_errors(f"record the end of a trial of {name}"):
        open_store(repository).change_state(name, lambda state: dataclasses.replace(state, unproven=None))


def previous_deployment(repository: LocationLike, name: str) -> int | None:
    """Return the version to go back to: deployed before the current one, and still there. `None` when none is.

    Raises:
        RepositoryError: no such model, or the record is damaged.
    """
    with disk_errors(f"read the deployments of {name}"):
        view = changeable_model(open_store(repository), name, record=True)
        return previous_version(view.state, view.versions)


def model_state(repository: LocationLike, name: str) -> ModelState:
    """Return everything remembered of a model: deployments, tags, the highest number given out.

    Raises:
        RepositoryError: no such repository, or the record is damaged.
    """
    with disk_errors(f"read the state of {name}"):
        return open_store(repository).states((name,))[name]


def model_states(repository: LocationLike) -> dict[str, ModelState]:
    """Return the records of all models, removed ones included.

    Raises:
        RepositoryError: no such repository, or the record is damaged.
    """
    with disk_errors(f"read the state of {repository}"):
        return dict(open_store(repository).states())
