"""Power cuts on both stores: every operation recorded, then replayed without its non-durable writes. No server."""

from __future__ import annotations

import json
import subprocess

import pytest
from support.repository_suites.run import run_suite

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


def replay(store: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if store == "objects":
        pytest.importorskip("obstore")
    return run_suite("power_loss", store, "WORK", *arguments, timeout_s=580)


@pytest.mark.parametrize(("store", "calls", "trees"), [("disk", 700, 900), ("objects", 100, 120)])
def test_no_power_cut_breaks_or_loses_anything(store: str, calls: int, trees: int) -> None:
    done = replay(store)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 19
    assert sum(made for made, _ in found.values()) >= calls
    assert sum(left for _, left in found.values()) >= trees


@pytest.mark.parametrize(
    ("store", "forgotten", "operation"),
    [
        ("disk", "files", "add to a model"),
        ("disk", "folders", "add to a model"),
        ("disk", "files", "config set"),
        ("disk", "folders", "sign"),
        ("objects", "writes", "add to a model"),
        ("objects", "writes", "config set"),
        ("objects", "writes", "sign"),
    ],
)
def test_it_would_notice_what_is_not_durable(store: str, forgotten: str, operation: str) -> None:
    done = replay(store, "--forget", forgotten, operation)
    assert done.returncode == 1
    assert any(name in done.stderr for name in ("AssertionError", "RepositoryError", "ConfigError")), done.stderr[
        -2000:
    ]
