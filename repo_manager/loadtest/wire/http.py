"""HTTP/1.1 client connection: one prebuilt request in flight, answers recognised by their header block."""

from __future__ import annotations

import functools
import itertools
import json
import socket
import time
import zlib
from collections.abc import Iterator, Sequence

from repo_manager.loadtest.wire.base import RECEIVE_BYTES, WireConnection
from repo_manager.loadtest.wire.connection import Endpoint, Sink, Socket, WantWrite
from repo_manager.loadtest.wire.sequences import Lane

__all__ = ["HttpConnection", "http_request"]

_JOIN_BELOW_BYTES = 65_536
_KEPT_BODY_BYTES = 4096
_COMPARED_BODY_BYTES = 16  # bytes of the usual answer's body, up to `{"model_name":`
_ANSWER_KEYS = (b'"outputs"', b'"model_name"')
_GZIP_OR_ZLIB = 47
_KNOWN_HEADS = 256
_HEAD_BYTES = 65_536
_LENGTH_DIGITS = 18
_CHUNKED = -2  # in place of a body's length: the body is chunked
_CHUNK_LINE_BYTES = 4096
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")
_SCRATCH = bytearray(RECEIVE_BYTES)
_SCRATCH_VIEW = memoryview(_SCRATCH)
_now_ns = time.monotonic_ns


def http_request(endpoint: Endpoint, number: int, parameters: bytes = b"") -> tuple[bytes, bytes]:
    """Return the header block and the body of message `number`.

    Args:
        endpoint: address, path, headers and messages of the requests.
        number: number of the message, from 0.
        parameters: of a sequence: the beginning of the body, sent with the header block.
    """
    body = endpoint.messages[number]
    lines = [
        f"POST {endpoint.path} HTTP/1.1",
        f"Host: {endpoint.authority}",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(parameters) + endpoint.json_bytes[number]}",
        f"Content-Length: {len(parameters) + len(body)}",
        *(f"{name}: {value}" for name, value in endpoint.headers),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + parameters, body


@functools.lru_cache(maxsize=1)
def _requests(endpoint: Endpoint) -> tuple[tuple[bytes, ...], ...]:
    """Return the buffers of each request, shared by all connections: a large body is not copied."""
    pairs = [http_request(endpoint, number) for number in range(len(endpoint.messages))]
    return tuple((head + body,) if len(body) < _JOIN_BELOW_BYTES else (head, body) for head, body in pairs)


