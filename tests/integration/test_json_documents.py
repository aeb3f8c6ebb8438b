"""The `--json` documents of commands with a server follow the published schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.json_documents import check_document

from repo_manager.samples import sample_model

pytestmark = pytest.mark.integration


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run a command on a repository of the test's own. Its printed document is checked."""
    (tmp_path / "run").mkdir(mode=0o700)
    surroundings = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
    }

    def run(*words: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "repo_manager", *map(str, words), "--json", "-r", str(tmp_path / "models")],
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        check_document(str(words[0]), document)
        return dict(document)

    yield run
    run("serve", "--stop")


def test_documents_of_servers_and_measurements(run: Callable[..., dict[str, Any]]) -> None:
    for _ in range(2):
        run("add", sample_model(), "--name", "digits")
    run("serve", "--detach", "--load", "none")
    run("deploy", "digits:1")
    run("deploy", "digits:2", "--dry-run")
    run("deploy", "digits:2")
    assert run("status")["models"]
    assert run("infer", "digits")["answers"][0]["outputs"]
    run("rollback", "digits")
    short = ("--warmup", "0.1", "--duration", "2")
    assert run("loadtest", "digits", *short, "--slo", "errors<100%")["verdict"]
    assert run("logs")["lines"]
    assert run("history", "digits")["rollouts"]
    run("undeploy", "digits")
