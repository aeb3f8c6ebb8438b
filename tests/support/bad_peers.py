"""Misbehaving servers: the bytes of a broken, overloaded or hostile peer in place of an answer.

`BadPeer` listens and treats each connection in one manner. A manner is a function of the connection: it reads and sends
until it returns, the peer hangs up, or the server is closed. `ANSWERS` are wrong contents, not manners of a socket:
`AnsweringPeer`, a well-behaved HTTP server, sends them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from repo_manager.loadtest.wire.http2 import DATA, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, frame

__all__ = [
    "ANSWERS",
    "GRPC_MANNERS",
    "HANGS",
    "HTTP_MANNERS",
    "MANNERS",
    "STORE_ANSWERS",
    "AnsweringPeer",
    "BadPeer",
    "triton_answers",
]

_DRIP_S = 0.15
_BLOCK = b"x" * 65_536
_CONTINUATION = 9


class Line:
    """One connection, as a manner sees it."""

    def __init__(self, sock: socket.socket, closing: threading.Event) -> None:
        self.sock, self.closing = sock, closing

    def read_request(self) -> None:
        """Read until the end of a request's header, or until the data end."""
        got = b""
        while b"\r\n\r\n" not in got and (piece := self.sock.recv(65_536)):
            got += piece

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes) -> None:
        """Send a byte at a time, again and again."""
        while True:
            for byte in data:
                self.send(bytes((byte,)))
                if self.closing.wait(_DRIP_S):
                    return

    def flood(self, data: bytes) -> None:
        """Send the same for ever, as fast as it goes."""
        while not self.closing.is_set():
            self.send(data)

    def wait(self) -> None:
        """Keep the connection open and say nothing."""
        self.closing.wait()

    def reset(self) -> None:
        """Close by RST in place of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Manner = Callable[[Line], None]


def _after(text: bytes, then: Callable[[Line], None]) -> Manner:
    """Read the request, send `text`, and then go on."""

    def manner(line: Line) -> None:
        line.read_request()
        line.send(text)
        then(line)

    return manner


def _end(_: Line) -> None:
    """Close at once."""


def _half_closed(line: Line) -> None:
    line.sock.shutdown(socket.SHUT_WR)
    line.wait()


_OK = b"HTTP/1.1 200 OK\r\n"

HTTP_MANNERS: dict[str, Manner] = {
    "accepts-only": Line.wait,
    "never-answers": _after(b"", Line.wait),
    "drips-status": _after(b"", lambda line: line.drip(b"HTTP/1.1 200 OK" + b"x" * 9000)),
    "drips-headers": _after(_OK, lambda line: line.drip(b"X-A: b\r\n")),
    "drips-body": _after(_OK + b"Content-Length: 9999\r\n\r\n", lambda line: line.drip(b"[")),
    "endless-status": _after(b"HTTP/1.1 200 ", lambda line: line.flood(_BLOCK)),
    "endless-header": _after(_OK + b"X-A: ", lambda line: line.flood(_BLOCK)),
    "endless-headers": _after(_OK, lambda line: line.flood(b"X-A: b\r\n" * 1000)),
    "endless-continue": _after(b"", lambda line: line.flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)),
    "endless-body": _after(_OK + b"\r\n", lambda line: line.flood(_BLOCK)),
    "endless-chunks": _after(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n", lambda line: line.flood(b"10000\r\n" + _BLOCK + b"\r\n")
    ),
    "endless-error": _after(b"HTTP/1.1 500 No\r\n\r\n", lambda line: line.flood(_BLOCK)),
    "endless-trailers": _after(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", lambda line: line.flood(b"X-A: b\r\n" * 1000)
    ),
    "huge-length": _after(_OK + b"Content-Length: 99999999999999\r\n\r\n[", lambda line: line.flood(_BLOCK)),
    "huge-length-then-silence": _after(_OK + b"Content-Length: 99999999999999\r\n\r\n[", Line.wait),
    "length-not-reached": _after(_OK + b"Content-Length: 100\r\n\r\n[]", _end),
    "negative-length": _after(_OK + b"Content-Length: -5\r\n\r\n[]", _end),
    "two-lengths": _after(_OK + b"Content-Length: 2\r\nContent-Length: x\r\n\r\n[]", _end),
    "bad-chunk": _after(_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n", _end),
    "huge-chunk": _after(
        _OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", lambda line: line.flood(_BLOCK)
    ),
    "odd-status": _after(b"HTTP/1.1 99999 Odd\r\n\r\n", _end),
    "odd-version": _after(b"HTTP/7.3 200 OK\r\nContent-Length: 2\r\n\r\n{}", _end),
    "garbage": _after(bytes(range(256)) * 8, _end),
    "grpc-on-http": _after(frame(SETTINGS, 0, 0, b""), Line.wait),
    "closes-at-once": _end,
    "resets-at-once": Line.reset,
    "resets-in-body": _after(_OK + b"Content-Length: 100\r\n\r\n[", Line.reset),
    "half-closed": _half_closed,
    "redirects-to-itself": _after(b"HTTP/1.1 307 Go\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n", _end),
    "gzip": _after(_OK + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b" + b"\xff" * 18, _end),
}
"""Manners of a server for HTTP clients, encrypted or not: name -> manner."""

_SERVES = frame(SETTINGS, 0, 0, b"")
_HUGE_MESSAGE = struct.pack(">BI", 0, 0xFFFFFFFF)
_GOOD_HEAD = frame(HEADERS, 0x4, 1, b"\x88\x0f\x10\x10application/grpc")

GRPC_MANNERS: dict[str, Manner] = {
    "accepts-only": Line.wait,
    "settings-then-silence": _after(_SERVES, Line.wait),
    "drips-settings": _after(b"", lambda line: line.drip(_SERVES)),
    "endless-settings": _after(b"", lambda line: line.flood(_SERVES * 1000)),
    "endless-pings": _after(_SERVES, lambda line: line.flood(frame(PING, 0, 0, b"12345678") * 1000)),
    "endless-headers": _after(
        _SERVES + frame(HEADERS, 0, 1, b"\x88"),
        lambda line: line.flood(frame(_CONTINUATION, 0, 1, b"\x00\x03x-a\x01b" * 1000)),
    ),
    "endless-message": _after(
        _SERVES + _GOOD_HEAD + frame(DATA, 0, 1, _HUGE_MESSAGE),
        lambda line: line.flood(frame(DATA, 0, 1, b"x" * 16_384)),
    ),
    "huge-frame": _after(_SERVES + b"\xff\xff\xff\x01\x04\0\0\0\x01", lambda line: line.flood(_BLOCK)),
    "garbage": _after(bytes(range(256)) * 8, _end),
    "http-on-grpc": _after(_OK + b"Content-Length: 2\r\n\r\n{}", Line.wait),
    "goes-away": _after(_SERVES + frame(GOAWAY, 0, 0, bytes(8) + b"leave me alone"), _end),
    "resets-streams": _after(
        _SERVES + b"".join(frame(RST_STREAM, 0, number, b"\0\0\0\x02") for number in range(1, 40, 2)), Line.wait
    ),
    "bad-hpack": _after(_SERVES + frame(HEADERS, 0x5, 1, b"\xff\xff\xff\xff\xff"), Line.wait),
    "answers-nonsense": _after(
        _SERVES
        + _GOOD_HEAD
        + frame(DATA, 0, 1, struct.pack(">BI", 0, 4) + b"\xff\xff\xff\xff")
        + frame(HEADERS, 0x5, 1, b"\x00\x0bgrpc-status\x010"),
        Line.wait,
    ),
    "closes-at-once": _end,
    "resets-at-once": Line.reset,
    "half-closed": _half_closed,
}
"""Manners of a server for gRPC clients: name -> manner."""

MANNERS = {**{f"http-{name}": each for name, each in HTTP_MANNERS.items()}} | {
    f"grpc-{name}": each for name, each in GRPC_MANNERS.items()
}


class BadPeer:
    """Listens on a free port of this machine and treats every connection in one manner."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> BadPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more, and let every connection end."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._treat, args=(sock,), daemon=True).start()

    def _treat(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._manner(Line(sock, self._closing))


def triton_answers(model: str, inputs: list[Any], outputs: list[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers of a server with version 1 of a model: end of the path -> JSON, or bytes."""
    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "/v2": {"name": "triton", "version": "2.51.0", "extensions": []},
        "/index": [{"name": model, "version": "1", "state": "READY", "reason": ""}],
        "/config": dict(config),
        "/stats": {
            "model_stats": [
                {
                    "name": model,
                    "version": "1",
                    "inference_stats": {stage: {"count": 1, "ns": 1} for stage in stages},
                    "batch_stats": [],
                }
            ]
        },
        "/infer": {"model_name": model, "model_version": "1", "outputs": []},
        "/load": {},
        "/unload": {},
        "/status": [],
        "/live": b"",
        "/ready": b"",
        f"/{model}": {"name": model, "versions": ["1"], "platform": "x", "inputs": inputs, "outputs": outputs},
        "/versions/1": {"name": model, "versions": ["1"], "platform": "x", "inputs": inputs, "outputs": outputs},
    }


def _infer(output: Mapping[str, Any], data: bytes = b"", *, size: int | None = None, length: object = None) -> Any:
    """Return an answer of /infer whose output is raw data: (JSON, data, value of the length header)."""
    parameters = {"binary_data_size": len(data) if size is None else size}
    told = {"model_name": "m", "model_version": "1", "outputs": [{**output, "parameters": parameters}]}
    head = json.dumps(told).encode()
    return (head + data, len(head) if length is None else length)


HANGS = object()
"""In place of an answer: none ever comes."""
_SCORES = {"name": "logits", "datatype": "FP32", "shape": [1, 10]}

ANSWERS: dict[str, Mapping[str, Any]] = {
    "null": {"": None},
    "text": {"": "hello"},
    "number": {"": 7},
    "list": {"": [1, [2], None]},
    "empty-object": {"": {}},
    "no-json": {"": b"<html>no</html>"},
    "not-utf-8": {"": b'{"name": "\xff\xfe"}'},
    "deep": {"": b"[" * 200_000},
    "deep-objects": {"": b'{"a":' * 50_000 + b"1" + b"}" * 50_000},
    "huge-number": {"": b"9" * 100_000},
    "index-of-nulls": {"/index": [None, 1, "x"]},
    "index-with-wrong-types": {"/index": [{"name": 5, "version": {}, "state": [], "reason": 3}]},
    "index-with-odd-version": {"/index": [{"name": "digits", "version": "newest", "state": "READY"}]},
    "index-with-huge-version": {"/index": [{"name": "digits", "version": "9" * 5000, "state": "READY"}]},
    "index-with-negative-version": {"/index": [{"name": "digits", "version": "-1", "state": "READY"}]},
    "index-is-object": {"/index": {"name": "digits"}},
    "config-null": {"/config": None},
    "config-wrong-types": {"/config": {"name": 5, "max_batch_size": "many", "input": {"dims": [None]}}},
    "config-of-another": {"/config": {"name": "else", "max_batch_size": -7, "input": [{"name": "q", "dims": ["-9"]}]}},
    "metadata-null": {"/digits": None, "/versions/1": None},
    "metadata-wrong-types": {
        "/digits": {"name": 1, "versions": 7, "inputs": "none", "outputs": None},
        "/versions/1": {"name": 1, "versions": 7, "inputs": "none", "outputs": None},
    },
    "metadata-odd-shapes": {
        path: {
            "name": "digits",
            "versions": ["x", None],
            "inputs": [{"name": "image", "datatype": "FP99", "shape": [10**30, -5, None]}],
            "outputs": [{}],
        }
        for path in ("/digits", "/versions/1")
    },
    "metadata-huge-shapes": {
        path: {
            "name": "digits",
            "versions": ["1"],
            "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1 << 20, 1 << 20]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
        }
        for path in ("/digits", "/versions/1")
    },
    "statistics-null": {"/stats": None},
    "statistics-wrong-types": {"/stats": {"model_stats": [{"name": "digits", "version": "1", "inference_stats": 5}]}},
    "statistics-negative": {
        "/stats": {"model_stats": [{"name": "digits", "version": "-1", "inference_count": "NaN", "batch_stats": 5}]}
    },
    "infer-null": {"/infer": None},
    "infer-without-outputs": {"/infer": {}},
    "infer-wrong-types": {"/infer": {"outputs": [{"name": "logits", "datatype": 5, "shape": "x", "data": {}}]}},
    "infer-short-data": {"/infer": _infer(_SCORES, b"\0" * 7)},
    "infer-declares-more": {"/infer": _infer(_SCORES, b"\0" * 40, size=1 << 40)},
    "infer-declares-negative": {"/infer": _infer(_SCORES, b"\0" * 40, size=-40)},
    "infer-huge-shape": {"/infer": _infer({**_SCORES, "shape": [1 << 40, 1 << 40]}, b"\0" * 40)},
    "infer-huge-text": {"/infer": _infer({**_SCORES, "datatype": "BYTES"}, b"\xff\xff\xff\x7f" + b"x" * 36)},
    "infer-header-too-long": {"/infer": _infer(_SCORES, b"\0" * 40, length=1 << 30)},
    "infer-header-not-a-number": {"/infer": _infer(_SCORES, b"\0" * 40, length="many")},
    "infer-other-type": {"/infer": _infer({**_SCORES, "datatype": "FP99"}, b"\0" * 40)},
    "infer-not-a-number": {"/infer": _infer(_SCORES, b"\xff" * 40)},
    "liveness-huge": {"/live": b"x" * 1_000_000, "/ready": b"x" * 1_000_000},
}
"""Wrong contents: name -> (end of the path -> JSON, bytes, or bytes with their header length); `""` is every path."""


_LISTED = "<Key>models/m/1/model.onnx</Key><Size>%s</Size><ETag>e</ETag><LastModified>%s</LastModified>"
_NOW = "2026-01-01T00:00:00.000Z"


def _listing(inside: str) -> bytes:
    return f'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name>{inside}</ListBucketResult>'.encode()


STORE_ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "json": b'{"a": null}',
    "not-xml": b"<ListBucketResult><Contents>",
    "deep-xml": b"<a>" * 100_000,
    "entities": b'<!DOCTYPE a [<!ENTITY b "&c;&c;&c;"><!ENTITY c "&b;&b;">]><ListBucketResult>&b;</ListBucketResult>',
    "not-utf-8": b"<ListBucketResult><Name>\xff\xfe</Name></ListBucketResult>",
    "negative-size": _listing(f"<Contents>{_LISTED % (-1, _NOW)}</Contents>"),
    "huge-size": _listing(f"<Contents>{_LISTED % (10**30, _NOW)}</Contents>"),
    "no-time": _listing(f"<Contents>{_LISTED % (1, 'yesterday')}</Contents>"),
    "empty-keys": _listing("<Contents><Key></Key><Size>1</Size></Contents>"),
    "dots": _listing("<CommonPrefixes><Prefix>models/../../etc/</Prefix></CommonPrefixes>"),
    "endless-pages": _listing("<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"),
    "folders-in-folders": _listing("<CommonPrefixes><Prefix>models/m/</Prefix></CommonPrefixes>"),
}
"""Wrong bodies a store may answer to every request: name -> body."""


API_ANSWERS: dict[str, Any] = {
    "null": None,
    "number": 7,
    "list": [None, 1],
    "empty": {},
    "deep": b"[" * 100_000,
    "items-null": {"kind": "DeploymentList", "items": None},
    "items-of-nulls": {"kind": "DeploymentList", "items": [None, 5, "x"]},
    "item-without-anything": {"kind": "DeploymentList", "metadata": {}, "items": [{}]},
    "wrong-types": {
        "kind": "DeploymentList",
        "items": [{"metadata": {"name": 5, "labels": []}, "spec": {"template": 7, "replicas": "many"}}],
    },
    "no-containers": {
        "kind": "DeploymentList",
        "metadata": {},
        "items": [{"metadata": {"name": "a"}, "spec": {"template": {"spec": {"containers": []}}}, "status": {}}],
    },
    "endless-pages": {"kind": "DeploymentList", "metadata": {"continue": "x"}, "items": []},
    "status-without-fields": {"kind": "Status"},
    "service": {"metadata": {"name": "digits"}, "spec": {"predictor": None}, "status": 5},
    "service-of-nulls": {"metadata": None, "spec": {"predictor": {"model": None}}, "status": None},
}
"""Wrong documents an API server may answer to every request: name -> JSON."""


class AnsweringPeer(BadPeer):
    """An HTTP server with given answers: end of the path -> content."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = sorted(answers.items(), key=lambda pair: -len(pair[0]))
        super().__init__(self._serve)

    def _serve(self, line: Line) -> None:
        reader = line.sock.makefile("rb")
        while first := reader.readline(65_536):
            if not first.endswith(b" HTTP/1.1\r\n"):
                return  # a greeting in TLS, for instance
            path = first.split()[1].decode().partition("?")[0]
            headers = dict(_headers(reader))
            reader.read(int(headers.get("content-length", 0)))
            found = next((told for end, told in self._answers if path.endswith(end)), None)
            if found is HANGS:
                line.wait()
                return
            extra = ""
            if isinstance(found, tuple):
                found, length = found
                extra = f"Inference-Header-Content-Length: {length}\r\n"
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            line.send(f"HTTP/1.1 200 OK\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def _headers(reader: Any) -> Iterator[tuple[str, str]]:
    while (text := reader.readline(65_536).strip()) != b"":
        name, _, value = text.partition(b":")
        yield name.decode().lower(), value.decode().strip()
