"""Where a repository is: a folder, or a prefix in object storage, written as Triton's `--model-repository` takes it.

    models                                        a folder
    file:///srv/models                            a folder
    s3://bucket/path                              Amazon S3
    s3://http://127.0.0.1:9000/bucket/path        anything that speaks S3 (also https://, and s3://host:port/...)
    gs://bucket/path                              Google Cloud Storage
    as://account/container/path                   Azure Blob Storage

Credentials, region and profile come from the environment, as Triton takes them; a URL with any of them is refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from urllib.parse import unquote

from repo_manager.errors import RepositoryError
from repo_manager.files import document

__all__ = [
    "Location",
    "LocationLike",
    "ObjectRepository",
    "as_location",
    "local_folder",
    "parse_location",
    "parse_object_url",
]

_SCHEMES = ("s3", "gs", "as")
_AZURE_HOST = ".blob.core.windows.net"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"(?:s3|gs|as|file|https?):/(?!/)")
_BUCKETS = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
    "as": re.compile(r"(?:\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62})"),
}
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_ENDPOINT = re.compile(r"(https?)://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::([0-9]{1,5}))?")
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}")
_MAX_KEY_BYTES = 700  # every store allows 1,024: the rest is for model, version and file
# The characters of Triton's own pattern for s3://host:port/... (core, filesystem/implementations/s3.h), so one address
# works for both.
_SEGMENT = re.compile(r"[A-Za-z0-9_.-]+")
_FORMS = "s3://bucket/path, s3://http://host:port/bucket/path, gs://bucket/path, as://account/container/path"


@dataclasses.dataclass(frozen=True)
class ObjectRepository:
    """A place in object storage: a repository, or something below it. `/` goes deeper, as with a `Path`.

    Attributes:
        scheme: `s3` (S3 and compatible), `gs` (Google Cloud Storage) or `as` (Azure Storage).
        bucket: the bucket. For `as` the container.
        prefix: the path in the bucket, without a slash at its ends. Empty for the whole bucket.
        endpoint: `s3`: `http://host:port` of a store other than Amazon's. `as`: the account, else empty.
    """

    scheme: str
    bucket: str
    prefix: str = ""
    endpoint: str = ""

    def __str__(self) -> str:
        """Return it as Triton takes it. It never holds credentials."""
        parts = [part for part in (self.endpoint, self.bucket, self.prefix) if part]
        return f"{self.scheme}://" + "/".join(parts)

    def __truediv__(self, name: str) -> ObjectRepository:
        """Return the place below."""
        return dataclasses.replace(self, prefix=f"{self.prefix}/{name}" if self.prefix else name)

    @property
    def name(self) -> str:
        """The last part of the path. The bucket's name when there is no path."""
        return self.prefix.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> ObjectRepository:
        """The place above. The bucket itself is its own."""
        return dataclasses.replace(self, prefix=self.prefix.rpartition("/")[0])

    def resolve(self) -> ObjectRepository:
        """Return itself: an object's address has no links and no current folder."""
        return self

    def expanduser(self) -> ObjectRepository:
        """Return itself."""
        return self

    def location_text(self) -> str:
        """Return its form in JSON."""
        return str(self)


Location = Path | ObjectRepository
"""Where a repository, a model or a version is. `str()`, `/`, `.name`, `.parent` and `.resolve()` work on both."""

LocationLike = Location | str | os.PathLike[str]
"""A repository as the public functions take it: a place, or a text for `parse_location`."""


def as_location(place: LocationLike) -> Location:
    """Return the place of a repository.

    Raises:
        RepositoryError: the text names no repository, as for `parse_location`.
    """
    if isinstance(place, Path | ObjectRepository):
        return place
    return parse_location(os.fspath(place))


def local_folder(place: Location) -> Path | None:
    """Return a place on this machine as a path, or `None` for one in object storage."""
    return place.expanduser() if isinstance(place, Path) else None


