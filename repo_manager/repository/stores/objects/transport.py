"""Whole files to a store and from it: in parallel, in bounded memory, compared at the end."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.manifest import FileRecord
from repo_manager.repository.stores.base import Progress
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.content import MeasuredFile, read_part
from repo_manager.repository.stores.objects.facts import ObjectFact
from repo_manager.repository.stores.objects.retry import retried
from repo_manager.types import Digest

__all__ = ["object_record", "read_parts", "save_object", "upload_files"]

_CHUNK = 1 << 20


def upload_files(
    store: ObjectClient, folder: str, files: Mapping[str, tuple[Path, MeasuredFile]], progress: Progress
) -> tuple[str, ...]:
    """Send files. Complete and correct ones are not sent again.

    Args:
        store: the open store to send to. Its `workers` bounds uploads at a time.
        folder: where to, relative to the repository.
        files: name below the folder -> the file, with its size and digest.
        progress: called with the number of bytes arrived.

    Returns:
        The names present already.

    Raises:
        RepositoryError: the store refuses, a file changed at the same time, or the arrived bytes differ from the sent
            ones.
    """
    small = {name: each for name, each in files.items() if each[1].whole}
    large = {name: each for name, each in files.items() if not each[1].whole}

    def send(name: str, path: Path, measured: MeasuredFile) -> bool:
        return _upload(store, f"{folder}/{name}", path, measured, progress)

    there: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(store.options.workers) as pool:
        futures = {name: pool.submit(send, name, *each) for name, each in small.items()}
        try:
            there += [name for name, future in futures.items() if future.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # One at a time: each uploads its parts in parallel, and memory stays bounded.
    there += [name for name, each in sorted(large.items()) if send(name, *each)]
    return tuple(sorted(there))


def _upload(store: ObjectClient, key: str, path: Path, measured: MeasuredFile, progress: Progress) -> bool:
    """Send one file and compare it. Return whether it was there already."""
    fact = store.head(key)
    if fact is not None and _holds(store, fact, key, measured):
        progress(measured.record.size_bytes)
        return True
    if measured.whole:
        store.put(key, read_part(path, measured, 1))
        progress(measured.record.size_bytes)
    else:
        _upload_in_parts(store, key, path, measured, progress)
    fact = store.head(key)
    if fact is None or not _holds(store, fact, key, measured):
        raise RepositoryError(
            f"{store.location / key} differs from the bytes sent: {'missing' if fact is None else fact.size_bytes} of "
            f"{measured.record.size_bytes} bytes, or another content",
            hint="Run the command again; when it happens twice the store or the way to it is damaged.",
        )
    return False


def _upload_in_parts(store: ObjectClient, key: str, path: Path, measured: MeasuredFile, progress: Progress) -> None:
    """Send a large file by one multipart upload, restarted when it fails. Nothing of it is visible before its end."""
    told = 0

    def parts() -> Iterator[bytes]:
        nonlocal told
        for number in range(1, len(measured.part_md5s) + 1):
            yield read_part(path, measured, number)
            if number > told:  # otherwise an earlier attempt reported it
                told = number
                progress(measured.part_size(number))

    def once() -> None:
        store.put_streamed(key, parts(), measured.part_bytes, store.options.workers)

    retried(f"write {key} in {store.location}", once, store.options.retry)


def _holds(store: ObjectClient, fact: ObjectFact, key: str, measured: MeasuredFile) -> bool:
    """Return whether an object is these bytes: by the checksum the store made of it, else by reading it back."""
    if fact.size_bytes != measured.record.size_bytes:
        return False
    if fact.mark.e_tag == measured.e_tag:
        return True
    return object_record(store, key, fact) == measured.record


def object_record(store: ObjectClient, key: str, fact: ObjectFact) -> FileRecord:
    """Read an object to its end. Return its digest and size.

    Args:
        store: the open store to read from. The object is not kept on this machine.
        key: path below the repository's root.
        fact: size and mark of the object, from a listing.

    Raises:
        RepositoryError: it cannot be read, or changed during the read.
    """
    digest = hashlib.sha256()
    for part in read_parts(store, key, fact):
        digest.update(part)
    return FileRecord(Digest("sha256:" + digest.hexdigest()), fact.size_bytes)


def read_parts(store: ObjectClient, key: str, fact: ObjectFact, start: int = 0) -> Iterator[bytes]:
    """Yield an object's bytes in order. A few parts are fetched ahead, each request is retried on its own.

    Args:
        store: the open store to read from. `workers * part_bytes` bounds the memory.
        key: path below the repository's root.
        fact: its size and mark seen before. Another content in its place is an error.
        start: offset of the first byte wanted, from 0. At the end nothing comes.
    """
    size, step = fact.size_bytes, store.options.part_bytes
    spans = iter([(begin, min(begin + step, size)) for begin in range(start, size, step)])
    waiting: collections.deque[concurrent.futures.Future[bytes]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(store.options.workers) as pool:
        try:
            for span in spans:
                waiting.append(pool.submit(store.read_range, key, *span, fact.mark))
                if len(waiting) >= store.options.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def save_object(
    store: ObjectClient,
    key: str,
    fact: ObjectFact,
    target: Path,
    expected: FileRecord | None,
    *,
    resume: bool | None = None,
) -> None:
    """Write an object to a file. It continues with the rest of an interrupted attempt.

    Args:
        store: the open store to read from, in parts.
        key: path below the repository's root.
        fact: its size and mark seen before.
        target: the file. It may hold the beginning already.
        expected: size and digest it must have. `None` when unknown.
        resume: whether the bytes in `target` are of the same content. `None`: where `expected` can prove it.

    Raises:
        RepositoryError: its size or digest is another one. `target` is then removed.
        OSError: it cannot be written.
    """
    digest, found = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+b") as file:
        keeps = resume if resume is not None else expected is not None
        if not keeps or file.tell() > fact.size_bytes:
            file.truncate(0)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            found += len(chunk)
        for part in read_parts(store, key, fact, found):
            file.write(part)
            digest.update(part)
            found += len(part)
    record = FileRecord(Digest("sha256:" + digest.hexdigest()), found)
    if expected is not None and record != expected:
        target.unlink()
        raise RepositoryError(
            f"{store.location / key} differs from its manifest: {record} instead of {expected}",
            hint="`repo-manager verify` shows all of it; publish the version again.",
        )
