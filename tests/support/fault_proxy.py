"""An HTTP proxy in front of an object store, with planned faults: at a request, at a byte, for a while."""

from __future__ import annotations

import dataclasses
import http.client
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it came: its number since the last `arm`, from 1."""

    number: int
    method: str
    path: str
    body_bytes: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """The treatment of a request.

    Attributes:
        status: answer this instead of asking the store; 503 says SlowDown.
        cut_request_at: read so many bytes of the body, then close; the store hears nothing.
        cut_answer_at: ask the store, send so many bytes of its answer's body, then close. 0 loses the whole answer.
        stall_s: wait so long before anything.
        kill_pid: SIGKILL this process, before the store is asked or (with cut_answer_at) after.
    """

    status: int | None = None
    cut_request_at: int | None = None
    cut_answer_at: int | None = None
    stall_s: float = 0.0
    kill_pid: int | None = None


Plan = Callable[[Request], Fault | None]


class FaultProxy:
    """The proxy. `arm` sets the plan and starts counting at 1.

    With a `prefix` it is a gateway: it takes paths below the prefix, forwards the rest of the path, and answers in
    chunks.
    """

    def __init__(self, upstream: tuple[str, int], prefix: str = "") -> None:
        self.upstream = upstream
        self.prefix = prefix
        self.requests: list[Request] = []
        self._plan: Plan = lambda _: None
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def arm(self, plan: Plan | None = None) -> None:
        with self._lock:
            self.requests = []
            self._plan = plan or (lambda _: None)

    def decide(self, method: str, path: str, body_bytes: int) -> Fault | None:
        with self._lock:
            request = Request(len(self.requests) + 1, method, path, body_bytes)
            self.requests.append(request)
            return self._plan(request)

    @property
    def sent_bytes(self) -> int:
        """Bytes of all request bodies since `arm`."""
        return sum(request.body_bytes for request in self.requests)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client was killed, as it should be

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        fault = self.owner.decide(self.command, self.path, length) or Fault()
        if fault.stall_s:
            time.sleep(fault.stall_s)
        if fault.cut_request_at is not None:
            self.rfile.read(min(length, fault.cut_request_at))
            self._close()
            return
        body = self.rfile.read(length)
        if fault.kill_pid is not None and fault.cut_answer_at is None:
            os.kill(fault.kill_pid, signal.SIGKILL)
            self._close()
            return
        if not self.path.startswith(f"{self.owner.prefix}/"):
            self._answer(404, b"no route")
            return
        if fault.status is not None:
            self._answer(fault.status, b"<Error><Code>SlowDown</Code><Message>by the test</Message></Error>")
            return
        self._forward(body, fault)

    def _forward(self, body: bytes, fault: Fault) -> None:
        upstream = http.client.HTTPConnection(*self.owner.upstream, timeout=30)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
            upstream.request(self.command, self.path.removeprefix(self.owner.prefix), body=body, headers=headers)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if fault.kill_pid is not None:
            os.kill(fault.kill_pid, signal.SIGKILL)
        if fault.cut_answer_at == 0:
            self._close()
            return
        self.send_response_only(answer.status, answer.reason)
        for key, value in answer.getheaders():
            if key.lower() not in _HOP_BY_HOP:
                self.send_header(key, value)
        if self.owner.prefix:
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b"")
            self.wfile.write(b"0\r\n\r\n")
            return
        declared = answer.getheader("content-length") if self.command == "HEAD" else str(len(data))
        self.send_header("content-length", declared or "0")
        self.end_headers()
        if fault.cut_answer_at is not None:
            self.wfile.write(data[: fault.cut_answer_at])
            self.wfile.flush()
            self._close()
            return
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _serve  # noqa: N815


@contextmanager
def fault_proxy(upstream: tuple[str, int]) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def times(count: int, fault: Fault, *, when: Callable[[Request], bool] = lambda _: True) -> Plan:
    """A plan with the first `count` matching requests failing."""
    left = [count]

    def plan(request: Request) -> Fault | None:
        if left[0] and when(request):
            left[0] -= 1
            return fault
        return None

    return plan
