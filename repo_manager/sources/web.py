"""A model's file by https://, gone on with after a stop, with the standard library."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import http.client
import netrc
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit, urlunsplit

from repo_manager.errors import InputError, UsageError, keep_secret
from repo_manager.files import sha256_file
from repo_manager.repository.stores.objects.retry import RetryOptions, TransientError, readable, retried
from repo_manager.sources.beside import files_beside
from repo_manager.sources.fetching import Fetched, Receiver, check_name

__all__ = ["fetch_web", "without_query"]

_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_SLOWEST_BYTES = 64 << 10
"""Bytes to arrive within each `_TIMEOUT_S`: a server with a byte a second is not waited for."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_DIGEST = re.compile(r"sha256=([0-9a-fA-F]{64})")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z")
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FIRST = RetryOptions(deadline_s=15.0)
"""Of the first answer: the address may be wrong."""
_RETRY = RetryOptions()


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to an unprotected connection."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """As the library's."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise InputError(f"{without_query(req.full_url)} redirects to {without_query(newurl)}, without encryption")
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            made.headers.pop("Authorization", None)
        return made


def without_query(url: str) -> str:
    """Return a URL without the part behind the path: a signed one has its signature there."""
    if not url.startswith(("http://", "https://")):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch_web(url: str, receiver: Receiver) -> Fetched:
    """Fetch a file, and the files it names beside it.

    Args:
        url: https://, or http:// of this machine or with the digest. `#sha256=HEX` behind it is compared.
        receiver: folder and progress of the download.

    Raises:
        UsageError: it holds credentials, or is no encrypted address.
        InputError: the server refuses it, or its digest is a wrong one.
        RepositoryError: it does not answer, again and again.
    """
    expected = _check_url(url)
    request, _ = urldefrag(url)
    remote = _Remote(request, without_query(url))
    if remote.name.lower().endswith(_ARCHIVES):
        raise InputError(
            f"{remote.shown} is an archive", hint="Unpack it, and give the folder or the file of the model."
        )
    try:
        path, facts = remote.fetch(receiver, lambda seen: receiver.folder(seen.revision))
    except FileNotFoundError as exc:
        raise InputError(f"{remote.shown} is not there: {exc}") from exc
    if expected and str(found := sha256_file(path)) != f"sha256:{expected}":
        path.unlink()
        raise InputError(f"{remote.shown} is not what its digest says: {found} instead of sha256:{expected}")
    for name in files_beside(path):
        check_name(name, remote.shown)
        beside = urljoin(request, quote(name))
        folder = (path.parent / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the model check reports missing files
            _Remote(beside, without_query(beside)).fetch(receiver, functools.partial(_same, folder))
    return Fetched(path, facts)


def _same(folder: Path, _seen: _Seen) -> Path:
    return folder


def _check_url(url: str) -> str:
    """Return the digest the URL ends with. Empty without.

    Raises:
        UsageError: see `fetch_web`.
        InputError: it names no file.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise UsageError("the URL holds a user or a password", hint="Credentials belong in ~/.netrc, never in a URL.")
    keep_secret(parts.query)
    digest = _DIGEST.fullmatch(parts.fragment)
    if parts.scheme != "https" and parts.hostname not in _LOCAL and digest is None:
        raise UsageError(
            f"{without_query(url)} is not encrypted: anybody on the way could change the model",
            hint="Use https://, or add what it has to be: #sha256=HEX",
        )
    check_name(unquote(parts.path).rpartition("/")[2], without_query(url))
    return "" if digest is None else digest[1].lower()


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A server's facts of a file.

    Attributes:
        size_bytes: `None` when it does not say.
        validator: value for `If-Range`: a strong ETag, else the time of the last change. Empty without both.
        facts: `e_tag` and `last_modified` for the manifest, as far as the server sends them.
    """

    size_bytes: int | None
    validator: str
    facts: Mapping[str, str]

    @classmethod
    def of(cls, headers: http.client.HTTPMessage) -> _Seen:
        e_tag, changed = headers.get("ETag", ""), headers.get("Last-Modified", "")
        length = headers.get("Content-Length", "")
        facts = {key: value for key, value in (("e_tag", e_tag), ("last_modified", changed)) if value}
        validator = e_tag if e_tag and not e_tag.startswith("W/") else changed
        return cls(int(length) if length.isdecimal() else None, validator, facts)

    @property
    def revision(self) -> str:
        return f"{self.validator} {self.size_bytes}" if self.validator else ""


@dataclasses.dataclass(frozen=True)
class _Remote:
    """One file on a web server.

    Attributes:
        url: URL to request, with its query and without a fragment.
        shown: the URL for messages, without query and credentials.
    """

    url: str
    shown: str

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def fetch(self, receiver: Receiver, folder_for: Callable[[_Seen], Path]) -> tuple[Path, Mapping[str, str]]:
        """Fetch it. Return its place and the server's facts of it.

        Raises:
            FileNotFoundError: there is nothing.
            InputError: it is refused, or changes during the read.
            RepositoryError: as `retried`.
        """
        response = retried(f"fetch {self.shown}", self._opened, _FIRST)
        seen = _Seen.of(response.headers)
        path = folder_for(seen) / self.name
        told = receiver.expects(self.shown, seen.size_bytes or 0)
        part = path.with_name(f"{path.name}.part")
        if not seen.validator:
            part.unlink(missing_ok=True)
        first = [response]
        if part.exists():
            first.pop().close()  # requested again from the end of the part

        def once() -> None:
            there = part.stat().st_size if part.exists() else 0
            if there and there == seen.size_bytes:
                return
            answer = first.pop() if first else self._opened(there, seen)
            with answer, part.open("r+b" if there else "wb") as file:
                file.truncate(_start_of(answer, there))
                file.seek(0, 2)
                for piece in _pieces(answer):
                    file.write(piece)
                    told(len(piece))
            if seen.size_bytes is not None and part.stat().st_size != seen.size_bytes:
                raise TransientError(f"{part.stat().st_size} bytes came of {seen.size_bytes}")

        retried(f"fetch {self.shown}", once, _RETRY)
        part.replace(path)
        return path, seen.facts

    def _opened(self, start: int = 0, seen: _Seen | None = None) -> Any:
        """Send a request. Return the response.

        Raises:
            FileNotFoundError: there is nothing.
            TransientError: it may succeed later.
            InputError: it is refused, or there is another content now.
        """
        headers = {"Accept-Encoding": "identity", **_authorization(self.url)}
        if seen is not None and seen.validator:
            headers |= {"Range": f"bytes={start}-", "If-Range": seen.validator} if start else {}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            answer = urllib.request.build_opener(_NoDowngrade).open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as exc:
            exc.close()
            raise self._refusal(exc.code, exc.reason) from exc
        except urllib.error.URLError as exc:
            if isinstance(exc.reason, ssl.SSLCertVerificationError):
                why = exc.reason.verify_message
                raise InputError(f"{self.shown}: the server's certificate is refused: {why}") from exc
            raise TransientError(readable(str(exc.reason))) from exc
        except (OSError, http.client.HTTPException) as exc:
            raise TransientError(readable(str(exc)) or type(exc).__name__) from exc
        if seen is not None and answer.status == 200 and _Seen.of(answer.headers).revision != seen.revision:
            answer.close()
            raise InputError(f"{self.shown} was changed during the download", hint="Run the command again.")
        return answer

    def _refusal(self, code: int, reason: str) -> Exception:
        if code in _PASSING:
            return TransientError(f"HTTP {code}", slow_down=code in (429, 503))
        if code in (404, 410):
            return FileNotFoundError(f"HTTP {code}")
        hint = "Credentials are read from ~/.netrc, or the file named by NETRC." if code in (401, 403) else None
        return InputError(f"{self.shown} is refused: HTTP {code} {reason}", hint=hint)


def _start_of(answer: Any, there: int) -> int:
    """Return the place in the file where the body of a response begins.

    Raises:
        TransientError: elsewhere than was asked for.
    """
    if answer.status != 206:
        return 0
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != there:
        raise TransientError(f"the server sends another part: {answer.headers.get('Content-Range')!r}")
    return there


def _pieces(answer: Any) -> Iterator[bytes]:
    """Yield a body in pieces, each within a time limit.

    Raises:
        TransientError: the connection broke or is too slow.
    """
    came, since = 0, time.monotonic()
    try:
        while piece := answer.read1(_PIECE_BYTES):
            yield piece
            came += len(piece)
            if time.monotonic() - since > _TIMEOUT_S:
                if came < _SLOWEST_BYTES:
                    raise TransientError(f"only {came} bytes came in {_TIMEOUT_S:g} s")
                came, since = 0, time.monotonic()
    except (OSError, http.client.HTTPException) as exc:
        raise TransientError(readable(str(exc)) or type(exc).__name__) from exc


def _authorization(url: str) -> dict[str, str]:
    """Return the header for a host with credentials in ~/.netrc, over an encrypted connection only."""
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in _LOCAL:
        return {}
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    keep_secret(found[2] or "")
    return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()}
