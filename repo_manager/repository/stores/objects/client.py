"""Requests to one place in object storage: each retried, each with a certain answer.

A thin layer over obstore. Keys are relative to the place. Everything is listed by delimiter, one level at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from repo_manager.errors import ConcurrentChangeError, RepoManagerError, RepositoryError
from repo_manager.files import document
from repo_manager.optional import require
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.stores.base import ChangedMeanwhileError
from repo_manager.repository.stores.objects.bounded import outlive_aborts, run_within
from repo_manager.repository.stores.objects.credentials import NOWHERE, own_endpoint, store_config, without_redirects
from repo_manager.repository.stores.objects.facts import Listing, Mark, ObjectFact
from repo_manager.repository.stores.objects.retry import RetryOptions, TransientError, readable, retried, tls_refusal
from repo_manager.tls import speaks_tls

__all__ = ["ObjectClient", "StoreOptions", "open_client"]

A = TypeVar("A")
R = TypeVar("R")

_INSTANCE_METADATA = "169.254.169.254"
_STATUS = re.compile(r"status code: (\d{3})")
_SLOW = ("503", "429")
_MOST_BYTES = 64 << 20
"""The largest object read at once: a record of ours, never a model's file."""


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How to talk to a store.

    Attributes:
        retry: waits and deadline of each request, over all its attempts.
        first_contact_s: deadline of a request, all its attempts together, while the store has not answered once: the
            address may be wrong.
        request_timeout_s: deadline of one attempt, its body included.
        part_bytes: size of a part, for uploads and downloads. S3 wants 5 MiB or more.
        workers: parts or files on their way at a time. `workers * part_bytes` bounds the memory.
        lookups: small requests on their way at a time.
    """

    retry: RetryOptions = dataclasses.field(default_factory=RetryOptions)
    first_contact_s: float = 15.0
    request_timeout_s: float = 60.0
    part_bytes: int = 8 << 20
    workers: int = 4
    lookups: int = 16


DEFAULT_OPTIONS = StoreOptions()
"""The parts every operation uses. Tests set shorter ones."""


def _as_it_is(answer: Any) -> Any:
    return answer


@functools.lru_cache(maxsize=64)
def _opened(place: ObjectRepository, options: StoreOptions, environment: tuple[tuple[str, str], ...]) -> ObjectClient:
    return ObjectClient(place, options, dict(environment))


def open_client(location: ObjectRepository, options: StoreOptions | None = None) -> ObjectClient:
    """Return the store of a place. The same one while the environment stays the same.

    Args:
        location: bucket and prefix of the repository. All keys are relative to it.
        options: deadlines and retries of requests. `None`: the defaults.

    Raises:
        MissingDependencyError: the `[cloud]` extra is not installed.
        RepositoryError: the environment's credentials cannot be read.
    """
    prefixes = ("AWS_", "AZURE_", "GOOGLE_", "TRITON_CLOUD_", "HOME")
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(prefixes)))
    return _opened(location, options or DEFAULT_OPTIONS, environment)


class _NoConditionsError(RepositoryError):
    """The store does not heed the conditions of a write."""


class ObjectClient:
    """Requests to one place.

    Args:
        location: bucket and prefix of the repository. All keys are relative to it.
        options: deadlines and retries of requests.
        environment: environment variables of the process.
    """

    def __init__(self, location: ObjectRepository, options: StoreOptions, environment: Mapping[str, str]) -> None:
        self.location, self.options, self.environment = location, options, environment
        self._api = require("obstore")
        self._errors = require("obstore.exceptions")
        # The exception type depends on obstore's version.
        self._missing = (FileNotFoundError, self._errors.NotFoundError)
        self._endpoint = own_endpoint(location, environment)
        self._store = self._connect(options)
        self._answered = self._asked_for_tls = False
        if self._endpoint:  # not the vendor's own endpoint
            outlive_aborts()
        self._conditional_writes = False

    def _connect(self, options: StoreOptions) -> Any:
        stores = require("obstore.store")
        made = {"s3": stores.S3Store, "gs": stores.GCSStore, "as": stores.AzureStore}[self.location.scheme]
        config: dict[str, Any] = store_config(self.location, self.environment)
        client = {
            "allow_http": True,
            "timeout": datetime.timedelta(seconds=options.request_timeout_s),
            "connect_timeout": datetime.timedelta(seconds=min(10.0, options.request_timeout_s)),
            **without_redirects(self._endpoint, config, self.environment),
        }
        # Retries happen in this class. Only this way can a lost answer to a create-only write be told from an object of
        # another process.
        retry = {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=options.request_timeout_s)}
        try:
            return made(
                self.location.bucket,
                prefix=self.location.prefix or None,
                config=config,
                client_options=client,
                retry_config=retry,
            )
        except self._errors.BaseError as exc:
            raise RepositoryError(
                f"{self.location}: the store cannot be used: {readable(str(exc))}",
                hint=f"{document('object-storage.md')} lists the variables of the environment it reads.",
            ) from exc

    def get(self, key: str) -> tuple[bytes, ObjectFact] | None:
        """Return an object's content and facts, or `None` when there is none."""

        async def read() -> tuple[bytes, ObjectFact] | None:
            try:
                found = await self._api.get_async(self._store, key)
                fact = self._fact(found.meta, key)
                if fact.size_bytes > _MOST_BYTES:
                    raise RepositoryError(
                        f"{self.location / key} has {fact.size_bytes} bytes; at most {_MOST_BYTES} are read at once",
                        hint="It is none of repo-manager's records.",
                    )
                return bytes(await found.bytes_async()), fact
            except self._missing:
                return None

        return self._request(f"read {key}", read)

    def head(self, key: str) -> ObjectFact | None:
        """Return the store's facts of an object, or `None` when there is none."""

        async def ask() -> ObjectFact | None:
            try:
                return self._fact(await self._api.head_async(self._store, key), key)
            except self._missing:
                return None

        return self._request(f"look at {key}", ask)

    def read_range(self, key: str, start: int, end: int, mark: Mark) -> bytes:
        """Return the bytes from `start` to before `end` of the content seen before.

        Args:
            key: path below the repository's root.
            start: first byte of the range.
            end: byte after the last one.
            mark: version of the content read before.

        Raises:
            RepositoryError: it is gone, or another content is there now.
        """

        async def read() -> bytes:
            try:
                options = {"range": (start, end), "if_match": mark.e_tag}
                found = await self._api.get_async(self._store, key, options=options)
                data = bytes(await found.bytes_async())
            except (*self._missing, self._errors.PreconditionError) as exc:
                raise ConcurrentChangeError(
                    f"{self.location / key} was changed at the same time", hint="Run it again."
                ) from exc
            if len(data) != end - start:
                raise TransientError(f"{len(data)} bytes came of {end - start}")
            return data

        return self._request(f"read {key}", read)

    def create(self, key: str, data: bytes) -> Mark:
        """Write a new object. Where an answer was lost it is found out whose object is there.

        Raises:
            ChangedMeanwhileError: there is one with another content.
            RepositoryError: the store has no conditional writes. Then the object is removed again.
        """
        mark = self._conditional(key, data, "create", None)
        try:
            self._require_conditional_writes(key)
        except _NoConditionsError:
            self.delete([key])
            raise
        return mark

    def replace(self, key: str, data: bytes, mark: Mark) -> Mark:
        """Write an object if it still has the content seen before (compare-and-swap).

        Args:
            key: path below the repository's root.
            data: new content of the object.
            mark: version of the content read before.

        Raises:
            ChangedMeanwhileError: the content has changed.
            RepositoryError: the store has no conditional writes, and nothing was written.
        """
        self._require_conditional_writes(key)
        return self._conditional(key, data, mark.mode(), mark)

    def _require_conditional_writes(self, key: str) -> None:
        """Check whether the store heeds the conditions of a write. Asked once, of an existing object.

        The check sends writes of the object's own content whose conditions must fail, so nothing changes in either
        case.

        Raises:
            RepositoryError: the store writes whatever the condition says, or does not know conditions.
        """
        found = None if self._conditional_writes else self.get(key)
        if found is None:
            return
        data, mark = found[0], found[1].mark
        other = dataclasses.replace(mark, e_tag='"0"', version=None if mark.version is None else "1")
        for header, mode in (("If-None-Match", "create"), ("If-Match", other.mode())):

            async def written(mode: Any = mode) -> bool:
                try:
                    await self._api.put_async(self._store, key, data, mode=mode, use_multipart=False)
                    return True
                except (self._errors.AlreadyExistsError, self._errors.PreconditionError, *self._missing):
                    return False

            if self._request(f"write {key}", written):
                raise self._no_conditions(f"it ignores {header}")
        self._conditional_writes = True

    def put(self, key: str, data: bytes) -> Mark:
        """Write an object, unconditionally."""

        async def write() -> Mark:
            return self._mark(await self._api.put_async(self._store, key, data))

        return self._request(f"write {key}", write)

    def put_streamed(self, key: str, chunks: Iterator[bytes], chunk_bytes: int, workers: int) -> None:
        """Write a large object in parts, once. The store shows nothing of it until all are there.

        Args:
            key: path below the repository's root.
            chunks: content in pieces of `chunk_bytes`, the last one shorter.
            chunk_bytes: size of a part in bytes.
            workers: parts sent at a time.

        Raises:
            TransientError: it did not work, and nothing of it is visible.
        """

        async def write() -> None:
            await self._api.put_async(
                self._store, key, chunks, use_multipart=True, chunk_size=chunk_bytes, max_concurrency=workers
            )

        with self._translated(f"write {key}"):
            run_within(write(), None)  # each part has its own deadline, and memory is limited to `workers` parts

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Objects gone already do not matter."""
        for key in keys:

            async def once(key: str = key) -> None:
                with contextlib.suppress(*self._missing):
                    await self._api.delete_async(self._store, key)

            self._request(f"delete {key}", once)

    def list(self, folder: str = "") -> Listing:
        """Return one level: by delimiter, never recursively.

        Args:
            folder: relative to the place. Empty for the place itself.
        """

        async def ask() -> Listing:
            answer = await self._api.list_with_delimiter_async(self._store, folder or None)
            start = len(folder) + 1 if folder else 0
            folders = tuple(sorted(str(each)[start:].strip("/") for each in answer["common_prefixes"]))
            facts = [self._fact(meta, str(meta["path"])[start:]) for meta in answer["objects"]]
            files = tuple(sorted((fact for fact in facts if fact.key), key=lambda fact: fact.key))
            return Listing(tuple(name for name in folders if name), files, marked=len(files) < len(facts))

        return self._request(f"list {folder or 'it'}", ask)

    def walk(self, folder: str) -> tuple[ObjectFact, ...]:
        """Return every object below a folder, keys relative to it. Level by level."""
        level = self.list(folder)
        found = list(level.files)
        for name in level.folders:
            found += [dataclasses.replace(f, key=f"{name}/{f.key}") for f in self.walk(f"{folder}/{name}")]
        return tuple(found)

    def _conditional(self, key: str, data: bytes, mode: Any, before: Mark | None) -> Mark:
        async def once() -> Mark | Exception:
            try:
                return self._mark(await self._api.put_async(self._store, key, data, mode=mode, use_multipart=False))
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError, *self._missing) as exc:
                refused: Exception = exc
                return refused

        def judged(answer: Mark | Exception) -> Mark:
            if isinstance(answer, Mark):
                return answer
            # Either refused, or written and refused on a resend because the first answer was lost.
            found = self.get(key)
            if found is not None and found[0] == data:
                return found[1].mark
            if found is not None and before is not None and found[1].mark.e_tag == before.e_tag:
                raise TransientError("the store reports a conflict, and nothing has changed") from answer
            raise ChangedMeanwhileError(key) from answer

        return self._request(f"write {key}", once, judged)

    def _request(
        self,
        what: str,
        attempt: Callable[[], Coroutine[Any, Any, A]],
        judged: Callable[[A], R] = _as_it_is,
    ) -> R:
        """Make a request, again and again until it has an answer or the deadline over all attempts has passed.

        Args:
            what: subject of the error's message.
            attempt: sends the request once: a new coroutine for each attempt.
            judged: makes the result of an answer. May raise TransientError.
        """
        retry = self.options.retry
        if not self._answered:
            retry = dataclasses.replace(retry, deadline_s=min(retry.deadline_s, self.options.first_contact_s))
        end = time.monotonic() + retry.deadline_s

        def once() -> R:
            with self._translated(what):
                attempt_end = min(end, time.monotonic() + self.options.request_timeout_s)
                answer = judged(run_within(attempt(), max(0.01, attempt_end - time.monotonic())))
            self._answered = True
            return answer

        return retried(f"{what} in {self.location}", once, retry)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn the library's errors into ours: worth another attempt, or not."""
        try:
            yield
        except (RepoManagerError, TransientError, ChangedMeanwhileError):
            raise
        except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError) as exc:
            self._require_credentials(str(exc))
            raise RepositoryError(
                f"{self.location}: the store refuses to {what}: {readable(str(exc))}",
                hint=f"Check the credentials in the environment ({document('object-storage.md')}) and what they allow.",
            ) from exc
        except self._missing as exc:
            raise self._no_bucket(what, str(exc)) from exc
        except self._errors.BaseError as exc:
            text = str(exc)
            if "invalid path" in text:
                raise RepositoryError(
                    f"{self.location}: cannot {what}: a key there is no path of a file: {readable(text)}",
                    hint="Rename or delete the object with the store's own tool, and run the command again.",
                ) from exc
            self._require_credentials(text)
            if f"{NOWHERE}," in text:
                raise RepositoryError(
                    f"{self.location}: cannot {what}: the store redirects to another host, which is not followed",
                    hint="The other host would get what the request shows. Name the store's own address.",
                ) from exc
            refused = tls_refusal(text)
            if refused is not None:
                raise RepositoryError(f"{self.location}: cannot {what}: {refused[0]}", hint=refused[1]) from exc
            status = _STATUS.search(text)
            code = "" if status is None else status[1]
            if code == "404":
                raise self._no_bucket(what, text) from exc
            if code == "501":
                raise self._no_conditions(f"it cannot {what}: {readable(text)}") from exc
            if code.startswith("4") and code not in ("408", "409", "429"):
                raise RepositoryError(f"{self.location}: the store refuses to {what}: {readable(text)}") from exc
            self._require_plain_endpoint(what)
            raise TransientError(readable(text), slow_down=code in _SLOW) from exc
        except OSError as exc:
            raise TransientError(readable(str(exc))) from exc
        except Exception as exc:  # an unknown server's answer can fail in any way
            raise RepositoryError(
                f"{self.location}: the answer to {what} is not what a store's is: {type(exc).__name__}: "
                f"{readable(str(exc))}",
                hint="Check the endpoint and its port.",
            ) from exc

    def _require_credentials(self, text: str) -> None:
        """Refuse an error from the address where cloud machines ask for their role: the last place to look.

        Raises:
            RepositoryError: it is, so there are no credentials.
        """
        if _INSTANCE_METADATA in text:
            raise RepositoryError(
                f"{self.location}: no credentials were found: the environment has none, and this machine has no role",
                hint=f"Its variables: {document('object-storage.md')}",
            )

    def _require_plain_endpoint(self, what: str) -> None:
        """Check, once and before anything has answered, whether an `http://` endpoint speaks TLS.

        Raises:
            RepositoryError: it speaks TLS.
        """
        asked, self._asked_for_tls = self._asked_for_tls, True
        parts = urlsplit(self._endpoint)
        if asked or self._answered or parts.scheme != "http" or not parts.hostname:
            return
        if speaks_tls(parts.hostname, parts.port or 80):
            raise RepositoryError(
                f"{self.location}: cannot {what}: the endpoint speaks TLS, and its address says http",
                hint="Write https:// in the repository's URL, or name the port without TLS.",
            )

    def _no_conditions(self, why: str) -> RepositoryError:
        return _NoConditionsError(
            f"{self.location}: the store has no conditional writes: {why}. Two publications could take one version",
            hint=f"Use a store with If-None-Match and If-Match ({document('object-storage.md')}), or a folder.",
        )

    def _no_bucket(self, what: str, text: str) -> RepositoryError:
        return RepositoryError(
            f"{self.location}: cannot {what}: the store says 404, not found ({readable(text)})",
            hint=f"Does the bucket {self.location.bucket!r} exist? repo-manager does not make it.",
        )

    def _fact(self, meta: Any, key: str) -> ObjectFact:
        return ObjectFact(key, int(meta["size"]), meta["last_modified"], self._mark(meta))

    @staticmethod
    def _mark(answer: Any) -> Mark:
        return Mark(str(answer["e_tag"] or ""), answer.get("version"))