class HttpConnection(WireConnection):
    """One keep-alive connection with at most one request in flight.

    Args:
        sock: connected socket in non-blocking mode.
        endpoint: address, path, headers and messages of the requests.
        sink: receives results and errors of requests.
        want_write: called when the socket must become writable.
    """

    def __init__(self, sock: Socket, endpoint: Endpoint, sink: Sink, want_write: WantWrite) -> None:
        super().__init__(sock, endpoint, sink, want_write)
        self.ready = True
        self._receive_into = sock.recv_into if isinstance(sock, socket.socket) else None
        self._lane: Lane | None = None
        self._requests: Iterator[tuple[bytes, ...]] = iter(())
        if endpoint.sequences is None:
            self._requests = itertools.cycle(_requests(endpoint))
        self._queued: tuple[bytes, ...] | None = None
        self._is_closing = False
        self._start_ns = 0
        self._stamp_on_write = True
        self._received = b""
        self._missing = -1  # bytes of the body still to come; -1: the header block is incomplete
        self._chunks: _Chunks | None = None  # decodes a chunked body
        self._is_awaited = False  # a request is in flight, with no byte of its answer yet
        self._status = 0
        self._keep_alive = True
        self._body = b""  # the beginning of the answer's body
        self._heads: dict[bytes, tuple[int, int, bool]] = {}
        self._usual_head = b""  # last good answer: its header block and the start of its body
        self._usual_bytes = -1  # length of that answer in bytes; -1: none

    def take_lanes(self, lanes: list[Lane]) -> None:
        """Send the requests of one live sequence after another."""
        (self._lane,) = lanes
        self._requests = self._of_lane(self._lane)

    def _of_lane(self, lane: Lane) -> Iterator[tuple[bytes, ...]]:
        while True:
            parameters, number = lane.next(ends=self._is_closing)
            head, body = http_request(self._endpoint, number, parameters)
            yield (head + body,) if len(body) < _JOIN_BELOW_BYTES else (head, body)

    def end_sequences(self) -> int:
        """Send the last request of an open sequence. Return the number of requests."""
        if self._lane is None or not self._lane.is_open or self.in_flight or not self.usable:
            return 0
        self._is_closing = True
        self._send_now()
        return 1

    def _note_sequence(self, lane: Lane, now_ns: int, *, is_good: bool) -> None:
        if lane.is_first:
            lane.began_ns = self._start_ns
        if not is_good:
            lane.abandon()
        elif lane.is_last:
            self._sink.noted("sequence", [now_ns - lane.began_ns], now_ns)

    def free_slots(self) -> int:
        """Return 1 when no request is in flight, else 0."""
        return 1 - self.in_flight if self.usable else 0

    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Queue one request. `flush` writes it. See `Connection.submit`."""
        self.in_flight = 1
        self._is_awaited = True
        self._queued = next(self._requests)
        self._stamp_on_write = starts_ns is None
        if starts_ns is not None:
            self._start_ns = starts_ns[0]

    def flush(self) -> None:
        """Write the queued request."""
        request = self._queued
        if request is None:
            return
        self._queued = None
        self._write(request, stamped=self._stamp_on_write)

    def _send_now(self) -> None:
        """Send the next request of a closed loop."""
        self.in_flight = 1
        self._is_awaited = True
        request = next(self._requests)
        if len(request) > 1:
            self._write(request, stamped=True)
            return
        self._start_ns = _now_ns()
        try:
            self._stream.write_whole(request[0])
        except OSError as exc:
            self._fail_all(f"the connection broke while sending: {exc}")

    def _write(self, request: tuple[bytes, ...], *, stamped: bool) -> None:
        if stamped:
            self._start_ns = _now_ns()
        try:
            if len(request) == 1:
                self._stream.write_whole(request[0])
            else:
                self._stream.write(list(request), _JOIN_BELOW_BYTES)
        except OSError as exc:
            self._fail_all(f"the connection broke while sending: {exc}")

    def on_readable(self) -> None:
        """Read and handle the server's bytes.

        A plain socket is read into the same memory again and again. Most reads hold a whole answer with the header
        block of the last good one. Every step of the common case adds to the client's cost per request.
        """
        if self._receive_into is None:
            data = self._received_now()
            if data is not None:
                self._take(data, _now_ns())
            return
        try:
            count = self._receive_into(_SCRATCH)
        except BlockingIOError:
            return
        except OSError as exc:
            self._fail_all(f"the connection broke: {exc}")
            return
        now_ns = _now_ns()
        if count == self._usual_bytes and self._is_awaited and _SCRATCH.startswith(self._usual_head):
            self.in_flight = 0
            self._is_awaited = False
            if self._lane is not None:
                self._note_sequence(self._lane, now_ns, is_good=True)
            if self._sink.completed(self, [now_ns - self._start_ns], now_ns):
                self._send_now()
        elif not count:
            self._fail_all("the server closed the connection")
        elif self._missing > count and self._status == 200 and len(self._body) >= _KEPT_BODY_BYTES:
            self._missing -= count  # the middle of a large body, not needed
        else:
            self._take(bytes(_SCRATCH_VIEW[:count]), now_ns)

    def _take(self, data: bytes, now_ns: int) -> None:
        self._is_awaited = False
        if self._chunks is not None:
            self._take_chunks(self._chunks, data, now_ns)
            return
        if self._missing > 0:  # the header block was read before; this is the body
            self._take_body(data, 0, now_ns)
            return
        if self._received:
            data = self._received + data
        self._take_head(data, now_ns)

    def _take_head(self, data: bytes, now_ns: int) -> None:
        cut = data.find(b"\r\n\r\n", 0, _HEAD_BYTES)
        if cut < 0:
            self._received = data
            if len(data) >= _HEAD_BYTES:
                self._fail_all(f"the answer's header is larger than {_HEAD_BYTES >> 10} KiB")
            return
        self._received = b""
        head = data[:cut]
        known = self._heads.get(head)
        if known is None:
            known = _parse_head(head)
            if len(self._heads) < _KNOWN_HEADS:
                self._heads[head] = known
        self._status, length, self._keep_alive = known
        self._body = b""
        if length == _CHUNKED:
            self._chunks = _Chunks(_KEPT_BODY_BYTES)
            self._take_chunks(self._chunks, data[cut + 4 :], now_ns)
            return
        if length < 0:
            self._fail_all("the answer has no Content-Length and no chunks")
            return
        self._missing = length
        if self._status == 200 and self._keep_alive:
            begin = cut + 4
            self._usual_head, self._usual_bytes = data[: begin + _COMPARED_BODY_BYTES], begin + length
        self._take_body(data, cut + 4, now_ns)

    def _take_body(self, data: bytes, begin: int, now_ns: int) -> None:
        """Count the body bytes from `begin` on, and keep the first ones."""
        self._missing -= len(data) - begin
        room = _KEPT_BODY_BYTES - len(self._body)
        if room > 0:
            self._body += data[begin : begin + room]
        if self._missing > 0:
            return
        if not self.in_flight or self._missing < 0:
            self._fail_all("the server sent an answer nobody asked for")
            return
        self._missing = -1
        self._finish(now_ns)

    def _take_chunks(self, chunks: _Chunks, data: bytes, now_ns: int) -> None:
        try:
            chunks.feed(data)
        except ValueError as exc:
            self._fail_all(f"the answer's chunks are malformed: {exc}")
            return
        if chunks.done:
            self._chunks = None
            self._body = chunks.kept
            if self.in_flight:
                self._finish(now_ns)
            else:
                self._fail_all("the server sent an answer nobody asked for")

    def _finish(self, now_ns: int) -> None:
        """Tell of a whole answer, and go on."""
        self.in_flight = 0
        closing = not self._keep_alive
        if closing:
            self.usable = False
        problem = _problem_of(self._status, self._body)
        if self._lane is not None:
            self._note_sequence(self._lane, now_ns, is_good=problem is None)
        if problem is None:
            again = self._sink.completed(self, [now_ns - self._start_ns], now_ns)
        else:
            self._usual_bytes = -1
            again = self._sink.failed(self, 1, problem, now_ns)
        if again:
            self._send_now()
        if closing:
            self._sink.lost(self, "the server closes the connection after each answer", now_ns)

    def expire(self, now_ns: int) -> None:
        """Fail the request in flight when it is older than the time-out. HTTP/1.1 then must reconnect."""
        if self.in_flight and now_ns - self._start_ns > self._timeout_ns:
            self._fail_all(f"no answer within {self._timeout_ns / 1e9:g} s")


class _Chunks:
    """Follows a body in chunks (RFC 9112, section 7.1), and keeps its first `kept_bytes` bytes."""

    def __init__(self, kept_bytes: int) -> None:
        self.done = False
        self.kept = b""
        self._kept_bytes = kept_bytes
        self._left = 0  # remaining bytes of the chunk
        self._line = b""
        self._expected = "size"  # meaning of the next line: a chunk's size, the end of one, or a trailer

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the connection.

        Raises:
            ValueError: they are no chunks, or more than the body.
        """
        place = 0
        while place < len(data) and not self.done:
            if self._left:
                piece = data[place : place + self._left]
                self.kept += piece[: self._kept_bytes - len(self.kept)]
                self._left -= len(piece)
                place += len(piece)
                continue
            end = data.find(b"\n", place)
            self._line += data[place : end if end >= 0 else len(data)]
            if len(self._line) > _CHUNK_LINE_BYTES:
                raise ValueError(f"a line of more than {_CHUNK_LINE_BYTES} bytes")
            if end < 0:
                return
            place = end + 1
            self._take_line(self._line.strip())
            self._line = b""
        if place < len(data):
            raise ValueError(f"{len(data) - place} bytes after the last one")

    def _take_line(self, line: bytes) -> None:
        if self._expected == "trailer":
            self.done = not line
        elif self._expected == "end":
            if line:
                raise ValueError("a chunk is longer than its size")
            self._expected = "size"
        else:
            digits = line.partition(b";")[0].strip()
            if not 0 < len(digits) <= _LENGTH_DIGITS or set(digits) - _HEX_DIGITS:
                raise ValueError(f"the size of a chunk is {digits[:20]!r}")
            self._left = int(digits, 16)
            self._expected = "end" if self._left else "trailer"


