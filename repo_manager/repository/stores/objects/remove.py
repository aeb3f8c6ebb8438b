"""Taking versions out of object storage, and sweeping what broke off.

A removal marks the versions in the ledger first: from then on they are none for our commands, and their numbers are
never given out again. Then config.pbtxt is looked at once more, then the objects go, the manifest first. What a crash
leaves in between is known by its mark, and swept by `gc`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.gc import GcResult, check_keep, old_versions
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.remove import Removal, forget, plan_removal, select_version
from repo_manager.repository.state import ModelState
from repo_manager.repository.stores.objects.change import put_config
from repo_manager.repository.stores.objects.claim import is_abandoned
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.facts import ChangedMeanwhileError
from repo_manager.repository.stores.objects.holder import Holder
from repo_manager.repository.stores.objects.ledger import Ledger, Pending, change_ledger, read_ledger
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored, take_snapshot
from repo_manager.repository.stores.objects.s3_multipart import s3_multipart
from repo_manager.repository.stores.objects.scan import model_names, read_version_manifest
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    format_config,
    parse_config,
    replace_version_policy,
    version_policy,
    with_version_policy,
)

__all__ = ["abandoned_work", "gc", "remove", "sweep"]

Select = Callable[[Mirror], tuple[int, ...]]
_SIGNATURE = ".repo-manager.{name}.{version}.sig.json"


def remove(
    repository: ObjectRepository, name: str, version: int | None = None, *, force: bool = False, dry_run: bool = False
) -> Removal:
    """As `repository.remove.remove`."""

    def select(mirror: Mirror) -> tuple[int, ...]:
        return select_version(name, version, mirror.snapshot.versions)

    return _remove(open_client(repository), name, select, whole=version is None, force=force, dry_run=dry_run)


def gc(
    repository: ObjectRepository,
    name: str | None = None,
    *,
    keep: int = 3,
    older_than_s: float | None = None,
    dry_run: bool = False,
) -> GcResult:
    """As `repository.gc.gc`; what interrupted commands left is swept first."""
    check_keep(keep)
    cutoff = None if older_than_s is None else datetime.datetime.now(datetime.timezone.utc).timestamp() - older_than_s
    store = open_client(repository)
    names = model_names(store) if name is None else (name,)
    swept: list[str] = []
    found: list[Removal] = []
    failed: list[str] = []

    def select(mirror: Mirror) -> tuple[int, ...]:
        return old_versions(mirror.folder, mirror.snapshot.ledger.state, keep, cutoff)

    for model in names:
        if not dry_run:
            swept += sweep(store, model)
        if not take_snapshot(store, model).versions:
            continue
        try:
            found.append(_remove(store, model, select, whole=False, force=False, dry_run=dry_run))
        except ConfigError as exc:
            if name is not None:
                raise
            failed.append(f"{model}: {exc.message}")
    removals = tuple(removal for removal in found if removal.versions)
    return GcResult(removals, tuple(swept), not dry_run, tuple(failed))


def _remove(store: ObjectClient, name: str, select: Select, *, whole: bool, force: bool, dry_run: bool) -> Removal:
    if not dry_run:
        sweep(store, name, action="remove")  # What an earlier removal has left is ended first.
    with mirrored(store, name) as mirror:
        plan = plan_removal(mirror.root, mirror.folder, select(mirror), whole, force)
        if dry_run:
            return plan
        if not plan.versions and not plan.whole_model:
            return dataclasses.replace(plan, applied=True)
        files = {version: tuple(fact.key for fact in mirror.files.get(str(version), ())) for version in plan.versions}
        snapshot = mirror.snapshot
    holder = Holder.me()
    before = snapshot.ledger.state

    def mark(ledger: Ledger) -> Ledger:
        if ledger.state != before and not force and ledger.state.tags != before.tags:
            raise RepositoryError(f"{name} was tagged meanwhile", hint="Run the command again.")
        state = forget(
            ledger.state, plan.versions, max((0, *plan.versions, *snapshot.versions)), whole=plan.whole_model
        )
        marked = dataclasses.replace(ledger, state=state)
        for version in plan.versions:
            marked = marked.with_pending(
                version, Pending("remove", holder, files=files[version], whole=plan.whole_model)
            )
        return marked

    change_ledger(store, name, mark)
    try:
        _take_out_of_policy(store, name, plan, force)
    except (RepositoryError, ChangedMeanwhileError) as exc:
        _unmark(store, name, plan.versions, before)
        if isinstance(exc, ChangedMeanwhileError):
            raise RepositoryError(f"{name} was changed meanwhile", hint="Run the command again.") from exc
        raise
    for version in plan.versions:
        _delete_version(store, name, version, files[version])
    if plan.whole_model:
        _delete_rest(store, name)
    change_ledger(store, name, lambda ledger: _without(ledger, plan.versions))
    return dataclasses.replace(plan, applied=True)


def _take_out_of_policy(store: ObjectClient, name: str, plan: Removal, force: bool) -> None:
    """See that config.pbtxt, as it is after the mark, does not serve what goes; take it out where that was told."""
    found = store.get(f"{name}/{CONFIG_FILENAME}")
    if found is None:
        return
    where = str(store.location / name / CONFIG_FILENAME)
    text = found[0].decode(errors="replace")
    policy = version_policy(parse_config(text, where=where))
    if not isinstance(policy, tuple) or not set(policy) & set(plan.versions):
        return
    if not force:
        raise RepositoryError(f"{name}: a version was deployed meanwhile and stays", hint="Run the command again.")
    if plan.whole_model:
        return
    left = [version for version in policy if version not in plan.versions]
    put_config(store, name, replace_version_policy(text, left, where=where).encode(), found[1])


def _unmark(store: ObjectClient, name: str, versions: tuple[int, ...], before: ModelState) -> None:
    def change(ledger: Ledger) -> Ledger:
        state = dataclasses.replace(ledger.state, tags={**before.tags, **ledger.state.tags})
        if not ledger.state.deployments:
            state = dataclasses.replace(state, deployments=before.deployments)
        return _without(dataclasses.replace(ledger, state=state), versions)

    change_ledger(store, name, change)


def _without(ledger: Ledger, versions: tuple[int, ...]) -> Ledger:
    for version in versions:
        ledger = ledger.with_pending(version, None)
    return ledger


def _delete_version(store: ObjectClient, name: str, version: int, files: tuple[str, ...]) -> None:
    """Delete a version's objects, the manifest first: what is left of it is then plainly no version."""
    folder = f"{name}/{version}"
    order = sorted(set(files) | {MANIFEST_FILENAME}, key=lambda file: (file != MANIFEST_FILENAME, file))
    store.delete([f"{folder}/{file}" for file in order])
    store.delete([_SIGNATURE.format(name=name, version=version)])
    if (multipart := s3_multipart(store)) is not None:
        multipart.abort_below(folder)


