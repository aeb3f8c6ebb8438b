"""Taking versions out of object storage, and sweeping unfinished work.

A removal marks the versions in the ledger first: from then on they are none for our commands, and their numbers are
never given out again. Then config.pbtxt is looked at once more, then the objects go, the manifest first. The remains
of a crash in between are known by their mark, and swept by `gc`.
"""

from __future__ import annotations

import contextlib
import dataclasses

from repo_manager.errors import ConcurrentChangeError, RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME, version_number
from repo_manager.repository.plan.removal import without_versions
from repo_manager.repository.signing_files import beside_signature_name, signature_name
from repo_manager.repository.state import ModelState
from repo_manager.repository.stores.base import ChangedMeanwhileError, Departure
from repo_manager.repository.stores.objects.claim import is_abandoned
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.current import put_config
from repo_manager.repository.stores.objects.fetch import read_manifest
from repo_manager.repository.stores.objects.holder import Holder
from repo_manager.repository.stores.objects.ledger import Ledger, Pending, change_ledger, read_ledger
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME, format_config, parse_config
from repo_manager.triton_config.version_policy import with_version_policy

__all__ = ["abandoned_work", "discard_versions", "end_work"]


def discard_versions(store: ObjectClient, departure: Departure) -> None:
    """As `Store.discard_versions`."""
    name, before = departure.view.name, departure.view.state
    files = {
        version: (*(entry.name for entry in departure.view.contents[version].files), MANIFEST_FILENAME)
        if version in departure.view.contents
        else ()
        for version in departure.versions
    }
    holder = Holder.me()

    def mark(ledger: Ledger) -> Ledger:
        if not departure.force and ledger.state.tags != before.tags:
            raise ConcurrentChangeError(f"{name} was tagged at the same time", hint="Run the command again.")
        marked = dataclasses.replace(ledger, state=departure.forget(ledger.state))
        for version in departure.versions:
            entry = Pending("remove", holder, files=files[version], whole=departure.whole)
            marked = marked.with_pending(version, entry)
        return marked

    change_ledger(store, name, mark)
    try:
        _take_out_of_policy(store, departure)
    except (RepositoryError, ChangedMeanwhileError) as exc:
        _unmark(store, name, departure.versions, before)
        if isinstance(exc, ChangedMeanwhileError):
            raise ConcurrentChangeError(f"{name} was changed at the same time", hint="Run the command again.") from exc
        raise
    for version in departure.versions:
        _delete_version(store, name, version, files[version])
    if departure.whole:
        _delete_rest(store, name)
    change_ledger(store, name, lambda ledger: _without(ledger, departure.versions))
    _require_no_markers(store, name, departure)


def _require_no_markers(store: ObjectClient, name: str, departure: Departure) -> None:
    """Check for empty objects of a removed folder: Triton takes it for a model or a version.

    obstore has no way to name such an object, so nothing here can delete it.

    Raises:
        RepositoryError: one exists.
    """
    folders = [f"{name}/{version}" for version in departure.versions]
    folders += [name] if departure.whole else []
    left = [folder for folder in folders if store.list(folder).marked]
    if left:
        named = ", ".join(str(store.location / key) + "/" for key in left)
        raise RepositoryError(
            f"{name}: the files are removed, but Triton still sees a folder: an empty object marks it: {named}",
            hint="Delete the object with the store's own tool, for example `aws s3api delete-object`.",
        )


def _take_out_of_policy(store: ObjectClient, departure: Departure) -> None:
    """Check that config.pbtxt, as it is after the mark, does not serve the leaving versions. Take it out if the caller
    asked for it.
    """
    view = departure.view
    found = store.get(f"{view.name}/{CONFIG_FILENAME}")
    if found is None:
        return
    now = dataclasses.replace(view, config=found[0])
    policy = now.policy()
    if not isinstance(policy, tuple) or not set(policy) & set(departure.versions):
        return
    if not departure.force:
        raise ConcurrentChangeError(
            f"{view.name}: a version was deployed at the same time and stays", hint="Run the command again."
        )
    text = None if departure.whole else without_versions(now, departure.versions)
    if text is not None:
        put_config(store, view.name, text.encode(), found[1])


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
    """Delete a version's objects, the manifest first: the rest is then plainly no version."""
    folder = f"{name}/{version}"
    order = sorted(set(files) | {MANIFEST_FILENAME}, key=lambda file: (file != MANIFEST_FILENAME, file))
    store.delete([f"{folder}/{file}" for file in order])
    store.delete([signature_name(name, version), beside_signature_name(name, version)])


