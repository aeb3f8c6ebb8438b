"""The parts of HTTP/2 (RFC 9113) and HPACK (RFC 7541) for a gRPC load client."""

from __future__ import annotations

import collections
import dataclasses
import struct
import urllib.parse

from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.wire.hpack import Decoder, HpackError, encode_integer, encode_literal

__all__ = [
    "CONNECTION_PREFACE",
    "DATA",
    "FRAME_HEADER",
    "GOAWAY",
    "HEADERS",
    "PING",
    "RST_STREAM",
    "SETTINGS",
    "WINDOW_UPDATE",
    "BlockReader",
    "PeerSettings",
    "SendFlow",
    "frame",
    "request_blocks",
    "reset_reason",
]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
FRAME_HEADER = struct.Struct(">BHBBI")
_PADDED, _PRIORITY = 0x8, 0x20
_KNOWN_BLOCKS = 256

_RESETS = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
    "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
)  # fmt: skip
_STATUSES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_STATUS_NAMES = {str(number): name for number, name in enumerate(_STATUSES)}
_END_STREAM = 0x1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame.

    Args:
        kind: type of the frame (RFC 9113, section 6).
        flags: flag bits of the frame.
        stream: stream number; 0 is the connection.
        payload: content after the header, not split: at most the peer's largest frame.
    """
    size = len(payload)
    return FRAME_HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


# The preface, our SETTINGS (no push; each stream may send 2 GiB) and a connection window of the same size.
CONNECTION_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(SETTINGS, 0, 0, struct.pack(">HIHI", 0x2, 0, 0x4, (1 << 31) - 1))
    + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1 - 65_535))
)


def reset_reason(code: bytes) -> str:
    """Return the name of an HTTP/2 error code, four bytes."""
    number = int.from_bytes(code[:4], "big")
    return _RESETS[number] if number < len(_RESETS) else f"code {number}"


def request_blocks(endpoint: Endpoint, *, indexed: bool) -> tuple[bytes, bytes]:
    """Return the header block of the first request on a connection and of all later ones.

    Args:
        endpoint: address, path, headers and messages of the requests.
        indexed: the first block enters the fields into the peer's dynamic table and later ones name them by index,
            smaller and cheaper for the server. False: literals every time, for a peer whose table is smaller than the
            standard's 4096 bytes.
    """
    fields = [
        (":path", endpoint.path),
        (":authority", endpoint.authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "repo-manager"),
        *endpoint.headers,
    ]
    static = bytes((0x80 | 3, 0x80 | (6 if endpoint.tls is None else 7)))  # :method POST, :scheme http or https
    if sum(len(name) + len(value) + 32 for name, value in fields) > 4096:
        indexed = False
    literal = b"".join(encode_literal(name, value, indexed=indexed) for name, value in fields)
    if not indexed:
        return static + literal, static + literal
    # The newest entry has index 62 (RFC 7541, 2.3.3), so the first field entered has the highest.
    count = len(fields)
    indices = b"".join(encode_integer(62 + count - 1 - place, 7, 0x80) for place in range(count))
    return static + literal, static + indices


@dataclasses.dataclass(frozen=True)
class PeerSettings:
    """The values of the server's SETTINGS frames. The standard's initial values until then."""

    header_table_bytes: int = 4096
    max_streams: int = 1 << 30
    initial_window_bytes: int = 65_535
    max_frame_bytes: int = 16_384

    def updated(self, payload: bytes) -> PeerSettings:
        """Return the settings after one SETTINGS frame's payload."""
        names = {1: "header_table_bytes", 3: "max_streams", 4: "initial_window_bytes", 5: "max_frame_bytes"}
        pairs = struct.iter_unpack(">HI", payload[: len(payload) // 6 * 6])
        changes = {names[key]: value for key, value in pairs if key in names}
        return dataclasses.replace(self, **changes)


class BlockReader:
    """Reads the header blocks of answers, and remembers the ones whose meaning cannot change.

    A block of indexed fields only neither changes the dynamic table nor means anything else until the table changes:
    such a block is decoded once. All of them are forgotten when any other block arrives.

    Attributes:
        initial: remembered good blocks at the beginning of an answer.
        is_ok: remembered block at the end of a call -> whether the call succeeded.
    """

    def __init__(self) -> None:
        self.initial: set[bytes] = set()
        self.is_ok: dict[bytes, bool] = {}
        self._decoder = Decoder()

    def read(self, block: bytes, flags: int) -> str | None:
        """Decode a block and return the problem it reports, `None` when it reports none.

        Args:
            block: payload of a HEADERS frame.
            flags: flag bits of the frame.
        """
        if flags & _PADDED and not block:
            return "the server's header block cannot be decoded: it is empty"
        if flags & (_PADDED | _PRIORITY):
            padding = block[0] if flags & _PADDED else 0
            start = bool(flags & _PADDED) + 5 * bool(flags & _PRIORITY)
            block = block[start : len(block) - padding]
        try:
            fields = dict(self._decoder.decode(block))
        except HpackError as exc:
            return f"the server's header block cannot be decoded: {exc}"
        is_end = bool(flags & 0x1)
        problem = _problem_of(fields, is_end=is_end)
        if not block or min(block) < 0x80 or max(block) == 0xFF:
            self.initial.clear()
            self.is_ok.clear()
        elif is_end and len(self.is_ok) < _KNOWN_BLOCKS:
            self.is_ok[block] = problem is None
        elif not is_end and problem is None and len(self.initial) < _KNOWN_BLOCKS:
            self.initial.add(block)
        return problem


def _problem_of(fields: dict[str, str], *, is_end: bool) -> str | None:
    """Return the fault according to `:status` and `grpc-status`."""
    http = fields.get(":status", "200")
    status = fields.get("grpc-status")
    if status is None:
        if http != "200":
            return f"HTTP {http} from something that is no gRPC server"
        return "the call ended without a grpc-status" if is_end else None
    if status == "0":
        return None
    name = _STATUS_NAMES.get(status, f"status {status[:20]}")
    return f"{name}: {urllib.parse.unquote(fields.get('grpc-message', ''))[:300] or 'no message'}"


class SendFlow:
    """The connection's window, and the streams whose message is not wholly sent.

    Attributes:
        window_bytes: number of bytes the connection may still send. The sender of a whole message subtracts its size.
        kept: the streams left open after a message.
    """

    def __init__(self, peer: PeerSettings) -> None:
        self.window_bytes = peer.initial_window_bytes
        self.kept: set[int] = set()
        self._peer = peer
        self._stream_windows: dict[int, int] = {}
        self._waiting: collections.deque[tuple[int, memoryview]] = collections.deque()

    @property
    def is_idle(self) -> bool:
        """Whether no message waits for room."""
        return not self._waiting

    def start(self, stream: int, message: bytes) -> None:
        """Queue a stream's message. `frames` yields it, and ends the stream with it unless it is one of `kept`."""
        self._stream_windows.setdefault(stream, self._peer.initial_window_bytes)
        self._waiting.append((stream, memoryview(message)))

    def forget(self, stream: int) -> None:
        """Send no more of a stream."""
        self._stream_windows.pop(stream, None)
        self.kept.discard(stream)

    def clear(self) -> None:
        """Send no more at all."""
        self._stream_windows.clear()
        self.kept.clear()
        self._waiting.clear()

    def grant(self, stream: int, size_bytes: int) -> None:
        """Apply a WINDOW_UPDATE. Stream 0 is the connection."""
        if stream == 0:
            self.window_bytes += size_bytes
        elif stream in self._stream_windows:
            self._stream_windows[stream] += size_bytes

    def apply(self, peer: PeerSettings) -> None:
        """Apply new SETTINGS: they move the windows of open streams, not the connection's (RFC 9113, 6.9.2)."""
        change = peer.initial_window_bytes - self._peer.initial_window_bytes
        self._peer = peer
        for stream in self._stream_windows:
            self._stream_windows[stream] += change

    def frames(self) -> tuple[list[bytes | memoryview], int]:
        """Return the bytes to send now, oldest stream first: buffers in the messages' memory, and their size."""
        out: list[bytes | memoryview] = []
        total = 0
        blocked: list[tuple[int, memoryview]] = []
        while self._waiting and self.window_bytes > 0:
            stream, rest = self._waiting.popleft()
            if stream not in self._stream_windows:
                continue  # reset in the meantime
            room = min(self.window_bytes, self._stream_windows[stream], self._peer.max_frame_bytes)
            if room <= 0:
                blocked.append((stream, rest))
                continue
            piece, rest = rest[:room], rest[room:]
            size = len(piece)
            is_end = not len(rest) and stream not in self.kept
            flags = _END_STREAM if is_end else 0
            out += (struct.pack(">BHBBI", size >> 16, size & 0xFFFF, DATA, flags, stream), piece)
            total += size + 9
            self.window_bytes -= size
            if is_end:
                del self._stream_windows[stream]
                continue
            self._stream_windows[stream] -= size
            if len(rest):
                self._waiting.appendleft((stream, rest))
        self._waiting.extendleft(reversed(blocked))
        return out, total
