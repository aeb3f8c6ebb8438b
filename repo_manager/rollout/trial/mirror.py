"""Recorded requests and sequences sent to two versions at once, their answers and latencies compared."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.gates import GateResult, Outcome
from repo_manager.rollout.options import ShadowOptions
from repo_manager.rollout.trial.gates import Evidence
from repo_manager.rollout.trial.shadow import Array, Exchange, LatencySummary, ShadowReport
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind, ask
from repo_manager.stats.drift import DriftMeter, looks_like_scores, relative_error

__all__ = ["Mirror"]

_WARM_UP_PAIRS = 3
_POLL_S = 0.05


@dataclasses.dataclass
class _Reply:
    """One version's answer.

    Attributes:
        answers: of each request its responses, in order. `None` when one of the requests failed.
        error: the reason without an answer.
        latencies_ns: of each request, to its last response.
    """

    answers: list[list[Mapping[str, Array]]] | None
    error: str | None
    latencies_ns: list[int]


class Mirror:
    """Sends each request, or each whole sequence, to both versions in random order, and keeps the score.

    Args:
        connect: makes a client. Called once a worker, because an HTTP client is for one thread.
        name: name of the model with both versions, on the server.
        versions: the old and the new version.
        exchanges: requests to send, over and over in an order drawn again each round.
        options: rate, duration and deadlines of the shadow.
        kind: how the model is asked.
    """

    def __init__(
        self,
        connect: Callable[[], TritonClient],
        name: str,
        versions: tuple[int, int],
        exchanges: Sequence[Exchange],
        options: ShadowOptions,
        kind: ModelKind,
    ) -> None:
        self._connect, self._name, self._options, self._kind = connect, name, options, kind
        self.old, self.new = versions
        self._exchanges = exchanges
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()
        self._latencies: list[tuple[int, int]] = []
        self._drifts: list[float] = []
        self._meter: DriftMeter | None = None
        self._sent = self._pairs = self._errors_old = self._errors_new = self._refused_by_both = self._skipped = 0
        self._compared = self._agreeing = 0
        self._first_error: str | None = None
        self._warm_up_left = _WARM_UP_PAIRS
        self._seconds = 0.0
        self._failure: ServerUnreachableError | None = None

    def run(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Mirror for some time.

        Args:
            seconds: longest time to send requests. Replies on their way are waited for.
            stop: asked again and again. `True` ends it.

        Raises:
            ServerUnreachableError: the server does not answer any more.
        """
        tickets: queue.Queue[Exchange | None] = queue.Queue(maxsize=self._options.workers)
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
        self, tickets: queue.Queue[Exchange | None], began: float, seconds: float, stop: Callable[[], bool]
    ) -> None:
        """Hand out requests at the rate. A request due while every worker waits is left out, not made up for later."""
        order: list[Exchange] = []
        due, asked = began, began
        while (now := time.monotonic()) < began + seconds and self._failure is None:
            if now < due:
                time.sleep(min(due - now, _POLL_S))
            else:
                if not order:
                    order = self._random.sample(list(self._exchanges), len(self._exchanges))
                try:
                    tickets.put_nowait(order.pop())
                except queue.Full:
                    self._skipped += 1
                due += 1.0 / self._options.rate_per_s
            if now >= asked + _POLL_S:
                asked = now
                if stop():
                    return

    def _work(self, tickets: queue.Queue[Exchange | None], seed: int) -> None:
        random_order = random.Random(seed)
        with self._connect() as client:
            while (exchange := tickets.get()) is not None:
                if self._failure is not None:
                    continue
                order = [self.old, self.new]
                random_order.shuffle(order)
                try:
                    replies = {version: self._ask(client, version, exchange) for version in order}
                except ServerUnreachableError as exc:
                    self._failure = exc
                    continue
                with self._lock:
                    self._count(replies[self.old], replies[self.new])

    def _ask(self, client: TritonClient, version: int, exchange: Exchange) -> _Reply:
        answers: list[list[Mapping[str, Array]]] = [[] for _ in exchange]
        latencies_ns = [0] * len(exchange)
        try:
            for each in ask(client, self._name, version, exchange, self._kind, timeout_s=self._options.timeout_s):
                answers[each.request].append(each.outputs)
                latencies_ns[each.request] = each.elapsed_ns
        except ServerRefusedError as exc:
            return _Reply(None, exc.message, [])
        except ServerUnreachableError as exc:
            # A late answer counts against the version if the server itself still answers.
            if "did not answer within" in exc.message and client.live():
                return _Reply(None, exc.message, [])
            raise
        return _Reply(answers, None, latencies_ns)

    def _count(self, old: _Reply, new: _Reply) -> None:
        self._sent += 1 if new.answers is None else len(new.answers)
        if self._warm_up_left:
            self._warm_up_left -= 1
            return
        if old.answers is None and new.answers is None:
            self._refused_by_both += 1
            self._first_error = self._first_error or new.error
            return
        self._pairs += 1
        self._errors_old += old.answers is None
        self._errors_new += new.answers is None
        self._first_error = self._first_error or new.error
        if old.answers is None or new.answers is None:
            return
        self._latencies += zip(new.latencies_ns, old.latencies_ns, strict=True)
        drift = 0.0
        for olds, news in zip(old.answers, new.answers, strict=True):
            if len(olds) != len(news):
                drift = float("inf")
            drift = max([drift, *(self._compare(*responses) for responses in zip(olds, news, strict=False))])
        self._drifts.append(drift)

    def _compare(self, old: Mapping[str, Array], new: Mapping[str, Array]) -> float:
        """Compare two responses. Return how far the new one drifts."""
        if old.keys() - new.keys():
            return float("inf")
        if self._meter is None:
            self._meter = DriftMeter(tuple(old))
        self._meter.add(new, old)
        for name, output in old.items():
            if looks_like_scores(output) and new[name].shape == output.shape:
                self._compared += len(output)
                self._agreeing += int(np.count_nonzero(output.argmax(axis=1) == new[name].argmax(axis=1)))
        return max((relative_error(new[name], old[name]) for name in old), default=0.0)

    @property
    def sent(self) -> int:
        """Requests the new version was sent, warm-up included. Of a failed sequence one is known."""
        return self._sent

    def evidence(self) -> Evidence:
        """Return the results so far."""
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


def _dismiss(tickets: queue.Queue[Exchange | None], workers: Sequence[concurrent.futures.Future[None]]) -> None:
    """Tell every busy worker to end. A failed one takes no more tickets."""
    left = len(workers)
    while left and not all(worker.done() for worker in workers):
        try:
            tickets.put(None, timeout=_POLL_S)
        except queue.Full:
            continue
        left -= 1
