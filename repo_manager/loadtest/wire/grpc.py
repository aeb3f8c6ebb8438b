"""gRPC client connection: HTTP/2 frames built once, many streams on one connection.

The header block of a request is the same for every request. The first one on a connection teaches the server's HPACK
table its fields (literals with incremental indexing). Every later one is a few index bytes. A request is then: HEADERS
with its stream id, DATA with its stream id and the prebuilt message (RFC 9113, RFC 7541, and the gRPC over HTTP/2
mapping). Large messages are written as slices of the prebuilt one, within the server's flow control.
"""

from __future__ import annotations

import functools
import itertools
import struct
import time
from collections.abc import Sequence

from repo_manager.loadtest.wire.base import WireConnection
from repo_manager.loadtest.wire.connection import Endpoint, Sink, Socket, WantWrite
from repo_manager.loadtest.wire.http2 import (
    CONNECTION_PREFACE,
    DATA,
    FRAME_HEADER,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    BlockReader,
    PeerSettings,
    SendFlow,
    frame,
    request_blocks,
    reset_reason,
)
from repo_manager.loadtest.wire.sequences import Lane

__all__ = ["LAST_STREAM", "GrpcConnection"]

_WINDOW_BYTES = (1 << 31) - 1
_TOP_UP_BYTES = 1 << 29
_FRAME_BYTES = 16_384  # the largest frame from a peer: our SETTINGS raise no limit
_MOST_UNREAD = 10_000
LAST_STREAM = (1 << 31) - 3
_END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1


@functools.lru_cache(maxsize=1)
def _prefixed(endpoint: Endpoint) -> tuple[bytes, ...]:
    """Return the messages with their gRPC prefix, shared by all connections."""
    flag = int(endpoint.is_compressed)
    return tuple(struct.pack(">BI", flag, len(message)) + message for message in endpoint.messages)


