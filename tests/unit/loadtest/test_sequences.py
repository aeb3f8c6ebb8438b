"""Sequences and streams of responses on the wire: flags, correlation IDs, errors, and their record."""

from __future__ import annotations

import collections
import json
import struct

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs.samples import make_sequences
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.wire.kept import KeptGrpcConnection
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.loadtest.wire.sequences import FIRST_ID, IDS, Lane, Lanes, drawn_lengths, encoded_id
from repo_manager.loadtest.wire.tracked import TrackedGrpcConnection
from repo_manager.repository.golden import Exchange, Golden, write_golden
from repo_manager.request_data.tensors import InputFacts

X = InputFacts("x", "FP32", (2,))


def facts(**changes):
    values = {
        "url": "", "protocol": "", "server": "", "server_version": "", "model": "m", "version": "1", "backend": "",
        "max_batch_size": 1, "inputs": (X,), "outputs": ("y",), "response_cache": False, "dynamic_batching": False,
        "decoupled": False, "sequence": True,
    }  # fmt: skip
    return ServedModelFacts(**{**values, **changes})


def endpoint(protocol, target=None, **changes) -> Endpoint:
    target = target or facts()
    options = LoadTestOptions(f"{protocol}://a:1", "m", concurrency=(1,), distinct=5, **changes)
    samples, streams = make_sequences(target, options)
    return build_endpoint(target, samples, options, streams=streams)


def parsed(end: Endpoint, head: bytes, number: int):
    """Return a request's id, start, end, inputs' bytes and custom parameters as a server reads them."""
    whole = head + end.messages[number]
    if end.protocol == "grpc":
        request = service_pb2.ModelInferRequest.FromString(whole)
        found = {
            name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()
        }
        data = request.raw_input_contents[0]
    else:
        size = len(head) + end.json_bytes[number]
        document = json.loads(whole[:size])
        assert [item["name"] for item in document["inputs"]] == ["x"]
        found, data = document["parameters"], whole[size:]
    return found.pop("sequence_id"), found.pop("sequence_start"), found.pop("sequence_end"), data, found


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("text_id", [False, True])
def test_every_request_has_the_id_and_the_flags_of_its_place(protocol, text_id):
    end = endpoint(protocol, facts(text_id=text_id), sequence_length="3", parameters={"top": 5, "way": "x", "on": True})
    lane = Lane(Lanes(end.sequences, 0, 1, seed=1))
    rows = [parsed(end, *lane.next()) for _ in range(9)]
    assert [row[1:3] for row in rows] == [(True, False), (False, False), (False, True)] * 3
    identities = [row[0] for row in rows]
    assert all(isinstance(identity, str if text_id else int) for identity in identities)
    assert list(collections.Counter(identities).values()) == [3, 3, 3]
    assert {row[3] for row in rows} == {rows[place][3] for place in range(5)}  # five samples in rotation
    custom = {name: value for name, value in rows[0][4].items() if name != "binary_data_output"}
    assert custom == {"top": 5, "way": "x", "on": True}


def test_a_sequence_of_one_request_starts_and_ends_at_once():
    end = endpoint("grpc", sequence_length="1")
    lane = Lane(Lanes(end.sequences, 0, 1, seed=1))
    first, second = (parsed(end, *lane.next()) for _ in range(2))
    assert first[1:3] == second[1:3] == (True, True)
    assert first[0] != second[0]


@pytest.mark.parametrize("number", [FIRST_ID, FIRST_ID + IDS - 1, 2**28 + FIRST_ID])
def test_an_id_has_the_same_length_whatever_it_is(number):
    request = service_pb2.ModelInferRequest()
    request.parameters["sequence_id"].int64_param = number
    assert request.SerializeToString().endswith(encoded_id(number, as_varint=True))
    assert len(encoded_id(number, as_varint=True)) == 5
    assert len(encoded_id(number, as_varint=False)) == 9


def test_no_two_workers_give_the_same_id():
    plan = endpoint("grpc").sequences
    found = [Lanes(plan, worker, 3, seed=worker) for worker in range(3)]
    taken = [lanes.take()[0] for lanes in found for _ in range(500)]
    assert len(set(taken)) == len(taken)


def test_after_a_failure_a_lane_starts_another_sequence():
    end = endpoint("http", sequence_length="9")
    lane = Lane(Lanes(end.sequences, 0, 1, seed=1))
    first = parsed(end, *lane.next())
    lane.abandon()
    second = parsed(end, *lane.next())
    assert second[1] is True
    assert second[0] != first[0]
    assert parsed(end, *lane.next(ends=True))[1:3] == (False, True)


