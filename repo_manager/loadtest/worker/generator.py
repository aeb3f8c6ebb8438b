"""The load loop of one worker: connections, one epoll, a closed or an open loop, a recorder."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from repo_manager.errors import ServerUnreachableError
from repo_manager.loadtest.wire.connection import Connection, Socket, open_sockets
from repo_manager.loadtest.wire.grpc import GrpcConnection
from repo_manager.loadtest.wire.http import HttpConnection
from repo_manager.loadtest.wire.kept import KeptGrpcConnection
from repo_manager.loadtest.wire.sequences import Lane, Lanes
from repo_manager.loadtest.wire.tracked import TrackedGrpcConnection
from repo_manager.loadtest.worker.priority import SendPriority
from repo_manager.loadtest.worker.recorder import LATE_NS, Recorder
from repo_manager.loadtest.worker.schedule import Job, Schedule

__all__ = ["Generator"]

_READY_TIMEOUT_S = 20.0
_RECONNECT_NS = 100_000_000
_APART_NS = 2_000_000  # between two pairs of connections of a closed loop over HTTP
_OPENING_NS = 200_000_000  # after this time, the remaining connections open at once
_MAX_CONNECTIONS = 512
_MOST_EVENTS = 64  # each poll allocates and frees memory for this many events
_READABLE, _WRITABLE = select.EPOLLIN, select.EPOLLOUT
_ABANDON_NS = 2_000_000_000
_HOUSEKEEPING_NS = 20_000_000
_QUIET_NS = 1_500_000  # time to the next request in which a slice can be counted and handed on


class Generator:
    """Runs a `Job`. `open`, then `run` until `stop` is set and the last answers came.

    Args:
        job: share of the load, and the requests.
        recorder: counts the results of requests.
        control: file descriptor to watch, and the function to call when it is readable.
    """

    def __init__(self, job: Job, recorder: Recorder, control: tuple[int, Callable[[], None]]) -> None:
        self.stopping = False
        self.is_abandoned = False  # stop waiting for the last answers soon
        self._job = job
        self._recorder = recorder
        self._epoll = select.epoll()
        self._control_fd, self._on_control = control
        self._epoll.register(self._control_fd, select.EPOLLIN)
        self._connections: dict[int, GrpcConnection | HttpConnection] = {}
        self._idle: list[GrpcConnection | HttpConnection] = []
        self._backlog: list[int] = []
        self._retry_ns = 0
        self._is_closed = job.schedule is None
        self._in_flight = 0
        self._last_loss = ""
        plan = job.endpoint.sequences
        self._lanes = None if plan is None else Lanes(plan, job.worker, job.workers, job.seed)
        self._most_connections = min(job.sequences or _MAX_CONNECTIONS, _MAX_CONNECTIONS)

    def open(self) -> None:
        """Connect, and wait until the server took every connection.

        Raises:
            ServerUnreachableError: no connection could be made.
        """
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection. Tells nobody."""
        for connection in self._connections.values():
            connection.close()
        self._epoll.close()

    def _open(self) -> None:
        job = self._job
        count = job.connections if job.protocol == "grpc" else self._first_connections()
        self._connect(count)
        deadline = time.monotonic() + min(_READY_TIMEOUT_S, job.endpoint.timeout_ns / 1e9)
        while not all(connection.ready for connection in self._connections.values()):
            self._poll(0.05)
            if time.monotonic() > deadline or not self._connections:
                raise ServerUnreachableError(
                    f"{job.endpoint.host}:{job.endpoint.port} does not answer as a {job.protocol} server"
                    + (f": {self._last_loss}" if self._last_loss else ""),
                    hint="Check whether the port is of this protocol (Triton: 8000 HTTP, 8001 gRPC).",
                )

    def _first_connections(self) -> int:
        """Return how many HTTP connections are opened before the load. A closed loop: one, see `_open_in_pairs`."""
        if self._job.sequences:
            return self._most_connections
        return 1 if self._is_closed else min(max(self._job.slots, 1), _MAX_CONNECTIONS)

    def _connect(self, count: int = 1) -> list[GrpcConnection | HttpConnection]:
        return [self._connection(sock) for sock in open_sockets(self._job.endpoint, count)]

    def _connection(self, sock: Socket) -> GrpcConnection | HttpConnection:
        descriptor, epoll = sock.fileno(), self._epoll

        def want_write(wanted: bool) -> None:
            epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

        epoll.register(descriptor, select.EPOLLIN)
        connection = self._kind()(sock, self._job.endpoint, self, want_write)
        if self._lanes is not None:
            lanes = self._lanes
            count = -(-self._job.sequences // self._job.connections) if self._job.protocol == "grpc" else 1
            connection.take_lanes([Lane(lanes) for _ in range(count)])
        self._connections[descriptor] = connection
        return connection

    def _kind(self) -> type[GrpcConnection] | type[HttpConnection]:
        endpoint = self._job.endpoint
        if self._job.protocol == "http":
            return HttpConnection
        if endpoint.keeps_streams:
            return KeptGrpcConnection
        return TrackedGrpcConnection if endpoint.decoupled or endpoint.sequences is not None else GrpcConnection

    def run(self, start_ns: int) -> None:
        """Send from `start_ns` (monotonic clock) until told to stop, then wait for the last answers."""
        self._wait_until(start_ns)
        self._recorder.begin(start_ns)
        if self._job.schedule is None:
            self._run_closed()
        else:
            self._run_open(start_ns, self._job.schedule)
        self._drain()
        now_ns = time.monotonic_ns()
        self._recorder.roll(now_ns)
        self._recorder.finish(now_ns)
        self._recorder.hand_over()
        self.close()

    def _run_closed(self) -> None:
        if self._job.protocol == "http" and self._job.slots > 1 and self._connections and self._lanes is None:
            self._open_in_pairs()
        self._fill()
        slots, recorder = self._job.slots, self._recorder
        while not self.stopping:
            self._poll(0.02)
            self._housekeep()
            if recorder.kept_since_ns is not None:
                recorder.hand_over()
            if self._in_flight < slots:
                self._fill()

    def _open_in_pairs(self) -> None:
        """Open the HTTP connections of a closed loop two by two, with the open ones under load.

        A network thread of tritonserver takes a new connection when it has no other work. On an idle server, or when
        all connect at once, one thread often gets them all, and limits the throughput. Measured on 2 CPUs, 10 load
        tests each: one thread had all of 16 connections in 7 tests when they were opened at once, in 1 in pairs.
        """
        opened = list(self._connections.values())
        end_ns = time.monotonic_ns() + _OPENING_NS
        while opened and not self.stopping:
            for connection in opened:
                self._submit(connection, 1, None)
            next_ns = time.monotonic_ns() + _APART_NS
            self._wait_until(next_ns)
            is_over = self.stopping or next_ns > end_ns
            count = 0 if is_over else min(2, self._job.slots - self._in_flight)
            opened = self._replace_connections(count) if count > 0 else []

    def _fill(self) -> None:
        """Bring the closed loop back to its number of requests in flight."""
        missing = self._job.slots - self._in_flight
        connections = [c for c in self._connections.values() if c.free_slots() > 0]
        wanted = self._job.connections if self._job.protocol == "grpc" else missing
        if len(connections) < wanted:
            connections += self._replace_connections(wanted - len(connections))
        for place, connection in enumerate(connections):
            share = -(-missing // (len(connections) - place))
            count = min(share, connection.free_slots())
            if count > 0:
                self._submit(connection, count, None)
                missing -= count

    def _submit(self, connection: Connection, count: int, starts_ns: list[int] | None) -> None:
        self._in_flight += count
        connection.submit(count, starts_ns)
        connection.flush()

    def _replace_connections(self, count: int = 1) -> list[GrpcConnection | HttpConnection]:
        """Open connections in the place of lost ones, or the ones still missing. After a failure 0.1 s later."""
        now_ns = time.monotonic_ns()
        opening = sum(1 for connection in self._connections.values() if connection.usable and not connection.ready)
        count = min(count - opening, self._most_connections - len(self._connections))
        if now_ns < self._retry_ns or count < 1:
            return []
        try:
            connections = self._connect(count)
        except ServerUnreachableError as exc:
            self._retry_ns = now_ns + _RECONNECT_NS
            self._recorder.add_errors(1, exc.message, now_ns)
            return []
        return [connection for connection in connections if connection.ready]

    def _run_open(self, start_ns: int, schedule: Schedule) -> None:
        with SendPriority() as priority:
            self._send_on_schedule(start_ns, schedule, priority)

    def _send_on_schedule(self, start_ns: int, schedule: Schedule, priority: SendPriority) -> None:
        due_ns = self._due(start_ns, schedule)
        following = next(due_ns, None)
        self._idle = [c for c in self._connections.values() if c.free_slots() > 0]
        waited = [self._epoll]
        while not self.stopping:
            now_ns = time.monotonic_ns()
            batch: list[int] = []
            while following is not None and following <= now_ns:
                batch.append(following)
                following = next(due_ns, None)
            # Send first, then count: each step before a send adds to the next answer's latency.
            self._backlog += batch
            if self._backlog:
                self._send_backlog()
            if batch:
                self._note_lateness(batch, now_ns)
            if following is None and not self._backlog and not self._in_flight:
                break
            priority.check(now_ns)
            self._housekeep()
            self._hand_over_when_quiet(following)
            wait_ns = _HOUSEKEEPING_NS if following is None else following - time.monotonic_ns()
            # epoll waits in whole milliseconds, select in microseconds. select also accepts an epoll.
            if wait_ns <= 0 or select.select(waited, [], [], min(wait_ns, _HOUSEKEEPING_NS) / 1e9)[0]:
                self._poll(0)

    def _hand_over_when_quiet(self, following: int | None) -> None:
        """Hand ended slices on while no request is open or due, or when they have waited for as long as a slice."""
        since_ns = self._recorder.kept_since_ns
        if since_ns is None:
            return
        now_ns = time.monotonic_ns()
        is_quiet = not self._in_flight and (following is None or following - now_ns > _QUIET_NS)
        if is_quiet or now_ns - since_ns > self._recorder.slice_ns:
            self._recorder.hand_over()

    def _due(self, start_ns: int, schedule: Schedule) -> Iterator[int]:
        for chunk in schedule.share(self._job.worker, self._job.workers):
            moments: npt.NDArray[np.int64] = chunk + start_ns
            yield from moments.tolist()

    def _note_lateness(self, batch: list[int], now_ns: int) -> None:
        late = sum(1 for due in batch if now_ns - due > LATE_NS)
        self._recorder.add_sends(len(batch), late, max(now_ns - batch[0], 0))

    def _send_backlog(self) -> None:
        """Send the due requests, oldest first, as far as connections are free."""
        if self._job.protocol == "grpc":
            for connection in [
                c for c in self._connections.values() if c.free_slots() > 0
            ] or self._replace_connections():
                room = self._job.max_in_flight - self._in_flight
                count = min(connection.free_slots(), room, len(self._backlog))
                if count > 0:
                    starts, self._backlog = self._backlog[:count], self._backlog[count:]
                    self._submit(connection, count, starts)
            return
        while self._backlog and self._in_flight < self._job.max_in_flight:
            if not self._idle:
                if len(self._connections) >= self._most_connections:
                    return
                self._idle += self._replace_connections()
                if not self._idle:
                    return
            connection = self._idle.pop() if self._lanes is None else self._idle.pop(0)  # sequences take turns
            if connection.free_slots() > 0:
                self._submit(connection, 1, [self._backlog.pop(0)])

    def _drain(self) -> None:
        """Wait for the open requests, no longer than the time-out of a request.

        Even an interrupted load waits a little: tritonserver 2.51 was seen to die after calls were cut off.
        """
        self.stopping = True
        self._wait_for_answers()
        if self._lanes is not None:
            # Triton keeps a sequence's slot until the sequence ends or has been idle for long.
            self._in_flight += sum(connection.end_sequences() for connection in list(self._connections.values()))
            self._wait_for_answers()
        deadline_ns = time.monotonic_ns() + _ABANDON_NS
        while sum(c.end_streams() for c in list(self._connections.values())) and time.monotonic_ns() < deadline_ns:
            self._poll(0.02)

    def _wait_for_answers(self) -> None:
        begin_ns = time.monotonic_ns()
        while self._in_flight > 0:
            limit_ns = self._job.endpoint.timeout_ns
            if time.monotonic_ns() - begin_ns > (min(limit_ns, _ABANDON_NS) if self.is_abandoned else limit_ns):
                break
            self._poll(0.02)
            self._housekeep()

    def _housekeep(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._recorder.boundary_ns:
            self._recorder.roll(now_ns)
            for connection in list(self._connections.values()):
                connection.expire(now_ns)

    def _wait_until(self, moment_ns: int) -> None:
        while (left := moment_ns - time.monotonic_ns()) > 0:
            self._poll(min(left / 1e9, 0.02))

    def _poll(self, timeout_s: float) -> None:
        connections = self._connections
        for descriptor, event in self._epoll.poll(timeout_s, _MOST_EVENTS):
            connection = connections.get(descriptor)
            if connection is None:
                if descriptor == self._control_fd:
                    self._on_control()
            elif event == _READABLE:
                connection.on_readable()
            else:
                if event & ~_WRITABLE:
                    connection.on_readable()
                if event & _WRITABLE and descriptor in connections:
                    connection.on_writable()

    # Methods of `Sink`, called by the connections.

    def completed(self, connection: Connection, latencies_ns: list[int], now_ns: int) -> int:
        """Record answers. A closed loop sends as many new requests on the same connection.

        Args:
            connection: the connection the requests used.
            latencies_ns: latency of each request in nanoseconds.
            now_ns: when the answers were read (monotonic clock): decides their slice.
        """
        recorder = self._recorder
        if now_ns < recorder.boundary_ns:
            recorder.latencies += latencies_ns
        else:
            recorder.add(latencies_ns, now_ns)
        if self._is_closed and not self.stopping and connection.usable:
            return len(latencies_ns)
        return self._after(connection, len(latencies_ns))

    def failed(self, connection: Connection, count: int, message: str, now_ns: int) -> int:
        """Record errors. A closed loop goes on.

        Args:
            connection: the connection the requests used.
            count: number of requests that ended.
            message: reason of the errors. The report counts equal texts together.
            now_ns: when they were noticed (monotonic clock): decides their slice.
        """
        self._recorder.add_errors(count, message, now_ns)
        return self._after(connection, count)

    def _after(self, connection: Connection, count: int) -> int:
        if self._is_closed and not self.stopping and connection.usable:
            return count
        self._in_flight -= count
        if self._job.protocol == "http" and not self._is_closed and connection.usable:
            self._idle.append(connection)  # type: ignore[arg-type]  # the sink only sees connections that it opened
        return 0

    def noted(self, name: str, values_ns: list[int], now_ns: int) -> None:
        """Record numbers other than whole requests.

        Args:
            name: name of the measured quantity.
            values_ns: one time for each response or sequence, in nanoseconds.
            now_ns: when the answers were read (monotonic clock): decides their slice.
        """
        self._recorder.add_details(name, values_ns, now_ns)

    def returned(self, starts_ns: list[int]) -> None:
        """Take requests back a connection could not place. The loop sends them on another one."""
        self._in_flight -= len(starts_ns)
        if not self._is_closed:
            self._backlog = sorted(starts_ns) + self._backlog

    def lost(self, connection: Connection, message: str, now_ns: int) -> None:
        """Forget a connection. The loops open another one.

        Args:
            connection: the connection the requests used.
            message: reason of the loss. The error of `open` names the last one.
            now_ns: when the loss was noticed. Not used here.
        """
        self._last_loss = message
        descriptor = connection.fileno()
        if self._connections.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            connection.close()
