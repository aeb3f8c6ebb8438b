"""Sequences of requests on the wire: correlation IDs put into prebuilt requests, and the live sequences themselves.

A request of a sequence begins with its parameters: `before`, the correlation ID in a fixed number of bytes, `after`.
The rest is prebuilt as for any request. A live sequence (a `Lane`) has one request open at a time: the next one is
sent when the last one was answered.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from repo_manager.errors import UsageError

__all__ = ["DEFAULT_LENGTH", "FIRST_ID", "IDS", "Lane", "Lanes", "SequencePlan", "drawn_lengths", "encoded_id"]

FIRST_ID, IDS = 300_000_000, 700_000_000
"""Nine digits, five bytes as a varint, and a number an INT32 control holds."""
DEFAULT_LENGTH = "16:24"  # requests per sequence, as perf_analyzer: 20, plus or minus 20 %
_MOST_STEPS = 1 << 20
_DRAWN = 4096


def drawn_lengths(text: str, seed: int) -> tuple[int, ...]:
    """Draw lengths of sequences.

    Args:
        text: `20` (always), `10:30` (each equally likely, the ends included) or `mean:20` (geometric: with the same
            probability after each request).
        seed: seed of the random numbers. Equal seeds give equal results.

    Raises:
        UsageError: any other text.
    """
    rng = np.random.default_rng(seed)
    kind, mark, rest = text.rpartition(":")
    found: list[int] = []
    with contextlib.suppress(ValueError, OverflowError):
        if kind == "mean":
            mean = float(rest)
            found = rng.geometric(1 / mean, _DRAWN).tolist() if 1 <= mean <= _MOST_STEPS else []
        else:
            low, high = int(kind if mark else rest), int(rest)
            if 1 <= low <= high <= _MOST_STEPS:
                found = rng.integers(low, high, _DRAWN, endpoint=True).tolist()
    if not found:
        raise UsageError(f"the sequence length is {text!r}, expected 20, 10:30 (each equally likely) or mean:20")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class SequencePlan:
    """The material of sequences.

    Attributes:
        parameters: (start, end) -> the bytes before and after the correlation ID.
        as_varint: whether the ID is a varint of protobuf, else it is digits.
        streams: recorded sequences, each the numbers of its requests' messages. Sent whole, in rotation.
        lengths: without recorded ones: lengths in rotation, of messages in rotation.
        messages: number of prebuilt messages in rotation.
    """

    parameters: tuple[tuple[tuple[bytes, bytes], tuple[bytes, bytes]], tuple[tuple[bytes, bytes], tuple[bytes, bytes]]]
    as_varint: bool
    messages: int
    streams: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[int, ...] = ()

    def sequences(self, first: int) -> Iterator[Sequence[int]]:
        """Yield the message numbers of sequence after sequence, from number `first` of the rotation on."""
        if self.streams:
            yield from itertools.islice(itertools.cycle(self.streams), first % len(self.streams), None)
        number = first
        for length in itertools.islice(itertools.cycle(self.lengths), first % len(self.lengths), None):
            yield [(number + step) % self.messages for step in range(length)]
            number += length


def encoded_id(number: int, *, as_varint: bool) -> bytes:
    """Return a correlation ID as it goes on the wire."""
    if not as_varint:
        return b"%d" % number
    return bytes(((number >> shift) & 0x7F) | (0x80 if shift < 28 else 0) for shift in range(0, 35, 7))


class Lanes:
    """Where a worker's live sequences take their IDs and their requests from.

    Args:
        plan: messages of the sequences. Worker n begins at number n of its rotation.
        worker: number of this worker, from 0.
        workers: how many workers there are. No two give the same ID.
        seed: of the first ID, so a test soon after another does not meet its sequences.
    """

    def __init__(self, plan: SequencePlan, worker: int, workers: int, seed: int) -> None:
        self.plan = plan
        room = IDS // workers
        start = int(np.random.default_rng(seed).integers(room))
        self._ids = (FIRST_ID + worker * room + (start + number) % room for number in itertools.count())
        self._sequences = plan.sequences(worker)

    def take(self) -> tuple[bytes, collections.deque[int]]:
        """Return the ID of the next sequence, as it goes on the wire, and its messages."""
        identity = encoded_id(next(self._ids), as_varint=self.plan.as_varint)
        return identity, collections.deque(next(self._sequences))


class Lane:
    """One live sequence after another, one request at a time.

    Attributes:
        is_last: whether the latest request taken ends its sequence.
        began_ns: start of the sequence's first request. Set by the sending connection.
        stream: the HTTP/2 stream of the open request.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.is_last = True
        self.is_first = False
        self.began_ns = 0
        self.stream = 0
        self._lanes = lanes
        self._id = b""
        self._left: collections.deque[int] = collections.deque()

    @property
    def is_open(self) -> bool:
        """Whether a sequence was started and not ended."""
        return not self.is_last

    def next(self, *, ends: bool = False) -> tuple[bytes, int]:
        """Return the next request's parameters and the number of its message.

        Args:
            ends: make it the last one of its sequence.
        """
        self.is_first = self.is_last
        if self.is_first:
            self._id, self._left = self._lanes.take()
        message = self._left.popleft()
        self.is_last = ends or not self._left
        before, after = self._lanes.plan.parameters[self.is_first][self.is_last]
        return before + self._id + after, message

    def abandon(self) -> None:
        """Leave the sequence of a failed request. The next request starts another one."""
        self.is_last = True
