"""Watching a new version: by mirrored requests, by the server's counters, or by both."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from repo_manager.gates import Gate, GateResult, Outcome
from repo_manager.rollout.trial.gates import Evidence, judge_gates, worst_outcome
from repo_manager.rollout.trial.mirror import Mirror
from repo_manager.server.client import TritonClient

__all__ = ["ShadowWatch", "TrafficWatch"]

_POLL_S = 0.2
_MORE = 1.25  # judge bootstrapped gates again after this factor more requests


class _Looks:
    """Judges as often as it is asked. A look of a bootstrapped gate costs, so it waits until there is more to see."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates
        self._look, self._due = 0, 16.0
        self._last: tuple[GateResult, ...] = ()

    def judge(self, evidence: Evidence, *, now: bool = False) -> tuple[GateResult, ...]:
        if not now and evidence.requests < self._due:
            return self._last
        self._look += 1
        self._due = max(evidence.requests, 16) * _MORE
        self._last = judge_gates(self._gates, evidence, look=self._look)
        return self._last


class ShadowWatch:
    """Watches by mirroring recorded requests to both versions.

    Args:
        mirror: sends requests to both versions.
        gates: all gates of the trial. Each look judges every one on the mirrored requests.
        until_decided: end as soon as every gate is decided, instead of only when one fails.
    """

    def __init__(self, mirror: Mirror, gates: Sequence[Gate], *, until_decided: bool) -> None:
        self._mirror, self._until_decided = mirror, until_decided
        self._looks = _Looks(gates)

    def watch(self, seconds: float) -> tuple[GateResult, ...]:
        """Mirror for some time. Return how the gates stand over all time so far.

        A decision ends it and is the result. The answers on their way at that moment are not judged: another look has
        wider intervals and could leave a decided gate undecided.
        """
        decision: tuple[GateResult, ...] = ()

        def decided() -> bool:
            nonlocal decision
            results = self._looks.judge(self._mirror.evidence())
            outcome = worst_outcome(results)
            if outcome is Outcome.FAIL or (self._until_decided and bool(results) and outcome is Outcome.PASS):
                decision = results
            return bool(decision)

        self._mirror.run(seconds, decided)
        return decision or self._looks.judge(self._mirror.evidence(), now=True)

    def requests(self) -> int:
        """Return how many mirrored requests the new version got."""
        return self._mirror.sent


class TrafficWatch:
    """Watches the requests of others by the server's counters of the new version.

    The counters know errors and mean times on the server, no percentiles and no answers. An error response of a Python
    model counts as a success (python_backend, python_be.cc: only a failed `execute` calls `SetSuccessStatus(false)`).
    For models written in Python, look at the clients' errors or use a shadow, too.

    Args:
        client: connected client of the server.
        name: name of the model whose counters are read from the server.
        version: the new version. Requests to others are not counted.
        gates: the conditions. Those the counters cannot speak to are left to the shadow.
        shadow: mirrors during the watch. Its gates count, too. `None`: no shadow.
    """

    def __init__(
        self, client: TritonClient, name: str, version: int, gates: Sequence[Gate], shadow: ShadowWatch | None = None
    ) -> None:
        self._client, self._name, self._version = client, name, version
        self._gates, self._shadow = gates, shadow
        self._looks = _Looks(gates)
        self._first = self._last = self._counters()
        self._periods: list[tuple[float, float]] = []

    def watch(self, seconds: float) -> tuple[GateResult, ...]:
        """Watch for some time. Return how the gates stand over all time so far."""
        end = time.monotonic() + seconds
        mirrored: tuple[GateResult, ...] = ()
        while (left := end - time.monotonic()) > 0:
            if self._shadow is None:
                time.sleep(min(left, _POLL_S))
            else:
                mirrored = self._shadow.watch(min(left, max(_POLL_S, seconds / 4)))
            self._read()
            results = (*mirrored, *self._looks.judge(self._evidence()))
            if worst_outcome(results) is Outcome.FAIL:
                return results
        return (*mirrored, *self._decisive(self._looks.judge(self._evidence(), now=True)))

    def requests(self) -> int:
        """Return how many requests the new version got since the beginning, mirrored ones left out."""
        counted = self._last[0] + self._last[1] - self._first[0] - self._first[1]
        return counted - (0 if self._shadow is None else self._shadow.requests())

    def _decisive(self, results: tuple[GateResult, ...]) -> tuple[GateResult, ...]:
        """Beside a shadow the counters only matter when they say no: the shadow has the numbers."""
        if self._shadow is None:
            return results
        return tuple(result for result in results if result.outcome is Outcome.FAIL)

    def _counters(self) -> tuple[int, int, int]:
        """Return successes, failures, and the successes' time on the server in nanoseconds."""
        counted = self._client.statistics(self._name, self._version)
        return (counted[0].success_count, counted[0].fail_count, counted[0].success_ns) if counted else (0, 0, 0)

    def _read(self) -> None:
        now = self._counters()
        answered = now[0] - self._last[0]
        if answered > 0:
            self._periods.append(((now[2] - self._last[2]) / answered, float(answered)))
        self._last = now

    def _evidence(self) -> Evidence:
        successes, failures, _ = (now - first for now, first in zip(self._last, self._first, strict=True))
        periods = np.asarray(self._periods, np.float64).reshape(-1, 2)
        return Evidence("traffic", requests=successes + failures, errors=failures, latencies_ns=periods)
