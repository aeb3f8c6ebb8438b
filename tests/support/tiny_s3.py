"""The part of S3 the repository uses, in memory, for tests with thousands of restored states.

The operations are tested against moto. This one is for the crash tests alone, and needs a tenth of the time there.
`kill` ends a process with SIGKILL as its n-th request arrives, before anything is done: to the store, dying after
request n equals dying before request n + 1.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

State = dict[str, tuple[bytes, float]]
Write = Callable[[State], int]
"""Changes a state and returns the status of the answer."""


class TinyS3:
    """One bucket; any bucket name leads to it."""

    def __init__(self) -> None:
        self.objects: State = {}
        self.clock = 1.7e9
        self.lock = threading.Lock()
        self._kill: tuple[int, int] | None = None
        self.requests = 0
        self.watch: Watch | None = None
        self.refuses: tuple[str, ...] = ()  # headers it answers with 501
        self.ignores: tuple[str, ...] = ()
        self.good_for: int | None = None  # requests; from then on each answer announces more bytes than there is memory
        self.bad_status = 200
        store = self

        class Handler(_Handler):
            owner = store

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port: int = self.server.server_address[1]

    def kill(self, pid: int, number: int) -> None:
        """Kill a process at its n-th request from now."""
        with self.lock:
            self._kill, self.requests = (pid, number), 0

    def write(self, change: Write) -> int:
        """Do a write; return the status of its answer. The caller holds no lock."""
        if self.watch is not None:
            return self.watch.write(change)
        with self.lock:
            return change(self.objects)

    def spare(self) -> None:
        """Kill nobody any more: a process id may come back as another process."""
        with self.lock:
            self._kill = None

    def killed(self) -> bool:
        """Count a request; kill if it is the one."""
        with self.lock:
            self.requests += 1
            if self._kill is None or self.requests != self._kill[1]:
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
        if self.owner.good_for is not None and self.owner.requests > self.owner.good_for:
            self._announce_too_much()
            return
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        query = parse_qs(url.query, keep_blank_values=True)
        if "uploads" in query:
            self._answer(200, b"<ListMultipartUploadsResult/>")
        elif "delete" in query:
            keys = [unescape(each) for each in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            self.owner.write(lambda objects: _delete(objects, keys))
            gone = "".join(f"<Deleted><Key>{escape(each)}</Key></Deleted>" for each in keys)
            self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        elif self.command == "PUT":
            self._put(key, body)
        elif self.command == "DELETE":
            self._answer(self.owner.write(lambda objects: _delete(objects, [key])), b"")
        else:
            with self.owner.lock:
                if "list-type" in query:
                    self._list(query.get("prefix", [""])[0])
                else:
                    self._get(key)

    def _announce_too_much(self) -> None:
        self.close_connection = True
        self.send_response_only(self.owner.bad_status)
        self.send_header("Content-Length", str(10**13))
        self.end_headers()
        while self.command != "HEAD":  # until the peer has seen enough
            self.wfile.write(b"x" * 65_536)
            self.wfile.flush()
            time.sleep(0.05)

    def _put(self, key: str, body: bytes) -> None:
        if any(self.headers.get(name) for name in self.owner.refuses):
            self._answer(501, b"<Error><Code>NotImplemented</Code></Error>")
            return
        heeded = {name: self.headers.get(name) for name in {"if-none-match", "if-match"} - {*self.owner.ignores}}
        new, wanted = bool(heeded.get("if-none-match")), heeded.get("if-match")
        with self.owner.lock:
            self.owner.clock += 1  # every write is a second later, so no test waits for the next second
            clock = self.owner.clock

        def put(objects: State) -> int:
            found = objects.get(key)
            if (new and found is not None) or (wanted is not None and (found is None or _tag(found[0]) != wanted)):
                return 412
            objects[key] = (body, clock)
            return 200

        if self.owner.write(put) == 412:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
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


class Watch:
    """Holds each write until no other comes, and notes every state a crash may leave at any moment.

    An answered write is durable. Each write under way may have been done or not: none, all, any first few, all but one,
    or just one is kept, in the order of arrival.
    """

    QUIET_S = 0.01

    def __init__(self, store: TinyS3, *, forget: bool) -> None:
        self.store, self.forget = store, forget
        self.writes = 0
        self.found: list[State] = []
        self._durable = dict(store.objects)
        self._seen: set[int] = set()
        self._waiting: list[Write] = []
        self._done: list[Write] = []
        self._turn = threading.Condition()
        self._latest = 0.0
        self._note()

    def write(self, change: Write) -> int:
        """Do a write once it is the first of the waiting ones."""
        with self._turn:
            self.writes += 1
            self._waiting.append(change)
            self._latest = time.monotonic()
            self._turn.notify_all()
            while self._waiting[0] is not change or time.monotonic() < self._latest + self.QUIET_S:
                self._turn.wait(self.QUIET_S)
            self._note()
            with self.store.lock:
                status = change(self.store.objects)
            self._waiting.remove(change)
            if self.forget:
                self._done.append(change)
            else:
                change(self._durable)
            self._note()
            self._turn.notify_all()
            return status

    def last(self) -> list[State]:
        """The states a crash can leave after the last answered write."""
        return list(self._states())

    def _states(self) -> Iterator[State]:
        loose = [*self._done, *self._waiting]
        count = len(loose)
        keeps = [set(range(n)) for n in range(count + 1)]
        keeps += [set(range(count)) - {n} for n in range(count)] + [{n} for n in range(count)]
        for kept in {frozenset(keep) for keep in keeps}:
            state = dict(self._durable)
            for number in sorted(kept):
                loose[number](state)
            yield state

    def _note(self) -> None:
        for state in self._states():
            mark = hash(tuple(sorted((key, data) for key, (data, _) in state.items())))
            if mark not in self._seen:
                self._seen.add(mark)
                self.found.append(state)


def _delete(objects: State, keys: list[str]) -> int:
    for key in keys:
        objects.pop(key, None)
    return 204


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
