"""Removing snapshots without a reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence

from repo_manager.errors import UsageError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.look import walk
from repo_manager.repository.scan import scan
from repo_manager.repository.stores import open_store
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.clusters import api_of, cluster_kind_of, parse_cluster, pointers
from repo_manager.rollout.targets.snapshot_files import SNAPSHOT_FILENAME, snapshots_of, sweep_snapshots

__all__ = ["SnapshotRemovals", "gc_snapshots"]

_ID = re.compile(r"[0-9a-f]{16}")
_DAY_S = 86400.0


@dataclasses.dataclass(frozen=True)
class SnapshotRemovals:
    """The snapshots removed, and those kept.

    Attributes:
        removed: ids of the snapshots removed, or would be.
        kept: id of each other one -> why it stays.
        dry_run: true when the snapshots were only listed.
    """

    removed: tuple[str, ...]
    kept: Mapping[str, str]
    dry_run: bool


def gc_snapshots(
    repository: Location,
    targets: Sequence[str],
    *,
    pinned: Mapping[str, str] | None = None,
    older_than_s: float = _DAY_S,
    dry_run: bool = False,
) -> SnapshotRemovals:
    """Remove a repository's snapshots without a reference.

    A snapshot is named by a Deployment (its template and its history of roll-outs), a ReplicaSet (`kubectl rollout
    undo` goes back to it) or a pod in the namespaces of the targets. With KServe also by an InferenceService or a
    Knative revision. A pin names its snapshot, too. Clusters outside the targets are not asked, so name every one with
    snapshots of the repository. No roll-out of the repository runs at the same time: all its models are held.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        targets: objects to ask for references, `k8s://namespace/release` or `kserve://namespace/name`.
        pinned: values file -> URL of its snapshot. `None`: no file pins one.
        older_than_s: younger snapshots stay: anyone who wrote one may be about to name it.
        dry_run: only list the snapshots. Roll-outs may run at the same time.

    Raises:
        UsageError: neither a target nor a pin is named, or a target cannot be read.
        RepositoryError: a roll-out of a model is under way, or snapshots cannot be read or removed.
        ServerError: an API server refused or did not answer. Nothing was removed.
    """
    pinned = {} if pinned is None else pinned
    if not targets and not pinned:
        raise UsageError(
            "No cluster and no values file was named, so nothing says which snapshots are in use",
            hint="Name every target with this repository: --to k8s://NAMESPACE/RELEASE, or --values FILE.",
        )
    root = snapshots_of(repository)
    folder, store = local_folder(root), open_store(root, may_be_new=True)
    with contextlib.ExitStack() as stack, disk_errors(f"remove snapshots of {repository}"):
        for entry in scan(repository, deep=False) if not dry_run else ():
            stack.enter_context(open_store(repository).lease(entry.name, timeout_s=0.0))
        there = (
            [name for name in store.list_level().folders if _ID.fullmatch(name)]
            if folder is None or folder.is_dir()
            else []
        )
        kept: dict[str, str] = {}
        for where, url in pinned.items():
            kept.setdefault(url.rstrip("/").rpartition("/")[2], f"{where} pins it")
        for name, why in _named(targets) if there else ():
            kept.setdefault(name, why)
        now = time.time()
        for name in there:
            if name not in kept and now - walk(store, name)[1] < older_than_s:
                kept[name] = "it is younger than --older-than"
        unused = tuple(name for name in there if name not in kept)
        for name in () if dry_run else unused:
            store.erase(name, SNAPSHOT_FILENAME)
        if not dry_run:
            sweep_snapshots(root)
    return SnapshotRemovals(unused, {name: kept[name] for name in there if name in kept}, dry_run)


def _named(targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the ids of snapshots named by objects in clusters, each with the object."""
    for text in targets:
        with contextlib.closing(api_of(text)) as api:
            pointers(text, api)  # a mistyped target must fail, or its snapshots would count as unused
            for item in _objects(text, api):
                what = f"{item.get('kind', 'pod')} {item['metadata'].get('namespace')}/{item['metadata']['name']}"
                for name in _ID.findall(json.dumps(item)):
                    yield name, f"{what} names it"


def _objects(text: str, api: Api) -> Iterator[Object]:
    """Yield every possible reference to a snapshot in a target's namespace."""
    target = parse_cluster(text)
    space = target.namespace
    yield from api.deployments(space, {})
    yield from api.replica_sets(space, {})
    yield from api.pods(space, {})
    for kind in cluster_kind_of(target).resources:
        yield from api.customs(kind, space, {})
