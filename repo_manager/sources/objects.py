"""A file or a folder of a model in object storage, with the clients and the credentials of repositories there."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from pathlib import Path

from repo_manager.errors import InputError
from repo_manager.repository.location import ObjectRepository, parse_object_url
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.facts import ObjectFact
from repo_manager.repository.stores.objects.transport import save_object
from repo_manager.sources.beside import files_beside
from repo_manager.sources.fetching import MOST_FILES, Fetched, Receiver, check_name

__all__ = ["fetch_objects"]


def fetch_objects(url: str, receiver: Receiver) -> Fetched:
    """Fetch an object, with the files it names beside it, or everything below a prefix.

    Raises:
        InputError: there is nothing, or too much.
        RepositoryError: the store cannot be reached, refuses, or the content changes during the read.
    """
    place = parse_object_url(url)
    if not place.prefix:
        raise InputError(f"{url} is a whole {'container' if place.scheme == 'as' else 'bucket'}", hint="Name a model.")
    store = open_client(place.parent)
    fact = store.head(place.name)
    if fact is not None:
        return _fetch_file(store, place, fact, receiver)
    facts = _walk(store, place.name, place)
    if not facts:
        raise InputError(f"{place}: there is no object and no folder of that name", hint="Is its name spelled so?")
    for name in facts:
        check_name(name, str(place))
    told = receiver.expects(str(place), sum(each.size_bytes for each in facts.values()), len(facts))
    revision = "\n".join(f"{name} {each.size_bytes} {each.mark.e_tag}" for name, each in sorted(facts.items()))
    folder = receiver.folder(revision) / place.name
    _save(store, {f"{place.name}/{name}": (each, folder / name) for name, each in facts.items()}, told)
    return Fetched(folder, {"last_modified": max(each.modified for each in facts.values()).isoformat()})


def _walk(store: ObjectClient, folder: str, place: ObjectRepository) -> dict[str, ObjectFact]:
    """Return everything below a prefix, level by level, as far as a model can go.

    Raises:
        InputError: it has more files.
    """
    found: dict[str, ObjectFact] = {}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        level = store.list(f"{folder}/{below}".rstrip("/"))
        found |= {below + each.key: each for each in level.files}
        waiting += [f"{below}{name}/" for name in level.folders]
        if len(found) + len(waiting) > MOST_FILES:
            raise InputError(f"{place} has more than {MOST_FILES:,} files", hint="Name the folder of one model.")
    return found


def _fetch_file(store: ObjectClient, place: ObjectRepository, fact: ObjectFact, receiver: Receiver) -> Fetched:
    told = receiver.expects(str(place), fact.size_bytes)
    folder = receiver.folder(f"{fact.mark.e_tag} {fact.size_bytes} {fact.modified.isoformat()}")
    path = folder / place.name
    _save(store, {place.name: (fact, path)}, told)
    others: dict[str, tuple[ObjectFact, Path]] = {}
    for name in files_beside(path):
        check_name(name, str(place))
        beside = store.head(name)
        if beside is not None:  # the model check reports missing files
            others[name] = (beside, folder / _revised(name, beside))
    if others:
        size = sum(each.size_bytes for each, _ in others.values())
        _save(store, others, receiver.expects(f"{len(others)} file(s) beside {place.name}", size, len(others)))
        for name, (_, kept) in others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            kept.replace(folder / name)
    return Fetched(path, {"e_tag": fact.mark.e_tag, "last_modified": fact.modified.isoformat()})


def _revised(name: str, fact: ObjectFact) -> str:
    """Return the name of a file's partial copy, of one content only."""
    mark = "".join(each for each in fact.mark.e_tag if each.isalnum())
    return f"{name}.{mark[:64]}.part"


def _save(store: ObjectClient, files: Mapping[str, tuple[ObjectFact, Path]], told: Callable[[int], None]) -> None:
    """Fetch files, small ones several at a time. Each goes on with its partial copy."""

    def one(key: str) -> None:
        fact, path = files[key]
        save_object(store, key, fact, path, None, resume=True)
        told(fact.size_bytes)

    small = [key for key, (fact, _) in files.items() if fact.size_bytes <= store.options.part_bytes]
    with concurrent.futures.ThreadPoolExecutor(store.options.workers) as pool:
        futures = [pool.submit(one, key) for key in small]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for key in files.keys() - set(small):  # one at a time: each downloads its parts in parallel
        one(key)
