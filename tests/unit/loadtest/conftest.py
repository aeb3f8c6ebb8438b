"""Scripted servers with faults at chosen moments, impossible to get from a real Triton."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hpack import Decoder, Encoder
from support.waiting import eventually

from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.worker.generator import Generator
from repo_manager.loadtest.worker.recorder import Recorder, Slice
from repo_manager.loadtest.worker.schedule import Job, Schedule
from repo_manager.tls import TlsFiles

ANSWER = b'{"model_name":"m","model_version":"1","outputs":[]}'
NONSENSE = {
    "empty": b"",
    "page": b"<html><body>Please log in</body></html>",
    "error at 200": b'{"error":"the model is on fire"}',
    "as long as an answer": b"x" * len(ANSWER),
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Scripted:
    """A TCP server with one thread a connection. `action(n)` decides about the n-th request of the server."""

    def __init__(self, action: Callable[[int], str], tls: ssl.SSLContext | None = None) -> None:
        self.action = action
        self.tls = tls
        self.requests = 0
        self.connections = 0
        self.bodies: list[bytes] = []
        self.answered_ns: list[int] = []  # over HTTP
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.append(sock)
            self._spawn(self._guarded, sock)

    def _guarded(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            if self.tls is None:
                self.serve(sock)
                return
            with self.tls.wrap_socket(sock, server_side=True) as encrypted:
                self.serve(encrypted)

    def serve(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def take(self, body: bytes) -> str:
        with self._lock:
            self.requests += 1
            number = self.requests
        if len(self.bodies) < 100:
            self.bodies.append(body)
        return self.action(number)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


class ScriptedHttp(Scripted):
    def serve(self, sock: socket.socket) -> None:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                more = sock.recv(65536)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            size = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            while len(data) < size:
                data += sock.recv(65536)
            body, data = data[:size], data[size:]
            action = self.take(body)
            if action == "ignore":
                continue
            if action == "close":
                return
            if action.startswith("stall:"):
                time.sleep(float(action[6:]))
            self.answered_ns.append(time.monotonic_ns())
            if action == "error":
                answer = b'{"error":"the model is on fire"}'
                sock.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
            elif action == "split":
                head = (b"HTTP/1.1 200 OK\r\nConte", b"nt-Length: %d\r\n\r" % len(ANSWER))
                for piece in (*head, b"\n" + ANSWER[:2], ANSWER[2:]):
                    sock.sendall(piece)
                    time.sleep(0.005)
            elif action == "goodbye":
                sock.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER
                )
                return
            elif action == "large":
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + ANSWER.ljust(3_000_000))
            elif action == "cut":
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + ANSWER.ljust(1_000_000))
                return
            elif action == "chunked":
                head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                sock.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(ANSWER), ANSWER))
            elif action == "chunked error":
                head = b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n14;x=1\r"
                body = (b'\n{"error":"the mod', b"el", b" \r\n0a\r\nis on fire", b'\r\n2\r\n"}\r\n0\r\nX: y\r\n\r\n')
                for piece in (head, *body):
                    sock.sendall(piece)
                    time.sleep(0.002)
            elif action == "bad chunk":
                sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n")
            elif action == "untold":
                sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nok")
            else:
                body = NONSENSE.get(action, ANSWER)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class ScriptedGrpc(Scripted):
    def __init__(
        self,
        action: Callable[[int], str],
        settings: dict[int, int],
        credit_bytes: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.settings = settings
        self.credit_bytes = credit_bytes
        self.headers: list[dict[str, str]] = []
        self.resets: list[int] = []
        self.pongs: list[bytes] = []
        self.largest_frame = 0
        self.protocol_errors: list[str] = []
        super().__init__(action, tls)

    def _exactly(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = sock.recv(size - len(data))
            if not more:
                raise ConnectionError
            data += more
        return data

    def serve(self, sock: socket.socket) -> None:
        assert self._exactly(sock, len(PREFACE)) == PREFACE
        payload = b"".join(struct.pack(">HI", key, value) for key, value in self.settings.items())
        sock.sendall(frame(4, 0, 0, payload) + frame(6, 0, 0, b"pingpong"))
        decoder, encoder = Decoder(), Encoder()
        bodies: dict[int, bytes] = {}
        window, stream_window = 65535, self.settings.get(4, 65535)
        left: dict[int, int] = {}
        while True:
            head = self._exactly(sock, 9)
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            stream = int.from_bytes(head[5:], "big")
            payload = self._exactly(sock, size)
            if kind == 1:
                self.headers.append({str(name): str(value) for name, value in decoder.decode(payload)})
                bodies[stream], left[stream] = b"", stream_window
            elif kind == 0:
                self.largest_frame = max(self.largest_frame, size)
                window, left[stream] = window - size, left[stream] - size
                if window < 0 or left[stream] < 0:
                    self.protocol_errors.append(f"flow control: connection {window}, stream {left[stream]}")
                bodies[stream] += payload
                if not flags & 1:
                    grant = self.credit_bytes
                    sock.sendall(
                        frame(8, 0, 0, struct.pack(">I", grant)) + frame(8, 0, stream, struct.pack(">I", grant))
                    )
                    window, left[stream] = window + grant, left[stream] + grant
                else:
                    grant = max(65535 - window, 0)
                    if grant:
                        sock.sendall(frame(8, 0, 0, struct.pack(">I", grant)))
                        window += grant
                    if not self._answer(sock, encoder, stream, self.take(bodies.pop(stream)[5:])):
                        return
            elif kind == 3:
                self.resets.append(stream)
            elif kind == 6 and flags & 1:
                self.pongs.append(payload)

    def _answer(self, sock: socket.socket, encoder: Encoder, stream: int, action: str) -> bool:
        def block(*fields: tuple[str, str]) -> bytes:
            return encoder.encode(list(fields))

        initial = ((":status", "200"), ("content-type", "application/grpc"))
        if action == "ignore":
            return True
        if action == "close":
            return False
        if action == "reset":
            sock.sendall(frame(3, 0, stream, struct.pack(">I", 7)))
        elif action == "goaway":
            sock.sendall(frame(7, 0, 0, struct.pack(">II", stream, 0) + b"max_age"))
            sock.sendall(frame(1, 4, stream, block(*initial)) + frame(0, 0, stream, b"\0\0\0\0\0"))
            sock.sendall(frame(1, 5, stream, block(("grpc-status", "0"))))
            return False
        elif action == "refuse":
            sock.sendall(frame(7, 0, 0, struct.pack(">II", stream - 2, 0) + b"bye"))
            return False
        elif action == "error":
            fields = (*initial, ("grpc-status", "14"), ("grpc-message", "the model is %22down%22"))
            sock.sendall(frame(1, 5, stream, block(*fields)))
        elif action == "large":
            sock.sendall(frame(1, 4, stream, block(*initial)))
            data = frame(0, 0, stream, bytes(16_384)) * 60
            for start in range(0, len(data), 50_001):  # cuts within heads and within payloads
                sock.sendall(data[start : start + 50_001])
            sock.sendall(frame(1, 5, stream, block(("grpc-status", "0"))))
        elif action == "proxy":
            sock.sendall(frame(1, 5, stream, block((":status", "502"), ("server", "nginx"))))
        else:
            sock.sendall(frame(1, 4, stream, block(*initial)) + frame(0, 0, stream, b"\0\0\0\0\2ok"))
            sock.sendall(frame(1, 5, stream, block(("grpc-status", "0"))))
        return True


@pytest.fixture
def http_server() -> Iterator[Callable[..., ScriptedHttp]]:
    servers: list[ScriptedHttp] = []

    def start(action: Callable[[int], str], tls: ssl.SSLContext | None = None) -> ScriptedHttp:
        servers.append(ScriptedHttp(action, tls))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def grpc_server() -> Iterator[Callable[..., ScriptedGrpc]]:
    servers: list[ScriptedGrpc] = []

    def start(
        action: Callable[[int], str],
        settings: dict[int, int] | None = None,
        credit_bytes: int = 65535,
        tls: ssl.SSLContext | None = None,
    ) -> ScriptedGrpc:
        servers.append(ScriptedGrpc(action, settings or {}, credit_bytes, tls))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Load:
    """Runs a generator in this process against a scripted server."""

    def __init__(
        self, protocol: str, port: int, messages: tuple[bytes, ...], timeout_s: float, tls: TlsFiles | None = None
    ) -> None:
        self.protocol = protocol
        self.endpoint = Endpoint(
            "127.0.0.1",
            port,
            f"127.0.0.1:{port}",
            "/p",
            (),
            messages,
            (0,) * len(messages),
            round(timeout_s * 1e9),
            protocol,
            tls,
        )

    def run(
        self,
        seconds: float,
        *,
        slots: int = 1,
        schedule: Schedule | None = None,
        connections: int = 1,
        ended: int = 0,
        watch: Callable[[Generator], None] = lambda generator: None,
    ) -> Slice:
        """Load for `seconds`, and on until `ended` requests have ended: longer on a busy machine."""
        slices: list[Slice] = []

        def take(piece: Slice) -> None:
            watch(generator)
            slices.append(piece)

        recorder = Recorder(50_000_000, take)
        ours, theirs = socket.socketpair()
        job = Job(self.protocol, self.endpoint, slots, connections, schedule, 0, 1, 50_000_000, 1000)
        with ours, theirs:

            def stop() -> None:
                theirs.recv(1)
                generator.stopping = True

            generator = Generator(job, recorder, (theirs.fileno(), stop))
            generator.open()

            def end() -> None:
                eventually(lambda: sum(s.latencies.count + s.errors for s in [*slices]) >= ended, 60.0)
                ours.send(b"x")

            timer = threading.Timer(seconds, end)
            timer.start()
            self.start_ns = time.monotonic_ns()
            generator.run(self.start_ns)
            timer.cancel()
            timer.join()
        return Slice.merge(slices)


@pytest.fixture
def load() -> Callable[..., Load]:
    def make(
        protocol: str,
        port: int,
        messages: tuple[bytes, ...] = (b"hello",),
        timeout_s: float = 5.0,
        tls: TlsFiles | None = None,
    ) -> Load:
        return Load(protocol, port, messages, timeout_s, tls)

    return make
