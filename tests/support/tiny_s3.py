"""As much of S3 as the repository uses, in memory, for tests that restore a state a thousand times.

moto is what the operations are tested against; this is for the crash tests alone, where it takes a tenth of the time.
`kill` ends a process with SIGKILL as its n-th request arrives, before anything is done: dying after request n is the
same for the store as dying before request n + 1.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

State = dict[str, tuple[bytes, float]]


class TinyS3:
    """One bucket; any bucket name leads to it."""

    def __init__(self) -> None:
        self.objects: State = {}
        self.clock = 1.7e9
        self.lock = threading.Lock()
        self._kill: tuple[int, int] | None = None
        self._requests = 0
        store = self

        class Handler(_Handler):
            owner = store

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port: int = self.server.server_address[1]

    def kill(self, pid: int, number: int) -> None:
        """Kill a process at its n-th request from now."""
        with self.lock:
            self._kill, self._requests = (pid, number), 0

    def spare(self) -> None:
        """Kill nobody any more: a process id may come back as another process."""
        with self.lock:
            self._kill = None

    def killed(self) -> bool:
        """Count a request; kill if it is the one."""
        with self.lock:
            self._requests += 1
            if self._kill is None or self._requests != self._kill[1]:
                return False
            os.kill(self._kill[0], signal.SIGKILL)
            self._kill = None
            return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner: TinyS3

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.owner.killed():
            self.close_connection = True
            return
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        query = parse_qs(url.query, keep_blank_values=True)
        with self.owner.lock:
            if "uploads" in query:
                self._answer(200, b"<ListMultipartUploadsResult/>")
            elif "delete" in query:
                keys = [unescape(each) for each in re.findall(r"<Key>(.*?)</Key>", body.decode())]
                for each in keys:
                    self.owner.objects.pop(each, None)
                gone = "".join(f"<Deleted><Key>{escape(each)}</Key></Deleted>" for each in keys)
                self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
            elif "list-type" in query:
                self._list(query.get("prefix", [""])[0])
            elif self.command == "PUT":
                self._put(key, body)
            elif self.command == "DELETE":
                self.owner.objects.pop(key, None)
                self._answer(204, b"")
            else:
                self._get(key)

    def _put(self, key: str, body: bytes) -> None:
        found = self.owner.objects.get(key)
        wanted = self.headers.get("if-match")
        if (self.headers.get("if-none-match") and found is not None) or (
            wanted is not None and (found is None or _tag(found[0]) != wanted)
        ):
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        self.owner.clock += 1  # every write is a second later: the tests need not wait for one
        self.owner.objects[key] = (body, self.owner.clock)
        self._answer(200, b"", {"ETag": _tag(body)})

    def _get(self, key: str) -> None:
        found = self.owner.objects.get(key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        data, headers = found[0], {"ETag": _tag(found[0]), "Last-Modified": formatdate(found[1], usegmt=True)}
        span = self.headers.get("range")
        if span is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self._answer(206, part, headers)
            return
        self._answer(200, data, headers)

    def _list(self, prefix: str) -> None:
        folders, files = set(), []
        for key, (data, at) in sorted(self.owner.objects.items()):
            if not key.startswith(prefix):
                continue
            head, slash, _ = key[len(prefix) :].partition("/")
            if slash:
                folders.add(prefix + head + "/")
            else:
                when = datetime.datetime.fromtimestamp(at, datetime.timezone.utc).isoformat(timespec="milliseconds")
                files.append((key, data, when.replace("+00:00", "Z")))
        text = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><LastModified>{when}"
            f"</LastModified><ETag>{escape(_tag(data))}</ETag></Contents>"
            for key, data, when in files
        )
        text += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{text}</ListBucketResult>".encode())

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@contextmanager
def tiny_s3() -> Iterator[TinyS3]:
    store = TinyS3()
    thread = threading.Thread(target=store.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.server.shutdown()
        store.server.server_close()
        thread.join()