def test_recorded_sequences_are_sent_whole_and_in_order(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"data": [[{"x": [1, 1]}, {"x": [2, 2]}], [{"x": [3, 3]}]]}))
    end = endpoint("grpc", data=path)
    lane = Lane(Lanes(end.sequences, 0, 1, seed=1))
    rows = [parsed(end, *lane.next()) for _ in range(6)]
    assert [np.frombuffer(row[3], np.float32)[0] for row in rows] == [1, 2, 3, 1, 2, 3]
    assert [row[1:3] for row in rows] == [(True, False), (False, True), (True, True)] * 2


def test_a_golden_file_of_a_sequence_is_input_data(tmp_path):
    exchanges = [Exchange({"x": np.full((1, 2), value, np.float32)}, ()) for value in (1, 2, 3)]
    write_golden(tmp_path / "golden.npz", Golden.of(exchanges))
    end = endpoint("grpc", data=tmp_path / "golden.npz")
    assert end.sequences.streams == ((0, 1, 2),)
    lane = Lane(Lanes(end.sequences, 0, 1, seed=1))
    assert [np.frombuffer(parsed(end, *lane.next())[3], np.float32)[0] for _ in range(3)] == [1, 2, 3]


def test_a_golden_sequence_is_sent_and_a_length_draws_from_its_steps():
    recorded = tuple({"x": np.full((1, 2), value, np.float32)} for value in (1, 2, 3))
    end = endpoint("grpc", recorded=recorded)
    assert end.sequences.streams == ((0, 1, 2),)
    drawn = endpoint("grpc", recorded=recorded, sequence_length="2").sequences
    assert (drawn.streams, set(drawn.lengths)) == ((), {2})


def test_lengths_are_drawn_as_asked():
    even, geometric = np.array(drawn_lengths("5:9", 0)), np.array(drawn_lengths("mean:20", 0))
    assert (even.min(), even.max()) == (5, 9)
    assert (geometric.min(), 18 < geometric.mean() < 22) == (1, True)
    for text in ("0", "9:5", "mean:0.5", "x", "5:", ":5", "mean:nan", "1:99999999999"):
        with pytest.raises(UsageError, match="sequence length"):
            drawn_lengths(text, 0)


def test_what_a_kind_of_model_cannot_take_is_refused():
    with pytest.raises(UsageError, match="one sample each"):
        endpoint("grpc", facts(max_batch_size=8), batch_size=2)
    with pytest.raises(UsageError, match="over gRPC only"):
        endpoint("http", facts(sequence=False, decoupled=True))


# A live connection, fed a server's bytes piece by piece.


class FakeSocket:
    def __init__(self):
        self.sent, self.incoming = bytearray(), collections.deque()

    def fileno(self):
        return 3

    def send(self, data):
        self.sent += data
        return len(data)

    def sendmsg(self, buffers):
        return sum(self.send(bytes(buffer)) for buffer in buffers)

    def recv(self, size):
        if not self.incoming:
            raise BlockingIOError
        return self.incoming.popleft()

    def close(self):
        pass


class Told:
    """A sink that keeps its calls, and asks for nothing more."""

    def __init__(self):
        self.good, self.bad, self.notes = [], [], collections.defaultdict(list)

    def completed(self, _, latencies_ns, now_ns):
        self.good += latencies_ns
        return 0

    def failed(self, _, count, message, now_ns):
        self.bad += [message] * count
        return 0

    def noted(self, name, values_ns, now_ns):
        self.notes[name] += values_ns

    def returned(self, starts_ns):
        raise AssertionError

    def lost(self, connection, message, now_ns):
        self.bad.append(message)


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(*fields):
    from hpack import Encoder

    return Encoder().encode(list(fields))


def opened(end, lanes=0):
    sock, told = FakeSocket(), Told()
    kind = KeptGrpcConnection if end.keeps_streams else TrackedGrpcConnection
    connection = kind(sock, end, told, lambda wanted: None)
    sock.incoming.append(frame(4, 0, 0, b""))
    connection.on_readable()
    if lanes:
        source = Lanes(end.sequences, 0, 1, seed=1)
        connection.take_lanes([Lane(source) for _ in range(lanes)])
    return sock, told, connection


def response(error=""):
    message = service_pb2.ModelStreamInferResponse(error_message=error)
    if not error:
        message.infer_response.raw_output_contents.append(bytes(1000))
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


HEAD = frame(1, 4, 1, block((":status", "200")))
END = frame(1, 5, 1, block(("grpc-status", "0")))


