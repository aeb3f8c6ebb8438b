"""Lasting calls of `ModelStreamInfer`, one request after another, as Triton's own clients use them.

Every request in flight has a call of its own, and a live sequence keeps one for all its requests. Triton marks the
final response of a request to a decoupled model when the request asks for it (`triton_enable_empty_final_response`, in
decoupled_models.md of its documentation). Any other request has one response.
"""

from __future__ import annotations

import collections
import itertools
import struct
from collections.abc import Sequence

from repo_manager.loadtest.wire.connection import Endpoint, Sink, Socket, WantWrite
from repo_manager.loadtest.wire.grpc import LAST_STREAM
from repo_manager.loadtest.wire.http2 import DATA, HEADERS, RST_STREAM, WINDOW_UPDATE, frame
from repo_manager.loadtest.wire.sequences import Lane
from repo_manager.loadtest.wire.tracked import Call, TrackedGrpcConnection, fields_of

__all__ = ["KeptGrpcConnection"]

_END_STREAM, _END_HEADERS = 0x1, 0x4
_TOP_UP_BYTES = 1 << 29
_ERROR, _RESPONSE = 1, 2  # fields of ModelStreamInferResponse
_PARAMETERS, _OUTPUTS, _CONTENTS = 4, 5, 6  # fields of ModelInferResponse, in their order on the wire
_FINAL = b"\x0a\x15triton_final_response\x12\x02\x08"  # an entry of the parameters, without its value


class KeptGrpcConnection(TrackedGrpcConnection):
    """One HTTP/2 connection whose calls stay open between requests.

    Args:
        sock: connected socket in non-blocking mode.
        endpoint: address, path, headers and messages of the requests.
        sink: receives results and errors of requests.
        want_write: called when the socket must become writable.
    """

    _remembers_ends = False
    _kept_bytes = 65_536  # of a response: the part before its outputs

    def __init__(self, sock: Socket, endpoint: Endpoint, sink: Sink, want_write: WantWrite) -> None:
        self._resting: collections.deque[int] = collections.deque()  # streams without a request
        self._finished: list[Call] = []
        self._ending: set[int] = set()
        self._taken: collections.Counter[int] = collections.Counter()  # bytes of each stream since its last top-up
        super().__init__(sock, endpoint, sink, want_write)
        self._rotation = itertools.cycle(self._messages)

    def submit(self, count: int, starts_ns: Sequence[int] | None = None) -> None:
        """Queue requests, each on a free stream. `flush` writes them.

        Args:
            count: number of requests to queue.
            starts_ns: start stamps of the requests in nanoseconds. `None`: the time of the send.
        """
        if self._endpoint.sequences is not None:
            super().submit(count, starts_ns)
            return
        for place in range(count):
            number = self._submit_one(next(self._rotation), None)
            if starts_ns is None:
                self._unstamped.append(number)
            else:
                self._stamp([number], starts_ns[place])

    def _submit_one(self, message: bytes, lane: Lane | None) -> int:
        self.in_flight += 1
        number = self._resting_stream(lane)
        if number is None:
            number = self._open_stream()
        self._start_message(number, message)
        return number

    def _resting_stream(self, lane: Lane | None) -> int | None:
        """Return the stream of a live sequence, or any other free one. `None`: there is none."""
        if lane is not None:
            return lane.stream if lane.stream in self._flow.kept else None
        while self._resting:
            number = self._resting.popleft()
            if number in self._flow.kept:
                return number
        return None

    def _open_stream(self) -> int:
        number = self._next_id
        self._next_id = number + 2
        self._queue(frame(HEADERS, _END_HEADERS, number, self._first_block if number == 1 else self._block))
        self._flow.kept.add(number)
        if self._next_id > LAST_STREAM:
            self.usable = False
        return number

    def end_streams(self) -> int:
        """End the streams without a request. Returns how many the server has not ended yet."""
        for number in self._flow.kept - self._ending - self._starts.keys():
            self._ending.add(number)
            self._queue(frame(DATA, _END_STREAM, number, b""))
        self.flush()
        return len(self._flow.kept) if self.usable else 0

    def _read_frames(self, data: bytes) -> list[int]:
        ended = super()._read_frames(data)
        finished, self._finished = self._finished, []
        return [*ended, *finished]

    def _on_data(self, number: int, payload: bytes) -> None:
        call = self._starts.get(number)
        taken = self._follow(number, call, payload) if isinstance(call, Call) else 0
        if taken < len(payload) and number in self._flow.kept:
            # Unrequested data: the next answers on this stream would be ambiguous.
            self._flow.forget(number)
            self._queue(frame(RST_STREAM, 0, number, struct.pack(">I", 8)))
            return
        self._taken[number] += len(payload)
        if self._taken[number] > _TOP_UP_BYTES:
            self._queue(frame(WINDOW_UPDATE, 0, number, struct.pack(">I", self._taken.pop(number))))

    def _response(self, number: int, call: Call, begin: bytes, now_ns: int) -> None:
        error, is_final, has_outputs = _read(begin)
        decoupled = self._endpoint.decoupled
        if error:
            call.problem = call.problem or error
        elif decoupled and is_final is None:
            call.problem = "the server does not mark final responses: send each request as a call (--no-streaming)"
        elif decoupled and (has_outputs or not is_final):
            self._note_response(call, now_ns)
        if not decoupled or is_final is not False:
            call.is_final = True
            self._finished.append(call)
            del self._starts[number]
            if call.lane is None:
                self._resting.append(number)

    def _answered(self, starts_ns: list[int], now_ns: int) -> int:
        for call in starts_ns:
            if isinstance(call, Call) and not call.is_final:
                call.problem = call.problem or "the server ended the stream before the final response"
        return super()._answered(starts_ns, now_ns)


def _read(begin: bytes) -> tuple[str, bool | None, bool]:
    """Return a response's error, whether its mark says final (`None`: no mark), and whether it has outputs."""
    error, is_final, has_outputs = "", None, False
    for field, value in fields_of(begin):
        if field == _ERROR:
            error = value.decode("utf-8", "replace")
        elif field == _RESPONSE:
            for part, item in fields_of(value):
                if part in (_OUTPUTS, _CONTENTS):
                    has_outputs = True
                    break
                if part == _PARAMETERS and item.startswith(_FINAL):
                    is_final = item.endswith(b"\x01")
    return error, is_final, has_outputs