def _parse_head(head: bytes) -> tuple[int, int, bool]:
    """Return status, body length (-1: unknown, -2: in chunks) and whether the connection stays open."""
    lines = head.split(b"\r\n")
    words = lines[0].split(b" ", 2)
    is_http = len(words) > 1 and words[0] in (b"HTTP/1.1", b"HTTP/1.0") and words[1].isdigit() and len(words[1]) == 3
    status = int(words[1]) if is_http else 0
    length, chunked, keep = -1, False, words[0] != b"HTTP/1.0"
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        name, value = name.strip().lower(), value.strip().lower()
        if name == b"content-length" and value.isdigit() and len(value) <= _LENGTH_DIGITS:
            length = int(value)
        elif name == b"transfer-encoding":
            chunked = value.endswith(b"chunked")
        elif name == b"connection":
            keep = value != b"close"
    return status, _CHUNKED if chunked else length, keep


def _problem_of(status: int, body: bytes) -> str | None:
    """Return the fault of an answer, by its status and the beginning of its body. `None`: nothing."""
    if status != 200:
        return _error_text(status, body)
    text = _uncompressed(body).lstrip()
    if text[:1] == b"{" and any(key in text for key in _ANSWER_KEYS):
        return None
    shown = text[:100].decode("utf-8", "replace").strip()
    return f"HTTP 200 with a body that is no inference answer: {shown!r}: is a proxy or a login page in between?"


def _uncompressed(body: bytes) -> bytes:
    """Return the beginning of a body, perhaps a compressed one."""
    if body[:1] == b"{":
        return body
    try:
        return zlib.decompressobj(_GZIP_OR_ZLIB).decompress(body, _KEPT_BODY_BYTES)
    except zlib.error:
        return body


def _error_text(status: int, body: bytes) -> str:
    """Return Triton's own message from an error body, with the status."""
    text = body.decode("utf-8", "replace").strip()
    try:
        parsed = json.loads(text)
        if isinstance(parsed, dict) and "error" in parsed:
            text = str(parsed["error"])
    except (ValueError, RecursionError):
        pass
    return f"HTTP {status}: {text[:300] or 'no message'}"