@pytest.mark.parametrize("cut", [1, 3, 7, 500, 10_000])
def test_responses_are_counted_however_the_stream_is_cut(cut):
    sock, told, connection = opened(endpoint("grpc", facts(sequence=False, decoupled=True), streaming=False))
    connection.submit(1)
    connection.flush()
    body = response() * 4
    frames = b"".join(frame(0, 0, 1, body[start : start + 900]) for start in range(0, len(body), 900))
    stream = HEAD + frames + END
    for start in range(0, len(stream), cut):
        sock.incoming.append(stream[start : start + cut])
        connection.on_readable()
    assert (len(told.notes["first"]), len(told.notes["between"]), len(told.good)) == (1, 3, 1)
    assert 0 < told.notes["first"][0] <= told.good[0]
    assert sum(told.notes["between"]) + told.notes["first"][0] <= told.good[0]
    assert connection.in_flight == 0


def test_an_error_within_a_stream_is_an_error_though_the_call_ends_well():
    sock, told, connection = opened(endpoint("grpc", facts(sequence=False, decoupled=True), streaming=False))
    connection.submit(1)
    connection.flush()
    sock.incoming.append(HEAD + frame(0, 0, 1, response() + response("the model is on fire")) + END)
    connection.on_readable()
    assert (told.good, told.bad) == ([], ["the model is on fire"])


def test_a_stream_without_a_response_ends_well():
    sock, told, connection = opened(endpoint("grpc", facts(sequence=False, decoupled=True), streaming=False))
    connection.submit(1)
    connection.flush()
    sock.incoming.append(HEAD + END)
    connection.on_readable()
    assert (len(told.good), dict(told.notes)) == (1, {})


def test_a_live_sequence_has_one_request_open():
    end = endpoint("grpc", sequence_length="2")
    sock, told, connection = opened(end, lanes=2)
    assert connection.free_slots() == 2
    connection.submit(2)
    connection.flush()
    assert connection.free_slots() == 0
    answers = [frame(1, 4, n, block((":status", "200"))) + frame(1, 5, n, block(("grpc-status", "0"))) for n in (1, 3)]
    sock.incoming.append(answers[1])
    connection.on_readable()
    assert (connection.free_slots(), len(told.good), told.notes["sequence"]) == (1, 1, [])
    connection.submit(1)
    connection.flush()
    sock.incoming.append(answers[1].replace(b"\0\0\0\3", b"\0\0\0\5"))
    connection.on_readable()
    assert len(told.notes["sequence"]) == 1
    assert told.notes["sequence"][0] > sum(told.good) - told.good[0]
    # The other sequence is still open: at the end of the load its last request is sent.
    sock.incoming.append(answers[0])
    connection.on_readable()
    assert connection.end_sequences() == 1
    assert connection.end_sequences() == 0


def test_a_failed_request_gives_its_lane_back_for_another_sequence():
    end = endpoint("grpc", sequence_length="5")
    sock, told, connection = opened(end, lanes=1)
    connection.submit(1)
    connection.flush()
    sock.incoming.append(frame(1, 5, 1, block((":status", "200"), ("grpc-status", "3"), ("grpc-message", "no"))))
    connection.on_readable()
    assert told.bad == ["INVALID_ARGUMENT: no"]
    assert (connection.free_slots(), connection.end_sequences()) == (1, 0)