def _delete_rest(store: ObjectClient, name: str) -> None:
    """Delete what lies beside the versions of a model that goes; config.pbtxt last, by it a model is known.

    Never where another version has come meanwhile.
    """
    level = store.list(name)
    if any(folder.isdecimal() for folder in level.folders):
        return
    rest = [fact.key for fact in store.walk(name)]
    store.delete([f"{name}/{key}" for key in sorted(rest, key=lambda key: (key == CONFIG_FILENAME, key))])


def abandoned_work(ledger: Ledger) -> dict[int, Pending]:
    """Return what was begun with a model's versions and has no one any more who would end it."""
    return {version: entry for version, entry in ledger.pending.items() if is_abandoned(entry)}


def sweep(store: ObjectClient, name: str, *, action: str | None = None) -> tuple[str, ...]:
    """End what interrupted commands have begun: removals are ended, whole publications settled, others deleted.

    Only what the ledger names is touched, and only where its holder is dead or has not been heard of for long.

    Args:
        store: the repository's.
        name: the model.
        action: `publish` or `remove`: only these; `None`: both.

    Returns:
        What was done: `MODEL/VERSION` each.
    """
    done = []
    for version, seen in sorted(abandoned_work(read_ledger(store, name)).items()):
        if action not in (None, seen.action):
            continue
        holder = Holder.me()

        def take(ledger: Ledger, version: int = version, seen: Pending = seen, holder: Holder = holder) -> Ledger:
            entry = ledger.pending.get(version)
            if entry is None or entry.holder.token not in (seen.holder.token, holder.token):
                return ledger  # Somebody else goes on with it.
            return ledger.with_pending(version, dataclasses.replace(entry, holder=holder))

        taken = change_ledger(store, name, take).pending.get(version)
        if taken is None or taken.holder.token != holder.token:
            continue
        if taken.action == "publish":
            ended = _settle(store, name, version)
        else:
            ended = not taken.whole and _still_served(store, name, version)
        if not ended:
            _delete_version(store, name, version, taken.files)
            if taken.beside and store.head(f"{name}/{CONFIG_FILENAME}") is None:
                store.delete([f"{name}/{file}" for file in taken.beside])
            if taken.action == "remove" and not take_snapshot(store, name).versions:
                _delete_rest(store, name)  # The model's last version goes, and the model with it.
        change_ledger(store, name, lambda ledger, number=version: ledger.with_pending(number, None))  # type: ignore[misc]
        done.append(f"{name}/{version}")
    return tuple(done)


def _still_served(store: ObjectClient, name: str, version: int) -> bool:
    """Take a version that is being removed out of the policy; say whether it has to stay, as nothing else is served.

    Its manifest is the first that is deleted: while it is there, the version is whole.
    """
    found = store.get(f"{name}/{CONFIG_FILENAME}")
    if found is None:
        return False
    where = str(store.location / name / CONFIG_FILENAME)
    text = found[0].decode(errors="replace")
    policy = version_policy(parse_config(text, where=where))
    if not isinstance(policy, tuple) or version not in policy:
        return False
    left = [number for number in policy if number != version]
    if not left:
        return store.head(f"{name}/{version}/{MANIFEST_FILENAME}") is not None
    put_config(store, name, replace_version_policy(text, left, where=where).encode(), found[1])
    return False


def _settle(store: ObjectClient, name: str, version: int) -> bool:
    """End a publication of which only the last steps are missing; say whether it was one."""
    try:
        manifest = read_version_manifest(store, name, version)
    except RepositoryError:
        return False
    if manifest is None:
        return False
    if store.head(f"{name}/{CONFIG_FILENAME}") is None:
        text = format_config(with_version_policy(parse_config(manifest.config), (version,)))
        with contextlib.suppress(ChangedMeanwhileError):  # Somebody wrote one at this moment: that one counts.
            store.create(f"{name}/{CONFIG_FILENAME}", text.encode())
    return True
