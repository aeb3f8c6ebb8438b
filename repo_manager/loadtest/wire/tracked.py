"""gRPC calls beyond one question and one answer: requests of sequences, and streams of responses.

This connection follows each call, at more CPU per request than the counts of the plain one. A request to a decoupled
model is its own call of `ModelStreamInfer`, with its sending side closed. Its responses are the messages on the HTTP/2
stream, and its status comes after the last one. `kept.py` keeps such calls open.
"""

from __future__ import annotations

import collections
import struct
import time
from collections.abc import Iterator, Sequence

from repo_manager.loadtest.wire.connection import Endpoint, Sink, Socket, WantWrite
from repo_manager.loadtest.wire.grpc import LAST_STREAM, GrpcConnection
from repo_manager.loadtest.wire.http2 import DATA
from repo_manager.loadtest.wire.sequences import Lane

__all__ = ["Call", "TrackedGrpcConnection", "fields_of"]

_END_STREAM = 0x1
_PREFIX_BYTES = 5
_LENGTH = struct.Struct(">BI")
_ERROR_FIELD = 1  # string field of ModelStreamInferResponse; an empty one is not sent
_LENGTH_DELIMITED = 2


class Call(int):
    """The start of a call, in nanoseconds, with the state of the call.

    Attributes:
        lane: the live sequence it belongs to.
        last_ns: when its last response came. 0 before the first.
        problem: the error a response carries.
        is_final: on a lasting stream: the final response has come.
    """

    lane: Lane | None = None
    last_ns = 0
    problem = ""
    is_final = False

    def __init__(self, _start_ns: int) -> None:
        super().__init__()
        self.missing = 0  # remaining bytes of the current message
        self.kept = bytearray()  # start of the message, with its prefix