def marked(*, final, outputs=True, error=""):
    """Return a response as Triton sends it to a request with a mark of the final one."""
    message = service_pb2.ModelStreamInferResponse(error_message=error)
    message.infer_response.parameters["note"].string_param = "n" * 500
    message.infer_response.parameters["triton_final_response"].bool_param = final
    if outputs:
        message.infer_response.outputs.add(name="y", datatype="FP32", shape=[1])
        message.infer_response.raw_output_contents.append(bytes(1000))
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def sent_frames(sock):
    """Return kind, flags and stream of each frame sent since the last call."""
    data = bytes(sock.sent).removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    sock.sent.clear()
    found = []
    while data:
        size, kind, flags, number = int.from_bytes(data[:3], "big"), data[3], data[4], int.from_bytes(data[5:9], "big")
        found.append((kind, flags, number, data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def kept(target=None, lanes=0, **changes):
    return opened(endpoint("grpc", target or facts(sequence=False, decoupled=True), **changes), lanes)


@pytest.mark.parametrize("cut", [1, 7, 900, 10_000])
def test_a_stream_carries_one_request_after_another(cut):
    sock, told, connection = kept()
    sent_frames(sock)
    for turn in range(3):
        connection.submit(1)
        connection.flush()
        frames = sent_frames(sock)
        assert [(kind, flags, number) for kind, flags, number, _ in frames] == [(1, 4, 1), (0, 0, 1)][turn > 0 :]
        request = service_pb2.ModelInferRequest.FromString(frames[-1][3][5:])
        assert request.parameters["triton_enable_empty_final_response"].bool_param
        body = marked(final=False) * 2 + marked(final=True, outputs=False)
        stream = HEAD * (turn == 0) + frame(0, 0, 1, body)
        for start in range(0, len(stream), cut):
            sock.incoming.append(stream[start : start + cut])
            connection.on_readable()
        assert (connection.in_flight, len(told.good)) == (0, turn + 1)
    # The empty final response ends the request, and is not counted as a response.
    assert (len(told.notes["first"]), len(told.notes["between"]), told.bad) == (3, 3, [])
    assert connection.end_streams() == 1
    assert [row[:3] for row in sent_frames(sock)] == [(0, 1, 1)]
    assert connection.end_streams() == 1  # the server has not ended it yet, and is asked once
    sock.incoming.append(END)
    connection.on_readable()
    assert (connection.end_streams(), sent_frames(sock), told.bad) == (0, [], [])


def test_a_live_sequence_keeps_its_stream():
    sock, told, connection = kept(facts(), lanes=2, sequence_length="2", streaming=True)
    connection.submit(2)
    connection.flush()
    sock.incoming.append(frame(0, 0, 3, response()))  # of a model with one response, so without a mark
    connection.on_readable()
    sent_frames(sock)
    connection.submit(1)
    connection.flush()
    assert [row[:3] for row in sent_frames(sock)] == [(0, 0, 3)]
    sock.incoming.append(frame(0, 0, 3, response()))
    connection.on_readable()
    assert (len(told.good), len(told.notes["sequence"]), told.notes["first"]) == (2, 1, [])


def test_an_error_leaves_the_stream_open_for_the_next_request():
    sock, told, connection = kept()
    for error in (marked(final=True, outputs=False, error="no"), response("no")):
        connection.submit(1)
        connection.flush()
        sock.incoming.append(frame(0, 0, 1, error))
        connection.on_readable()
    assert (told.bad, connection.in_flight, connection.end_streams()) == (["no", "no"], 0, 1)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (END, "the server ended the stream before the final response"),
        (frame(1, 5, 1, block(("grpc-status", "14"), ("grpc-message", "gone"))), "UNAVAILABLE: gone"),
        (frame(3, 0, 1, struct.pack(">I", 2)), "the server reset the stream: INTERNAL_ERROR"),
        (frame(0, 0, 1, response()), "the server does not mark final responses: send each request as a call"),
    ],
)
def test_a_stream_that_ends_or_lacks_the_mark_is_an_error_and_another_is_opened(answer, problem):
    sock, told, connection = kept()
    connection.submit(1)
    connection.flush()
    sock.incoming.append(HEAD + answer)
    connection.on_readable()
    assert (len(told.bad), told.good, connection.in_flight) == (1, [], 0)
    assert told.bad[0].startswith(problem)
    if "mark" not in problem:
        sent_frames(sock)
        connection.submit(1)
        connection.flush()
        assert [row[0:3:2] for row in sent_frames(sock)] == [(1, 3), (0, 3)]


def test_a_response_that_nobody_asked_for_resets_its_stream():
    sock, told, connection = kept()
    connection.submit(1)
    connection.flush()
    sent_frames(sock)
    sock.incoming.append(HEAD + frame(0, 0, 1, marked(final=True) + marked(final=True)[:20]))
    connection.on_readable()
    assert [row[:3] for row in sent_frames(sock)] == [(3, 0, 1)]
    assert (len(told.good), told.bad, connection.end_streams()) == (1, [], 0)


def test_a_request_larger_than_a_streams_window_goes_on_when_the_server_has_read():
    wide = (InputFacts("x", "FP32", (30_000,)),)
    sock, told, connection = kept(facts(sequence=False, decoupled=True, inputs=wide))
    connection.submit(1)
    connection.flush()
    sent = [row for row in sent_frames(sock) if row[0] == 0]
    assert sum(len(row[3]) for row in sent) == 65_535
    sock.incoming.append(frame(8, 0, 0, struct.pack(">I", 1 << 20)) + frame(8, 0, 1, struct.pack(">I", 60_000)))
    connection.on_readable()
    sent += sent_frames(sock)
    assert sum(len(row[3]) for row in sent) > 120_000
    assert {row[1] for row in sent} == {0}
    sock.incoming.append(HEAD + frame(0, 0, 1, marked(final=True)))
    connection.on_readable()
    connection.submit(1)
    connection.flush()
    # The rest of the stream's window limits the next request.
    assert sum(len(row[3]) for row in sent_frames(sock)) == 65_535 + 60_000 - sum(len(row[3]) for row in sent)
    assert told.bad == []