def parse_location(text: str) -> Location:
    """Read a person's text for a repository.

    Args:
        text: a path, or a URL in one of the forms above.

    Raises:
        RepositoryError: an unknown form, a name a store or Triton would refuse, or credentials in it. The message
            never holds a possible credential.
    """
    match = _URL.fullmatch(text)
    if match is None:
        if _ONE_SLASH.match(text):
            raise RepositoryError(
                f"a repository's URL has two slashes behind {text.partition(':')[0]}:", hint=f"Expected {_FORMS}."
            )
        if not text or "\0" in text:
            raise RepositoryError("the repository is empty text, or holds a NUL", hint=f"Give a folder, or {_FORMS}.")
        return Path(text)
    scheme, rest = match[1], match[2]
    if scheme == "file":
        return _parse_file(rest)
    if scheme not in _SCHEMES:
        raise RepositoryError(f"{scheme}:// is no repository", hint=f"Expected a folder, or {_FORMS}.")
    place = _in_bucket(scheme, rest)
    bad = [part for part in place.prefix.split("/") if not _SEGMENT.fullmatch(part) or part in (".", "..")]
    if place.prefix and (bad or len(place.prefix) > _MAX_KEY_BYTES):
        raise RepositoryError(
            f"{bad[0][:80]!r} cannot stand in the path of a repository in object storage"
            if bad
            else f"the path of the repository has {len(place.prefix)} characters; expected up to {_MAX_KEY_BYTES}",
            hint="Expected letters, digits, '_', '-' and '.' between single slashes: as in Triton's own pattern.",
        )
    return place


def parse_object_url(text: str) -> ObjectRepository:
    """Read the URL of a file or a folder in object storage, whose path is less limited than a repository's.

    Raises:
        RepositoryError: as of `parse_location`, except for the path.
    """
    match = _URL.fullmatch(text)
    if match is None or match[1] not in _SCHEMES:
        raise RepositoryError(f"{text[:80]!r} is no URL of object storage", hint=f"Expected {_FORMS}.")
    return _in_bucket(match[1], match[2])


def _in_bucket(scheme: str, rest: str) -> ObjectRepository:
    """Read the part behind `scheme://`, with any path.

    Raises:
        RepositoryError: a name a store would refuse, or likely credentials.
    """
    if "@" in rest or "?" in rest or "#" in rest:
        raise RepositoryError(
            f"the repository's {scheme}:// URL holds an '@', '?' or '#', as if there were credentials in it",
            hint=f"Credentials belong in the environment ({document('object-storage.md')}), never in a URL.",
        )
    if scheme == "s3":
        return _parse_s3(rest)
    if scheme == "gs":
        bucket, _, path = rest.partition("/")
        return _object_repository("gs", bucket, path)
    account, _, path = rest.partition("/")
    account = account.removesuffix(_AZURE_HOST)
    if not _ACCOUNT.fullmatch(account):
        raise RepositoryError(
            f"{account[:60]!r} cannot be an Azure storage account: expected 3 to 24 lower-case letters and digits",
            hint="Expected as://account/container/path.",
        )
    container, _, path = path.partition("/")
    return _object_repository("as", container, path, account)


def _parse_file(rest: str) -> Path:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or "\0" in unquote(path):
        raise RepositoryError("a file:// URL names a folder on this machine: expected file:///path")
    return Path("/" + unquote(path))


def _parse_s3(rest: str) -> ObjectRepository:
    endpoint = ""
    if rest.startswith(("http://", "https://")):
        scheme, _, behind = rest.partition("://")
        host, _, rest = behind.partition("/")
        endpoint = f"{scheme}://{host}"
    elif _HOST_AND_PORT.fullmatch(rest.partition("/")[0]):
        # Triton's client keeps the AWS SDK's default, HTTPS, for a host without a scheme (core, s3.h).
        host, _, rest = rest.partition("/")
        endpoint = f"https://{host}"
    if endpoint:
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None or (match[3] is not None and not 0 < int(match[3]) < 65536):
            raise RepositoryError(
                "the address of the S3 store cannot be read", hint="Expected s3://http://host:port/bucket/path."
            )
    bucket, _, path = rest.partition("/")
    return _object_repository("s3", bucket, path, endpoint)


def _object_repository(scheme: str, bucket: str, path: str, endpoint: str = "") -> ObjectRepository:
    if not _BUCKETS[scheme].fullmatch(bucket) or ".." in bucket:
        what = "container" if scheme == "as" else "bucket"
        raise RepositoryError(f"{bucket[:80]!r} cannot be a {what}'s name in {scheme}://", hint=f"Expected {_FORMS}.")
    return ObjectRepository(scheme, bucket, path.strip("/"), endpoint)
