"""The supervisor of a server process, with a shell in the server's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager.server import supervisor
from repo_manager.server.process import ServerProcess


def started(script: str, log: Path, **environment: str) -> ServerProcess:
    return ServerProcess.start(["/bin/sh", "-c", script], {"PATH": os.defpath, **environment}, log, "no_such_prefix_")


@pytest.mark.parametrize("code", [0, 3])
def test_a_server_that_ends_at_once_is_noticed_with_its_code(code: int, tmp_path: Path) -> None:
    # That is, before the supervisor has installed its handler of ended children.
    process = started(f"echo $GIVEN; exit {code}", tmp_path / "log", GIVEN="secret word")
    assert process.wait(10.0) == code
    assert process.read_log() == "secret word\n"


def test_a_killed_server_has_its_signal_as_code(tmp_path: Path) -> None:
    process = started("kill -KILL $$", tmp_path / "log")
    assert process.wait(10.0) == -9


def test_a_server_that_cannot_be_started_says_why_in_its_log(tmp_path: Path) -> None:
    missing = str(tmp_path / "tritonserver")
    process = ServerProcess.start([missing], {}, tmp_path / "log", "no_such_prefix_")
    assert process.wait(10.0) == 127
    assert f"cannot start {missing}: " in process.read_log()


def test_the_server_inherits_no_ignored_signals(tmp_path: Path) -> None:
    process = started("grep SigIgn /proc/$$/status", tmp_path / "log")
    assert process.wait(10.0) == 0
    ignored = int(process.read_log().split()[1], 16)
    assert not any(ignored >> (number - 1) & 1 for number in (1, 2, 13, 15, 17, 25))


def test_an_orderly_stop_lets_the_server_end_by_itself(tmp_path: Path) -> None:
    process = started("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.01; done", tmp_path / "log")
    assert process.wait_for_log("up", 10.0)
    assert process.stop(10.0, unload_s=10.0) == 5
    assert process.read_log() == "up\nbye\n"


def test_a_server_that_does_not_listen_is_killed_after_its_deadline(tmp_path: Path) -> None:
    process = started("trap '' TERM; echo up; while :; do sleep 0.01; done", tmp_path / "log")
    assert process.wait_for_log("up", 10.0)
    assert process.stop(0.2) == -9


def test_the_start_of_a_server_waits_for_few_imports() -> None:
    slow = ("json", "pathlib", "re", "contextlib", "enum", "signal")
    code = (
        "import sys; source = open(sys.argv[1]).read(); exec(source, {'__name__': 'supervisor'}); "
        f"print([name for name in {slow} if name in sys.modules])"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(supervisor.__file__)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_server_that_may_open_few_files_gets_more_or_is_refused(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from repo_manager.errors import InputError
from repo_manager.server.process import ServerProcess
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
try:
    command = ["/bin/sh", "-c", "ulimit -n; sleep 60"]
    process = ServerProcess.start(command, {"PATH": "/bin"}, Path(sys.argv[2]), "none_")
except InputError as exc:
    print("refused:", exc)
else:
    assert process.wait_for_log("256", 60)
    process.stop(5)
    print("started")
"""
    for hard, expected in ((64, "refused: a process may open 64 files here"), (4096, "started")):
        command = [sys.executable, "-c", script, str(hard), str(tmp_path / f"{hard}.log")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout.startswith(expected), done.stdout + done.stderr