def _delete_rest(store: ObjectClient, name: str) -> None:
    """Delete the files beside the versions of a leaving model. The last is config.pbtxt, the mark of the model.

    Never if another version was published at the same time.
    """
    level = store.list(name)
    if any(folder.isdecimal() for folder in level.folders):
        return
    rest = [fact.key for fact in store.walk(name)]
    store.delete([f"{name}/{key}" for key in sorted(rest, key=lambda key: (key == CONFIG_FILENAME, key))])


def abandoned_work(ledger: Ledger) -> dict[int, Pending]:
    """Return the work begun on a model's versions and abandoned."""
    return {version: entry for version, entry in ledger.pending.items() if is_abandoned(entry)}


def end_work(store: ObjectClient, name: str, version: int, seen: Pending) -> bool:
    """End an interrupted command's work: a removal is ended, a whole publication settled, another one deleted.

    Only the ledger's entries are touched, and only where its holder is dead or has not been heard of for long.

    Args:
        store: the open store with the model's ledger and objects.
        name: model of the interrupted work.
        version: number of the version half published or half removed.
        seen: its entry from `abandoned_work`. With another holder by now, nothing is done.

    Returns:
        False where another process goes on with it.
    """
    holder = Holder.me()

    def take(ledger: Ledger) -> Ledger:
        entry = ledger.pending.get(version)
        if entry is None or entry.holder.token not in (seen.holder.token, holder.token):
            return ledger  # another process continues it
        return ledger.with_pending(version, dataclasses.replace(entry, holder=holder))

    taken = change_ledger(store, name, take).pending.get(version)
    if taken is None or taken.holder.token != holder.token:
        return False
    if taken.action == "publish":
        ended = _settle(store, name, version)
    else:
        ended = not taken.whole and _still_served(store, name, version)
    if not ended:
        _delete_version(store, name, version, taken.files)
        if taken.beside and store.head(f"{name}/{CONFIG_FILENAME}") is None:
            store.delete([f"{name}/{file}" for file in taken.beside])
        if taken.action == "remove" and not _has_versions(store, name):
            _delete_rest(store, name)  # the last version is gone: remove the model too
    change_ledger(store, name, lambda ledger: ledger.with_pending(version, None))
    return True


def _has_versions(store: ObjectClient, name: str) -> bool:
    pending = read_ledger(store, name).pending
    numbers = {version_number(folder) for folder in store.list(name).folders}
    return bool(numbers - {None} - pending.keys())


def _still_served(store: ObjectClient, name: str, version: int) -> bool:
    """Take a version under removal out of the policy. Return whether it must stay, as nothing else is served.

    Its manifest is the first deleted: while it is there, the version is whole.
    """
    found = store.get(f"{name}/{CONFIG_FILENAME}")
    if found is None:
        return False
    view = ModelView(store.location / name, exists=True, config=found[0])
    policy = view.policy()
    if policy == (version,):
        return store.head(f"{name}/{version}/{MANIFEST_FILENAME}") is not None
    text = without_versions(view, (version,))
    if text is not None:
        put_config(store, name, text.encode(), found[1])
    return False


def _settle(store: ObjectClient, name: str, version: int) -> bool:
    """End a publication without its last steps. Return whether it was one."""
    try:
        manifest = read_manifest(store, name, version)
    except RepositoryError:
        return False
    if manifest is None:
        return False
    if store.head(f"{name}/{CONFIG_FILENAME}") is None:
        text = format_config(with_version_policy(parse_config(manifest.config), (version,)))
        with contextlib.suppress(ChangedMeanwhileError):  # another writer created one at the same time: keep it
            store.create(f"{name}/{CONFIG_FILENAME}", text.encode())
    return True
