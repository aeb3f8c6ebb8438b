"""A load worker with misbehaving servers: it ends in time, and counts errors in place of breaking."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.bad_peers import MANNERS, BadPeer

from repo_manager.errors import ServerUnreachableError
from repo_manager.loadtest.wire.hpack import encode_literal
from repo_manager.loadtest.wire.http2 import BlockReader

from .conftest import Load

TIMEOUT_S = 0.4
LOAD_S = 0.3
# A request sent at the load's end waits for its time-out. The rest allows for 47 at once on one machine.
MOST_S = 2 * TIMEOUT_S + LOAD_S + 8.0


def _ran(load: Callable[..., Load], name: str) -> str:
    """Load a peer. Return the faults of the load's end, empty for none."""
    began = time.monotonic()
    with BadPeer(MANNERS[name]) as peer:
        try:
            seen = load(name.partition("-")[0], peer.port, timeout_s=TIMEOUT_S).run(LOAD_S, slots=2)
        except ServerUnreachableError as exc:
            return "" if len(exc.message) < 500 else f"{name}: a message of {len(exc.message)} characters"
        except Exception as exc:  # noqa: BLE001 - what else comes is what this test looks for
            return f"{name}: {exc!r}"
    took = time.monotonic() - began
    if took > MOST_S:
        return f"{name}: {took:.1f} s"
    # Three peers send a valid answer to a client that skips the body, as the load test does.
    return f"{name}: {seen.latencies.count} answers" if seen.latencies.count and name not in _ANSWERS else ""


_ANSWERS = {"http-two-lengths", "http-gzip", "grpc-answers-nonsense"}


def test_no_peer_breaks_a_worker(load: Callable[..., Load]) -> None:
    with ThreadPoolExecutor(len(MANNERS)) as pool:
        findings = list(pool.map(lambda name: _ran(load, name), MANNERS))
    assert [finding for finding in findings if finding] == []


@pytest.mark.parametrize("status", ["9" * 5000, "²", "16"])
def test_an_odd_grpc_status_is_an_error_like_any_other(status: str) -> None:

    problem = BlockReader().read(encode_literal("grpc-status", status, indexed=False), 0x5)
    assert problem is not None
    assert len(problem) < 200
