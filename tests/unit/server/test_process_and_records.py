from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from repo_manager.errors import ServerError, UsageError
from repo_manager.server.command import check_port_is_free, free_ports, listens_on, takes_connections
from repo_manager.server.installation import find_triton
from repo_manager.server.process import reason_in_log, start_ticks
from repo_manager.server.records import RunningServer, running_server, write_record


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def record(repository: Path, pid: int, ticks: int) -> Path:
    return write_record(
        RunningServer(repository.resolve(), pid, ticks, "http://h:1", "grpc://h:2", "http://h:3", repository)
    )


def test_a_running_server_is_found_by_its_repository(tmp_path: Path) -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    record(tmp_path, os.getpid(), ticks)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    found = running_server(link)
    assert found is not None
    assert (found.pid, found.grpc_url) == (os.getpid(), "grpc://h:2")
    assert running_server(tmp_path / "cache") is None


def test_a_recycled_pid_and_a_dead_one_do_not_count(tmp_path: Path) -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    process = subprocess.Popen(["true"])
    dead_ticks = start_ticks(process.pid) or 1
    process.wait()
    paths = [record(tmp_path, os.getpid(), ticks + 1), record(tmp_path, process.pid, dead_ticks)]
    broken = paths[0].with_name("broken.json")
    broken.write_text("{")
    assert running_server(tmp_path) is None
    assert not any(path.exists() for path in (*paths, broken))


def test_free_ports_are_distinct_and_can_be_bound() -> None:
    ports = free_ports("127.0.0.1", 3)
    assert len(set(ports)) == 3
    for port in ports:
        check_port_is_free("127.0.0.1", port, "HTTP")


def test_a_taken_port_and_a_foreign_address_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens_on(os.getpid(), {port})
        assert takes_connections("127.0.0.1", port)
        (other,) = free_ports("127.0.0.1", 1)
        assert not listens_on(os.getpid(), {port, other})
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as second:
            assert listens_on(os.getpid(), {port, second.getsockname()[1]})
        with pytest.raises(ServerError, match=f"HTTP port {port} on 127.0.0.1"):
            check_port_is_free("127.0.0.1", port, "HTTP")
    assert not listens_on(os.getpid(), {port})
    assert not takes_connections("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"192\.0\.2\.1"):
        check_port_is_free("192.0.2.1", 0, "HTTP")


def test_tritons_reason_is_the_last_error_with_its_continuation() -> None:
    log = (
        'E1123 16:54:57.7 58 a.cc:1] "first"\nI1123 16:54:57.8 58 b.cc:2] "info"\n'
        "error: creating server: Invalid argument - load failed\nAt:\n  model.py(3)\nI1123 16:54:58.8 58 b.cc:2] more\n"
    )
    assert reason_in_log(log) == "creating server: Invalid argument - load failed\nAt:\n  model.py(3)"
    assert reason_in_log('E1123 16:54:57.7 58 main.cc:257] "failed to start HTTP"') == "failed to start HTTP"
    assert reason_in_log("all is well") is None


def test_a_wrong_path_to_a_tritonserver_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPO_MANAGER_TRITONSERVER", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"REPO_MANAGER_TRITONSERVER.*not an executable"):
        find_triton()
