"""Recorded requests sent to two versions at once, their answers and latencies compared."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.gates import GateResult, Outcome
from repo_manager.rollout.options import ShadowOptions
from repo_manager.rollout.trial.gates import Evidence
from repo_manager.rollout.trial.shadow import Array, LatencySummary, Request, ShadowReport
from repo_manager.server.client import TritonClient
from repo_manager.stats.drift import DriftMeter, looks_like_scores, relative_error

__all__ = ["Mirror"]

_WARM_UP_PAIRS = 3
_POLL_S = 0.05


@dataclasses.dataclass
class _Reply:
    outputs: dict[str, Array] | None
    error: str | None
    latency_ns: int


class Mirror:
    """Sends each request to both versions, one after the other in random order, and keeps the score.

    Args:
        connect: makes a client; called once a worker, because an HTTP client is for one thread.
        name: the model.
        versions: the old and the new version.
        requests: what to send, over and over in an order drawn anew each round.
        options: rate and deadlines.
    """

    def __init__(
        self,
        connect: Callable[[], TritonClient],
        name: str,
        versions: tuple[int, int],
        requests: Sequence[Request],
        options: ShadowOptions,
    ) -> None:
        self._connect, self._name, self._options = connect, name, options
        self.old, self.new = versions
        self._requests = requests
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()
        self._latencies: list[tuple[int, int]] = []
        self._drifts: list[float] = []
        self._meter: DriftMeter | None = None
        self._pairs = self._errors_old = self._errors_new = self._refused_by_both = self._skipped = 0
        self._compared = self._agreeing = 0
        self._first_error: str | None = None
        self._warm_up_left = _WARM_UP_PAIRS
        self._seconds = 0.0
        self._failure: ServerUnreachableError | None = None

    def run(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Mirror for some time.

        Args:
            seconds: for how long.
            stop: asked again and again; `True` ends it.

        Raises:
            ServerUnreachableError: the server does not answer any more.
        """
        tickets: queue.Queue[Request | None] = queue.Queue(maxsize=self._options.workers)
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self._options.workers) as pool:
            workers = [
                pool.submit(self._work, tickets, self._random.getrandbits(32)) for _ in range(self._options.workers)
            ]
            try:
                self._send(tickets, began, seconds, lambda: stop() or any(worker.done() for worker in workers))
            finally:
                _dismiss(tickets, workers)
                self._seconds += time.monotonic() - began
        for worker in workers:
            worker.result()
        if self._failure is not None:
            raise self._failure

    def _send(
        self, tickets: queue.Queue[Request | None], began: float, seconds: float, stop: Callable[[], bool]
    ) -> None:
        """Hand out requests at the rate; what is due while every worker waits is left out, not made up for later."""
        order: list[Request] = []
        due, asked = began, began
        while (now := time.monotonic()) < began + seconds and self._failure is None:
            if now < due:
                time.sleep(min(due - now, _POLL_S))
            else:
                if not order:
                    order = self._random.sample(list(self._requests), len(self._requests))
                try:
                    tickets.put_nowait(order.pop())
                except queue.Full:
                    self._skipped += 1
                due += 1.0 / self._options.rate_per_s
            if now >= asked + _POLL_S:
                asked = now
                if stop():
                    return

    def _work(self, tickets: queue.Queue[Request | None], seed: int) -> None:
        random_order = random.Random(seed)
        with self._connect() as client:
            while (request := tickets.get()) is not None:
                if self._failure is not None:
                    continue
                order = [self.old, self.new]
                random_order.shuffle(order)
                try:
                    replies = {version: self._ask(client, version, request) for version in order}
                except ServerUnreachableError as exc:
                    self._failure = exc
                    continue
                with self._lock:
                    self._count(replies[self.old], replies[self.new])

    def _ask(self, client: TritonClient, version: int, request: Request) -> _Reply:
        began_ns = time.perf_counter_ns()
        try:
            outputs = client.infer(self._name, version, request, timeout_s=self._options.timeout_s)
        except ServerRefusedError as exc:
            return _Reply(None, exc.message, time.perf_counter_ns() - began_ns)
        except ServerUnreachableError as exc:
            # Too late is the version's failure as long as the server itself still answers.
            if "did not answer within" in exc.message and client.live():
                return _Reply(None, exc.message, time.perf_counter_ns() - began_ns)
            raise
        return _Reply(outputs, None, time.perf_counter_ns() - began_ns)

    def _count(self, old: _Reply, new: _Reply) -> None:
        if self._warm_up_left:
            self._warm_up_left -= 1
            return
        if old.outputs is None and new.outputs is None:
            self._refused_by_both += 1
            self._first_error = self._first_error or new.error
            return
        self._pairs += 1
        self._errors_old += old.outputs is None
        self._errors_new += new.outputs is None
        self._first_error = self._first_error or new.error
        if old.outputs is None or new.outputs is None:
            return
        self._latencies.append((new.latency_ns, old.latency_ns))
        self._compare(old.outputs, new.outputs)

    def _compare(self, old: dict[str, Array], new: dict[str, Array]) -> None:
        if old.keys() - new.keys():
            self._drifts.append(float("inf"))
            return
        self._drifts.append(max((relative_error(new[name], old[name]) for name in old), default=0.0))
        if self._meter is None:
            self._meter = DriftMeter(tuple(old))
        self._meter.add(new, old)
        for name, output in old.items():
            if looks_like_scores(output) and new[name].shape == output.shape:
                self._compared += len(output)
                self._agreeing += int(np.count_nonzero(output.argmax(axis=1) == new[name].argmax(axis=1)))

    @property
    def sent(self) -> int:
        """Requests that the new version was sent, warm-up included."""
        return self._pairs + self._refused_by_both + _WARM_UP_PAIRS - self._warm_up_left

    def evidence(self) -> Evidence:
        """Return what is known so far."""
        with self._lock:
            return Evidence(
                source="shadow",
                requests=self._pairs,
                errors=self._errors_new,
                latencies_ns=np.asarray(self._latencies, np.float64).reshape(-1, 2),
                compared=self._compared,
                agreeing=self._agreeing,
                drifts=np.asarray(self._drifts, np.float64),
            )

    def report(self, gates: tuple[GateResult, ...], outcome: Outcome) -> ShadowReport:
        """Return the score with the gates' results."""
        latencies = self.evidence().latencies_ns
        return ShadowReport(
            model=self._name,
            old=self.old,
            new=self.new,
            pairs=self._pairs,
            errors_old=self._errors_old,
            errors_new=self._errors_new,
            first_error=self._first_error,
            refused_by_both=self._refused_by_both,
            skipped=self._skipped,
            seconds=self._seconds,
            outputs=() if self._meter is None else self._meter.result(),
            latency_old=LatencySummary.of(latencies[:, 1]),
            latency_new=LatencySummary.of(latencies[:, 0]),
            gates=gates,
            outcome=outcome,
        )


def _dismiss(tickets: queue.Queue[Request | None], workers: Sequence[concurrent.futures.Future[None]]) -> None:
    """Tell every worker that is still at work to end; one that failed takes no ticket any more."""
    left = len(workers)
    while left and not all(worker.done() for worker in workers):
        try:
            tickets.put(None, timeout=_POLL_S)
        except queue.Full:
            continue
        left -= 1
