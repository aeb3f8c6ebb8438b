"""`gc --snapshots`: a named snapshot stays, on either store. A snapshot named nowhere goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import InputError, RepoManagerError, RepositoryError, UsageError
from repo_manager.pipeline.snapshot import snapshot
from repo_manager.repository.stores import open_store
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.snapshot_gc import gc_snapshots

TARGET = "k8s://models/rel"
QUICK = RolloutOptions(load_timeout_s=20.0)


def there(repository: Path) -> set[str]:
    return {path.name for path in repository.with_name("repository.snapshots").iterdir()}


def rolled_out(repository: Path, version: int) -> str:
    done = deploy(repository, "scale", version, TARGET, options=QUICK)
    assert done.servers[0].snapshot is not None
    return done.servers[0].snapshot.after.rpartition("/")[2]


def test_what_a_release_names_in_any_way_stays(deployed: FakeCluster, repository: Path) -> None:
    first, second = rolled_out(repository, 2), rolled_out(repository, 3)
    unnamed = snapshot(repository, ("scale:1",)).pin.id
    assert there(repository) == {first, second, unnamed}
    done = gc_snapshots(repository, [TARGET], older_than_s=0.0)
    assert (done.removed, set(done.kept)) == ((unnamed,), {first, second})
    assert there(repository) == {first, second}
    history = deployed.deployment("models", "rel-triton")["metadata"]["annotations"]
    history.pop("repo-manager/history")
    assert gc_snapshots(repository, [TARGET], older_than_s=0.0).removed == ()
    for key in [key for key, item in deployed.replica_sets.items() if first in json.dumps(item)]:
        del deployed.replica_sets[key]
    assert gc_snapshots(repository, [TARGET], older_than_s=0.0).removed == (first,)
    assert deploy(repository, "scale", 2, TARGET, options=QUICK).changed, "it can be written anew"


KILLED = """
import os, signal, sys
from repo_manager.rollout.targets import snapshot_files
from repo_manager.cli.main import app
snapshot_files.fsync_tree = lambda _: os.kill(os.getpid(), signal.SIGKILL)
app(["snapshot", "scale:2", "--repository", sys.argv[1]])
"""


@pytest.mark.parametrize("command", ["snapshot", "gc"])
def test_what_a_killed_command_left_goes_with_the_next(repository: Path, tmp_path: Path, command: str) -> None:
    file = tmp_path / "snapshot.yaml"
    snapshot(repository, ("scale:3",), values=file)
    done = subprocess.run([sys.executable, "-c", KILLED, str(repository)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(there(repository)) == 2
    again = ["snapshot", "scale:3", "--values", str(file)] if command == "snapshot" else ["gc", "--snapshots"]
    more = [] if command == "snapshot" else ["--values", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "repo_manager", *again, *more, "--repository", str(repository)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not [name for name in there(repository) if name.startswith(".")]
    assert len(there(repository)) == 1


def test_what_is_young_or_pinned_stays(deployed: FakeCluster, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    pinned = snapshot(repository, ("scale:2",), values=file).pin.id
    young = snapshot(repository, ("scale:3",)).pin.id
    assert gc_snapshots(repository, [TARGET]).removed == ()
    past = time.time() - 2 * 86400
    for name in (pinned, young):
        place = repository.with_name("repository.snapshots") / name
        for path in (place, *place.rglob("*")):
            os.utime(path, (past, past))
    done = run(repository, "--to", TARGET, "--values", str(file))
    assert done.exit_code == 0, done.output
    assert there(repository) == {pinned}


def test_nothing_is_removed_while_a_roll_out_runs(deployed: FakeCluster, repository: Path) -> None:
    unnamed = snapshot(repository, ("scale:2",)).pin.id
    with open_store(repository).lease("other", timeout_s=0.0), pytest.raises(RepoManagerError, match="other"):
        gc_snapshots(repository, [TARGET], older_than_s=0.0)
    assert there(repository) == {unnamed}


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((), UsageError),
        (("--to", "k8s://models/none"), RepoManagerError),
        (("--values", "none.yaml"), InputError),
        (("scale", "--to", TARGET), UsageError),
    ],
)
def test_what_is_not_named_right_removes_nothing(
    deployed: FakeCluster, repository: Path, arguments: tuple[str, ...], kind: type[RepoManagerError]
) -> None:
    unnamed = snapshot(repository, ("scale:2",)).pin.id
    done = run(repository, *arguments, "--older-than", "0s")
    assert isinstance(done.exception, kind)
    assert there(repository) == {unnamed}


def test_an_api_server_that_refuses_removes_nothing(deployed: FakeCluster, repository: Path) -> None:
    unnamed = snapshot(repository, ("scale:2",)).pin.id
    deployed.refuse = lambda _method, path: (403, "forbidden") if path.endswith("replicasets") else None
    assert isinstance(run(repository, "--to", TARGET, "--older-than", "0s").exception, RepoManagerError)
    assert there(repository) == {unnamed}


def test_a_dry_run(deployed: FakeCluster, repository: Path) -> None:
    unnamed = snapshot(repository, ("scale:2",)).pin.id
    done = run(repository, "--to", TARGET, "--older-than", "0s", "--dry-run", "--json")
    assert json.loads(done.stdout) == {"removed": [unnamed], "kept": {}, "dry_run": True}
    assert there(repository) == {unnamed}


def run(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["gc", "--snapshots", *arguments, "--repository", str(repository)])


def test_the_other_gc_takes_none_of_it(repository: Path) -> None:
    done = CliRunner().invoke(app, ["gc", "--to", TARGET, "--repository", str(repository)])
    assert isinstance(done.exception, UsageError)
    with pytest.raises(RepositoryError):
        gc_snapshots(repository / "none", [TARGET])
