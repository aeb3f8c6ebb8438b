"""HTTP/2 flow control of the sending side (RFC 9113, 5.2): messages cut into DATA frames as the windows allow."""

from __future__ import annotations

import collections
import struct

from repo_manager.loadtest.wire.http2 import DATA, PeerSettings

__all__ = ["SendFlow"]

_END_STREAM = 0x1


class SendFlow:
    """The connection's window, and the streams whose message is not wholly sent.

    Attributes:
        window_bytes: what the connection may still send; a caller that sends a whole message takes it off itself.
    """

    def __init__(self, peer: PeerSettings) -> None:
        self.window_bytes = peer.initial_window_bytes
        self._peer = peer
        self._stream_windows: dict[int, int] = {}
        self._waiting: collections.deque[tuple[int, memoryview]] = collections.deque()

    @property
    def is_idle(self) -> bool:
        """Whether no message waits for room."""
        return not self._waiting

    def start(self, stream: int, message: bytes) -> None:
        """Queue a stream's message; `frames` yields it."""
        self._stream_windows[stream] = self._peer.initial_window_bytes
        self._waiting.append((stream, memoryview(message)))

    def forget(self, stream: int) -> None:
        """Send no more of a stream."""
        self._stream_windows.pop(stream, None)

    def clear(self) -> None:
        """Send no more at all."""
        self._stream_windows.clear()
        self._waiting.clear()

    def grant(self, stream: int, size_bytes: int) -> None:
        """Apply a WINDOW_UPDATE; stream 0 is the connection."""
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
        """Return what may be sent now, oldest stream first: buffers that share the messages' memory, and their size."""
        out: list[bytes | memoryview] = []
        total = 0
        blocked: list[tuple[int, memoryview]] = []
        while self._waiting and self.window_bytes > 0:
            stream, rest = self._waiting.popleft()
            if stream not in self._stream_windows:
                continue  # reset meanwhile
            room = min(self.window_bytes, self._stream_windows[stream], self._peer.max_frame_bytes)
            if room <= 0:
                blocked.append((stream, rest))
                continue
            piece, rest = rest[:room], rest[room:]
            size = len(piece)
            flags = 0 if len(rest) else _END_STREAM
            out += (struct.pack(">BHBBI", size >> 16, size & 0xFFFF, DATA, flags, stream), piece)
            total += size + 9
            self.window_bytes -= size
            if len(rest):
                self._stream_windows[stream] -= size
                self._waiting.appendleft((stream, rest))
            else:
                del self._stream_windows[stream]
        self._waiting.extendleft(reversed(blocked))
        return out, total
