"""Multipart uploads to S3 that outlive the process: parts that are there already are found and not sent again.

obstore's own multipart uploads end with the process. These are a handful of plain S3 requests, signed here (Signature
Version 4), and used where static keys are known. Elsewhere a killed upload begins its current file anew.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import hashlib
import hmac
import http.client
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

from repo_manager.errors import RepositoryError
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.content import Measured, read_part
from repo_manager.repository.stores.objects.credentials import S3Keys, s3_keys
from repo_manager.repository.stores.objects.retry import TransientError, readable, retried

__all__ = ["S3Multipart", "s3_multipart"]

_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_EMPTY = hashlib.sha256(b"").hexdigest()


def s3_multipart(store: ObjectClient) -> S3Multipart | None:
    """Return the way to resumable uploads; `None` where the store is no S3, or there are no static keys."""
    if store.location.scheme != "s3":
        return None
    keys = s3_keys(store.location, store.environment)
    return None if keys is None else S3Multipart(store, keys)


class S3Multipart:
    """Multipart uploads of one repository's objects."""

    def __init__(self, store: ObjectClient, keys: S3Keys) -> None:
        self._store, self._keys = store, keys
        location = store.location
        self._base = location.endpoint or f"https://s3.{keys.region}.amazonaws.com"
        self._prefix = f"{location.prefix}/" if location.prefix else ""

    def upload(self, key: str, path: Path, measured: Measured, progress: Callable[[int], None]) -> None:
        """Send a file; parts that an earlier, interrupted upload of this key has brought are kept.

        Args:
            key: the object's.
            path: the file.
            measured: what it held when it was measured.
            progress: told the bytes that are there, part by part.

        Raises:
            RepositoryError: the store refuses, the deadline is over, or the file was changed meanwhile.
        """
        upload = self._find(key)
        there = {} if upload is None else self._parts(key, upload)
        if upload is None:
            upload = self._begin(key)
        parts = range(1, len(measured.part_md5s) + 1)
        tags = {number: f'"{measured.part_md5s[number - 1]}"' for number in parts}
        missing = [number for number in parts if there.get(number) != tags[number]]
        for number in set(parts) - set(missing):
            progress(measured.part_size(number))

        def send(number: int) -> None:
            data = read_part(path, measured, number)
            self._call("PUT", key, {"partNumber": str(number), "uploadId": upload}, data)
            progress(len(data))

        with concurrent.futures.ThreadPoolExecutor(self._store.options.workers) as pool:
            futures = [pool.submit(send, number) for number in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._complete(key, upload, tags)

    def abort_below(self, folder: str) -> int:
        """Give up every unfinished upload below a folder; return how many there were."""
        found = self._uploads(f"{folder}/")
        for key, upload in found:
            self._call("DELETE", key, {"uploadId": upload}, b"", absent_is_fine=True)
        return len(found)

    def unfinished_below(self, folder: str) -> int:
        """Return how many unfinished uploads there are below a folder."""
        return len(self._uploads(f"{folder}/"))

    def _find(self, key: str) -> str | None:
        uploads = [upload for found, upload in self._uploads(key) if found == key]
        return uploads[-1] if uploads else None

    def _uploads(self, prefix: str) -> list[tuple[str, str]]:
        answer = self._call("GET", None, {"uploads": "", "prefix": self._prefix + prefix}, b"")
        found = []
        for node in _nodes(answer, "Upload"):
            key = _text(node, "Key")
            if key.startswith(self._prefix):
                found.append((key[len(self._prefix) :], _text(node, "UploadId")))
        return found

    def _parts(self, key: str, upload: str) -> dict[int, str]:
        found: dict[int, str] = {}
        marker = "0"
        while True:
            query = {"uploadId": upload, "part-number-marker": marker}
            answer = self._call("GET", key, query, b"", absent_is_fine=True)
            if not answer:
                return {}
            page = {
                int(_text(n, "PartNumber")): '"' + _text(n, "ETag").strip('"') + '"' for n in _nodes(answer, "Part")
            }
            found.update(page)
            root = _parsed(answer)
            marker = _text(root, "NextPartNumberMarker")
            if _text(root, "IsTruncated") != "true" or not page:
                return found

    def _begin(self, key: str) -> str:
        return _text(_parsed(self._call("POST", key, {"uploads": ""}, b"")), "UploadId")

    def _complete(self, key: str, upload: str, tags: Mapping[int, str]) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>" for number, tag in sorted(tags.items())
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        # 404: it was completed, and the answer was lost. What lies there is compared afterwards in any case.
        answer = self._call("POST", key, {"uploadId": upload}, body, absent_is_fine=True)
        if b"<Error>" in answer:  # S3 may say 200 first and then fail.
            raise TransientError(readable(answer.decode(errors="replace")))

    def _call(
        self, method: str, key: str | None, query: Mapping[str, str], body: bytes, *, absent_is_fine: bool = False
    ) -> bytes:
        place = self._store.location

        def once() -> bytes:
            request = self._signed(method, key, query, body)
            try:
                with urllib.request.urlopen(request, timeout=self._store.options.request_timeout_s) as answer:
                    data: bytes = answer.read()
                    return data
            except urllib.error.HTTPError as exc:
                said = readable(exc.read().decode(errors="replace"))
                if exc.code == 404 and absent_is_fine:
                    return b""
                if exc.code in _RETRIED:
                    raise TransientError(f"{exc.code}: {said}", slow_down=exc.code in (429, 503)) from exc
                raise RepositoryError(f"{place}: the store refuses a part of {key}: {exc.code}: {said}") from exc
            except (OSError, http.client.HTTPException) as exc:  # timeouts, resets, answers cut short
                raise TransientError(readable(str(exc))) from exc

        return retried(f"upload {key or 'parts'} to {place}", once, self._store.options.retry)

    def _signed(self, method: str, key: str | None, query: Mapping[str, str], body: bytes) -> urllib.request.Request:
        path = f"/{self._store.location.bucket}" + ("" if key is None else f"/{self._prefix}{key}")
        path = quote(path, safe="/-_.~")
        text = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        digest = hashlib.sha256(body).hexdigest() if body else _EMPTY
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        headers = {"host": urlsplit(self._base).netloc, "x-amz-content-sha256": digest, "x-amz-date": now}
        if self._keys.token:
            headers["x-amz-security-token"] = self._keys.token
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join([method, path, text, lines, names, digest])
        scope = f"{now[:8]}/{self._keys.region}/s3/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        secret = f"AWS4{self._keys.secret}".encode()
        for part in (now[:8], self._keys.region, "s3", "aws4_request"):
            secret = hmac.new(secret, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(secret, to_sign.encode(), hashlib.sha256).hexdigest()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self._keys.access}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        headers["content-type"] = "application/octet-stream"  # Else urllib claims a form.
        url = f"{self._base}{path}?{text}"
        return urllib.request.Request(url, data=body or None, headers=headers, method=method)


def _parsed(answer: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(answer)
    except ElementTree.ParseError as exc:
        said = readable(answer.decode(errors="replace"))
        raise RepositoryError(f"the store gave an answer that is no XML: {said}") from exc


def _nodes(answer: bytes, tag: str) -> list[ElementTree.Element]:
    return [node for node in _parsed(answer) if node.tag.rpartition("}")[2] == tag]


def _text(node: ElementTree.Element, tag: str) -> str:
    return next((child.text or "" for child in node if child.tag.rpartition("}")[2] == tag), "")