class TrackedGrpcConnection(GrpcConnection):
    """One HTTP/2 connection whose calls belong to sequences, or have any number of responses.

    Args:
        sock: connected socket in non-blocking mode.
        endpoint: address, path, headers and messages of the requests.
        sink: receives results and errors of requests.
        want_write: called when the socket must become writable.
    """

    _kept_bytes = 300  # of a response: enough for an error message

    def __init__(self, sock: Socket, endpoint: Endpoint, sink: Sink, want_write: WantWrite) -> None:
        self._tells_data = endpoint.decoupled or endpoint.keeps_streams
        self._lanes: list[Lane] = []
        self._free: collections.deque[Lane] = collections.deque()
        self._opened: dict[int, Lane] = {}  # requests without a time stamp yet
        self._is_closing = False
        super().__init__(sock, endpoint, sink, want_write)

    def take_lanes(self, lanes: list[Lane]) -> None:
        """Send the requests of these live sequences, one at a time of each."""
        self._lanes = lanes
        self._free.extend(lanes)

    def free_slots(self) -> int:
        """Return how many more requests it can carry: streams the server allows, sequences waiting for one."""
        allowed = super().free_slots()
        return min(allowed, len(self._free)) if self._endpoint.sequences is not None else allowed

    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Queue requests, each of another live sequence. `flush` writes them.

        Args:
            count: number of requests to queue.
            starts_ns: start stamps of the requests in nanoseconds. `None`: the time of the send.
        """
        if self._endpoint.sequences is None:
            first = self._next_id
            super().submit(count, starts_ns)
            if starts_ns is not None:
                self._starts.update({first + 2 * place: Call(start) for place, start in enumerate(starts_ns)})
            return
        for place in range(count):
            lane = self._free.popleft()
            parameters, message = lane.next(ends=self._is_closing)
            body = self._endpoint.messages[message]
            number = self._submit_one(b"".join((_LENGTH.pack(0, len(parameters) + len(body)), parameters, body)), lane)
            lane.stream = number
            self._opened[number] = lane
            if starts_ns is None:
                self._unstamped.append(number)
            else:
                self._stamp([number], starts_ns[place])

    def _submit_one(self, message: bytes, _lane: Lane | None) -> int:
        """Queue a request, given with its gRPC prefix. Returns its HTTP/2 stream."""
        number = self._next_id
        self._next_id = number + 2
        size = len(message)
        identity = number.to_bytes(4, "big")
        self.in_flight += 1
        if number == 1:
            self._submit_first(message)
        elif size <= min(self._flow.window_bytes, self._peer.max_frame_bytes, self._peer.initial_window_bytes) and (
            self._flow.is_idle
        ):
            prefix = struct.pack(">BHBB", size >> 16, size & 0xFFFF, DATA, _END_STREAM)
            self._out += (self._headers_prefix, identity, self._block, prefix, identity, message)
            self._out_bytes += size + 64
            self._flow.window_bytes -= size
        else:
            self._out += (self._headers_prefix, identity, self._block)
            self._out_bytes += 64
            self._start_message(number, message)
        if self._next_id > LAST_STREAM:
            self.usable = False
        return number

    def _stamp(self, numbers: list[int], now_ns: int) -> None:
        for number in numbers:
            call = self._starts[number] = Call(now_ns)
            lane = self._opened.pop(number, None)
            if lane is not None:
                call.lane = lane
                if lane.is_first:
                    lane.began_ns = now_ns

    def _answered(self, starts_ns: list[int], now_ns: int) -> int:
        good: list[int] = []
        again = 0
        for call in starts_ns:
            assert isinstance(call, Call)
            if call.problem:
                self._dropped(call)
                again += self._sink.failed(self, 1, call.problem, now_ns)
                continue
            good.append(now_ns - call)
            if call.lane is not None:
                if call.lane.is_last:
                    self._sink.noted("sequence", [now_ns - call.lane.began_ns], now_ns)
                self._free.append(call.lane)
        return again + (self._sink.completed(self, good, now_ns) if good else 0)

    def _dropped(self, start_ns: int) -> None:
        lane = start_ns.lane if isinstance(start_ns, Call) else None
        if lane is not None:
            lane.abandon()
            self._free.append(lane)

    def end_sequences(self) -> int:
        """Send the last request of every open sequence. Return the number of requests."""
        self._is_closing = True
        self._free = collections.deque(lane for lane in self._free if lane.is_open)
        count = self.free_slots()
        if count > 0:
            self.submit(count)
            self.flush()
        return max(count, 0)

    def _on_data(self, number: int, payload: bytes) -> None:
        """Follow the messages in a piece of a call's responses. A response has come when its last byte has."""
        call = self._starts.get(number)
        if isinstance(call, Call):
            self._follow(number, call, payload)

    def _follow(self, number: int, call: Call, payload: bytes) -> int:
        """Read a piece of a call's responses, up to its final one. Returns how many bytes were read."""
        place, size, now_ns = 0, len(payload), 0
        while place < size and not call.is_final:
            kept = call.kept
            if not call.missing and len(kept) < _PREFIX_BYTES:
                taken = min(_PREFIX_BYTES - len(kept), size - place)
                kept += payload[place : place + taken]
                place += taken
                if len(kept) < _PREFIX_BYTES:
                    break
                call.missing = _LENGTH.unpack(kept)[1]
            taken = min(call.missing, size - place)
            room = _PREFIX_BYTES + self._kept_bytes - len(kept)
            if room > 0:
                kept += payload[place : place + min(taken, room)]
            place += taken
            call.missing -= taken
            if not call.missing:
                now_ns = now_ns or time.monotonic_ns()
                begin = bytes(kept[_PREFIX_BYTES:])
                kept.clear()
                self._response(number, call, begin, now_ns)
        return place

    def _response(self, _number: int, call: Call, begin: bytes, now_ns: int) -> None:
        """Take one whole response. Its beginning was kept."""
        field, value = next(fields_of(begin), (0, b""))
        if field == _ERROR_FIELD:
            call.problem = call.problem or value.decode("utf-8", "replace")
        else:
            self._note_response(call, now_ns)

    def _note_response(self, call: Call, now_ns: int) -> None:
        if call.last_ns:
            self._sink.noted("between", [now_ns - call.last_ns], now_ns)
        else:
            self._sink.noted("first", [now_ns - call], now_ns)
        call.last_ns = now_ns


def fields_of(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and value of a protobuf message's fields, as far as they were kept.

    Fields of one kind only: strings, bytes and messages, as those of responses are. Another one ends it.
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 != _LENGTH_DELIMITED:
            return
        size, place = _varint(message, place)
        yield tag >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the varint at `place`, and where it ends."""
    value = shift = 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80 or shift > 63:  # a varint has at most ten bytes
            break
    return value, place