class GrpcConnection(WireConnection):
    """One HTTP/2 connection for unary calls of one gRPC method.

    Args:
        sock: connected socket in non-blocking mode.
        endpoint: address, path, headers and messages of the requests.
        sink: receives results and errors of requests.
        want_write: called when the socket must become writable.
    """

    _tells_data = False
    _remembers_ends = True  # a known block ends the call without another look

    def __init__(self, sock: Socket, endpoint: Endpoint, sink: Sink, want_write: WantWrite) -> None:
        super().__init__(sock, endpoint, sink, want_write)
        self._out: list[bytes | memoryview] = [CONNECTION_PREFACE]
        self._out_bytes = len(CONNECTION_PREFACE)
        self._starts: dict[int, int] = {}
        self._unstamped: list[int] = []
        self._next_id = 1
        self._peer = PeerSettings()
        self._flow = SendFlow(self._peer)
        self._received = b""
        self._problem = ""  # why the connection cannot be read any further
        self._unread = 0  # answers to control frames not yet read by the server
        self._skip = 0  # remaining bytes of a DATA frame to skip
        self._unacknowledged = 0
        self._blocks = BlockReader()
        self._first_block, self._block = request_blocks(endpoint, indexed=True)
        self._messages = _prefixed(endpoint)
        self._build_frames()
        self.flush()

    def free_slots(self) -> int:
        """Return how many more streams the server allows, 0 before its SETTINGS came."""
        return self._peer.max_streams - self.in_flight if self.usable and self.ready else 0

    def _build_frames(self) -> None:
        """Prebuild the constant parts of requests. Again when the server's SETTINGS change it."""
        self._headers_prefix = frame(HEADERS, _END_HEADERS, 0, self._block)[:5]
        whole: list[tuple[bytes, bytes, int]] = []
        for message in self._messages:
            data_prefix = struct.pack(">BHBB", len(message) >> 16, len(message) & 0xFFFF, DATA, _END_STREAM)
            whole.append((self._block + data_prefix, message, len(message)))
        self._whole = itertools.cycle(whole)
        largest = max(len(message) for message in self._messages)
        self._fits_one_frame = largest <= min(self._peer.max_frame_bytes, self._peer.initial_window_bytes)

    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Queue requests. `flush` writes them. See `Connection.submit`."""
        out, unstamped, prefix, whole = self._out, self._unstamped, self._headers_prefix, self._whole
        flow = self._flow
        for place in range(count):
            number = self._next_id
            self._next_id = number + 2
            block, message, size = next(whole)
            identity = number.to_bytes(4, "big")
            if number == 1:
                self._submit_first(message)
            elif self._fits_one_frame and size <= flow.window_bytes and flow.is_idle:
                out += (prefix, identity, block, identity, message)
                flow.window_bytes -= size
                self._out_bytes += size + 64
            else:
                out += (prefix, identity, self._block)
                self._out_bytes += 64
                self._start_message(number, message)
            if starts_ns is None:
                unstamped.append(number)
            else:
                self._starts[number] = starts_ns[place]
        self.in_flight += count
        if self._next_id > LAST_STREAM:
            self.usable = False  # the sink opens a new connection; this one finishes its streams

    def _submit_first(self, message: bytes) -> None:
        """Queue stream 1, whose header block fills the server's table."""
        header = frame(HEADERS, _END_HEADERS, 1, self._first_block)
        self._out.append(header)
        self._out_bytes += len(header)
        self._start_message(1, message)

    def _start_message(self, number: int, message: bytes) -> None:
        self._flow.start(number, message)
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Queue as much of the waiting messages as the flow control allows."""
        buffers, size = self._flow.frames()
        self._out += buffers
        self._out_bytes += size

    def flush(self) -> None:
        """Write the queue, and stamp the requests timed from their write."""
        if not self._out:
            return
        if self._unstamped:
            self._stamp(self._unstamped, time.monotonic_ns())
            self._unstamped.clear()
        out, size = self._out, self._out_bytes
        self._out, self._out_bytes = [], 0
        try:
            self._stream.write(out, size)
        except OSError as exc:
            self._fail_all(f"the connection broke while sending: {exc}")

    def _stamp(self, numbers: list[int], now_ns: int) -> None:
        """Let the latency of requests count from now."""
        self._starts.update(dict.fromkeys(numbers, now_ns))

    def _answered(self, starts_ns: list[int], now_ns: int) -> int:
        """Tell the sink of successful calls. Returns how many it wants next."""
        return self._sink.completed(self, [now_ns - start_ns for start_ns in starts_ns], now_ns)

    def _dropped(self, start_ns: int) -> None:
        """A call ended badly: a subclass forgets its state of it."""

    def take_lanes(self, lanes: list[Lane]) -> None:
        """A plain connection has none: see `TrackedGrpcConnection`."""

    def end_sequences(self) -> int:
        """Return 0: a plain connection has no sequences."""
        return 0

    def on_readable(self) -> None:
        """Read and handle the server's bytes."""
        data = self._received_now()
        if data is None:
            return
        if self._received:
            data = self._received + data
        starts_ns = self._read_frames(data)
        if starts_ns:
            now_ns = time.monotonic_ns()  # an answer arrives when its status has been read
            self.in_flight -= len(starts_ns)
            self._again(self._answered(starts_ns, now_ns))
        if self._problem:
            self._fail_all(self._problem)
        elif self._out:
            self.flush()

    def _read_frames(self, data: bytes) -> list[int]:
        """Handle every complete frame, keep the rest, return the starts of successful calls."""
        ended: list[int] = []
        position, end = self._skip, len(data)
        if position > end:
            self._skip = position - end
            return ended
        self._skip = 0
        unpack, starts = FRAME_HEADER.unpack_from, self._starts
        initial, is_ok = self._blocks.initial, self._blocks.is_ok if self._remembers_ends else {}
        while end - position >= 9:
            high, low, kind, flags, number = unpack(data, position)
            after = position + 9 + (high << 16 | low)
            if kind == DATA:
                if self._tells_data:
                    if after > end:
                        break
                    self._on_data(number, data[position + 9 : after])
                self._unacknowledged += after - position - 9
                if after > end:
                    self._skip, position = after - end, end
                    break
            elif after > end:
                if after - position - 9 > _FRAME_BYTES:
                    self._problem = f"the server sends a frame of more than {_FRAME_BYTES} bytes: is it a gRPC server?"
                break
            elif kind == HEADERS and flags & _END_HEADERS:
                block = data[position + 9 : after]
                if not flags & _END_STREAM:
                    if block not in initial:
                        self._blocks.read(block, flags)
                elif is_ok.get(block):
                    start = starts.pop(number, None)
                    if start is not None:
                        ended.append(start)
                else:
                    self._end_call(number, block, flags, ended)
            else:
                self._control(kind, flags, number, data[position + 9 : after])
                if not self.usable and not starts:
                    return ended
            position = after
        self._received = data[position:] if position < end else b""
        if self._unacknowledged > _TOP_UP_BYTES:
            self._queue(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._unacknowledged)))
            self._unacknowledged = 0
        return ended

    def _on_data(self, number: int, payload: bytes) -> None:
        """Take a piece of a call's responses. Only told to an interested subclass."""

    def _end_call(self, number: int, block: bytes, flags: int, ended: list[int]) -> None:
        """Handle trailers not seen before, or with an error."""
        problem = self._blocks.read(block, flags)
        start = self._starts.pop(number, None)
        self._flow.forget(number)
        if start is None:
            return
        if problem is None:
            ended.append(start)
        else:
            self._dropped(start)
            self.in_flight -= 1
            self._again(self._sink.failed(self, 1, problem, time.monotonic_ns()))

    def _again(self, count: int) -> None:
        """Queue the sink's requests. More than the server allows would be refused, so part is given back."""
        if count > 0:
            allowed = min(count, self.free_slots())
            self.submit(allowed)
            if allowed < count:
                self._sink.returned([0] * (count - allowed))

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind in (SETTINGS, PING) and not flags & _ACK:
            self._unread = self._unread + 1 if self._stream.blocked else 0
            if self._unread > _MOST_UNREAD:
                self._problem = "the server floods the connection with control frames"
                return
        if kind == SETTINGS and not flags & _ACK:
            self._apply_settings(payload)
        elif kind == PING and not flags & _ACK:
            self._queue(frame(PING, _ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            grant = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
            self._flow.grant(number, grant)
            if not self._flow.is_idle:
                self._send_waiting()
        elif kind == RST_STREAM:
            self._flow.forget(number)
            start = self._starts.pop(number, None)
            if start is not None:
                self._dropped(start)
                self.in_flight -= 1
                message = f"the server reset the stream: {reset_reason(payload)}"
                self._again(self._sink.failed(self, 1, message, time.monotonic_ns()))
        elif kind == GOAWAY:
            self._go_away(payload)

    def _apply_settings(self, payload: bytes) -> None:
        self._peer = self._peer.updated(payload)
        self._flow.apply(self._peer)
        if self._peer.header_table_bytes < 4096 and self._next_id == 1:
            self._first_block, self._block = request_blocks(self._endpoint, indexed=False)
        self._build_frames()
        self._queue(frame(SETTINGS, _ACK, 0, b""))
        self.ready = True
        if not self._flow.is_idle:
            self._send_waiting()

    def _go_away(self, payload: bytes) -> None:
        """Take no new requests. Hand the streams back the server says it did not begin (RFC 9113, 6.8)."""
        self.usable = False
        last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        refused = [number for number in self._starts if number > last]
        starts_ns = [self._starts.pop(number) for number in refused]
        for number, start in zip(refused, starts_ns, strict=True):
            self._flow.forget(number)
            self._dropped(start)
        self.in_flight -= len(refused)
        words = payload[8:208].decode("utf-8", "replace")
        reason = f"the server is going away: {reset_reason(payload[4:8])} {words}".strip()
        if refused:
            self._sink.returned(starts_ns)
        if not self.in_flight:
            self._sink.lost(self, reason, time.monotonic_ns())

    def _queue(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)

    def expire(self, now_ns: int) -> None:
        """Cancel and fail the streams older than the time-out (the oldest come first)."""
        expired: list[int] = []
        for number, start in self._starts.items():
            if now_ns - start <= self._timeout_ns:
                break
            expired.append(number)
        for number in expired:
            self._dropped(self._starts.pop(number))
            self._flow.forget(number)
            self._queue(frame(RST_STREAM, 0, number, struct.pack(">I", 8)))
        if expired:
            self.in_flight -= len(expired)
            message = f"no answer within {self._timeout_ns / 1e9:g} s"
            self._again(self._sink.failed(self, len(expired), message, now_ns))
            self.flush()

    def _forget_open(self) -> None:
        super()._forget_open()
        self._starts.clear()
        self._unstamped.clear()
        self._flow.clear()
