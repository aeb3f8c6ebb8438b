"""Failing object storage: each request of an operation, with every fault of networks and stores (moto, proxy)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.certificates import make_certificates
from support.fault_proxy import Fault, FaultProxy, Plan, Request, fault_proxy
from support.object_stores import BUCKET, moto_server, s3_environment, tiny_config, tiny_files
from support.proxies import tls_terminating
from support.tiny_s3 import tiny_s3

from repo_manager.errors import RepositoryError
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.repository.publish import publish
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.stores.objects import client as client_module
from repo_manager.repository.stores.objects.client import StoreOptions, open_client
from repo_manager.repository.stores.objects.facts import Listing
from repo_manager.repository.stores.objects.retry import RetryOptions
from repo_manager.repository.tags import set_tag
from repo_manager.repository.transfer import copy_version, version_files
from repo_manager.repository.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.slow]
MIB = 1 << 20
PART = 5 * MIB
QUICK = StoreOptions(
    retry=RetryOptions(deadline_s=2.0, first_s=0.01, longest_s=0.05, slow_down_s=0.01),
    request_timeout_s=1.5,
    part_bytes=PART,
)


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    with moto_server() as address, fault_proxy(address) as running:
        yield running


@pytest.fixture
def root(proxy: FaultProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectRepository:
    """A repository behind the proxy."""
    proxy.arm()
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client_module, "DEFAULT_OPTIONS", QUICK)
    place = parse_location(f"s3://http://127.0.0.1:{proxy.port}/{BUCKET}/{abs(hash(request.node.nodeid))}/models")
    assert isinstance(place, ObjectRepository)
    return place


def each_once(fault: Fault) -> Plan:
    """Every request fails when it is first sent, and works when it is sent again."""
    seen: set[tuple[str, str]] = set()

    def plan(request: Request) -> Fault | None:
        what = (request.method, request.path)
        if what in seen:
            seen.discard(what)
            return None
        seen.add(what)
        return fault

    return plan


FAULTS = {
    "500": Fault(status=500),
    "slow down": Fault(status=503),
    "request cut": Fault(cut_request_at=10),
    "answer lost": Fault(cut_answer_at=0),
    "answer cut": Fault(cut_answer_at=7),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_every_request_may_fail_once(root: ObjectRepository, proxy: FaultProxy, fault: Fault, tmp_path: Path) -> None:
    proxy.arm(each_once(fault))
    for number in (1, 2, 3):
        made = publish(root, "m", tiny_files(tmp_path / str(number), f"text {number}"), tiny_config(), {})
        assert made.version == number
    set_served_versions(root, "m", [2])
    remove(root, "m", 3)
    assert copy_version(root, "m", 2, tmp_path / "local").version == 2
    proxy.arm()
    entry = find_model(root, "m")
    assert ([v.version for v in entry.versions], entry.selected) == ([1, 2], (2,))
    assert verify(root, models=False) == ()
    assert open_client(root).walk("m/3") == ()


def test_a_stalled_request_is_given_up_and_sent_again(
    root: ObjectRepository, proxy: FaultProxy, tmp_path: Path
) -> None:
    stalled = [True]

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith("model.onnx") and stalled.pop():
            stalled.append(False)
            return Fault(stall_s=3.0)
        return None

    stalled.insert(0, False)
    proxy.arm(plan)
    began = time.monotonic()
    assert publish(root, "m", tiny_files(tmp_path), tiny_config(), {}).version == 1
    assert time.monotonic() - began >= QUICK.request_timeout_s
    assert verify(root, models=False) == ()


def test_a_store_that_stays_away_ends_in_one_error_and_the_same_command_goes_on(
    root: ObjectRepository, proxy: FaultProxy, tmp_path: Path
) -> None:
    def plan(request: Request) -> Fault | None:
        return Fault(status=503) if request.method == "PUT" and "model.onnx" in request.path else None

    proxy.arm(plan)
    began = time.monotonic()
    with pytest.raises(RepositoryError, match=r"cannot write m/1/model.onnx .* attempts in 2 s") as failed:
        publish(root, "m", tiny_files(tmp_path), tiny_config(), {})
    assert time.monotonic() - began < 8.0
    assert "goes on where it was" in str(failed.value)
    assert "test-secret" not in str(failed.value)
    proxy.arm()
    assert any("was begun and not ended" in problem.what for problem in verify(root, models=False))
    assert publish(root, "m", tiny_files(tmp_path), tiny_config(), {}).version == 1
    assert verify(root, models=False) == ()


def test_an_address_where_nobody_answers_is_given_up_sooner(
    root: ObjectRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "DEFAULT_OPTIONS", StoreOptions(first_contact_s=0.5))
    nowhere = parse_location("s3://http://127.0.0.1:9/bucket/models")
    with pytest.raises(RepositoryError, match=r"attempts in 0.5 s"):
        scan(nowhere)


def test_what_is_refused_is_not_tried_again(root: ObjectRepository, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.arm(lambda _: Fault(status=403))
    with pytest.raises(RepositoryError, match="refuses to") as failed:
        find_model(root, "m")
    assert "credentials in the environment" in str(failed.value)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
@pytest.mark.parametrize("manner", ["refuses", "ignores"])
def test_a_store_without_conditional_writes_is_refused_before_any_file_is_sent(
    manner: str, header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    with tiny_s3() as store:
        setattr(store, manner, (header,))
        place = parse_location(f"s3://http://127.0.0.1:{store.port}/bucket/models")
        began = time.monotonic()
        with pytest.raises(RepositoryError, match="the store has no conditional writes") as caught:
            publish(place, "m", tiny_files(tmp_path), tiny_config(), {})
        assert time.monotonic() - began < 30  # Not retried for two minutes, as a passing fault would be.
        assert header in f"{caught.value}".lower()
        assert {key for key in store.objects if not key.endswith(".state")} == set()


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
@pytest.mark.parametrize("manner", ["refuses", "ignores"])
@pytest.mark.parametrize("recorded", [True, False], ids=["with a record", "as Triton has it"])
def test_no_change_is_made_in_a_store_without_conditional_writes(
    recorded: bool, manner: str, header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    with tiny_s3() as store:
        place = parse_location(f"s3://http://127.0.0.1:{store.port}/bucket/models")
        publish(place, "m", tiny_files(tmp_path), tiny_config(), {})
        if not recorded:
            store.objects = {key: each for key, each in store.objects.items() if "/m/" in f"/{key}"}
        before = store.objects
        client_module._opened.cache_clear()  # each command is a process of its own
        setattr(store, manner, (header,))
        changes: tuple[Callable[[], object], ...] = (
            lambda: set_tag(place, "m", "stable", 1),
            lambda: change_config(place, "m", {"parameters.a": "1"}),
            lambda: remove(place, "m", 1, force=True),
        )
        for change in changes:
            with pytest.raises(RepositoryError, match="the store has no conditional writes"):
                change()
            assert {key: each[0] for key, each in store.objects.items()} == {k: each[0] for k, each in before.items()}


@pytest.mark.parametrize("speaks_tls", [False, True], ids=["plain", "untrusted"])
def test_tls_that_cannot_work_is_named_at_once(
    speaks_tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(tiny_s3()).port
        if speaks_tls:
            port = stack.enter_context(tls_terminating(port, make_certificates(tmp_path))).port
        place = parse_location(f"s3://https://127.0.0.1:{port}/bucket/models")
        with pytest.raises(RepositoryError) as caught:
            scan(place)
    expected = "certificate is refused: UnknownIssuer" if speaks_tls else "the endpoint does not speak TLS"
    assert expected in caught.value.message
    assert "attempts" not in caught.value.message  # Nothing changes by trying again.


def test_an_endpoint_that_speaks_tls_and_is_written_as_http_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    with (
        tiny_s3() as store,
        tls_terminating(store.port, make_certificates(tmp_path)) as proxy,
        pytest.raises(RepositoryError, match="the endpoint speaks TLS, and its address says http") as caught,
    ):
        scan(parse_location(f"s3://http://127.0.0.1:{proxy.port}/bucket/models"))
    assert "attempts" not in caught.value.message


_ENDS_AT_ONCE = """
import asyncio, sys, time
from repo_manager.repository.location import parse_location
from repo_manager.repository.stores.objects.client import open_client

wake = asyncio.SelectorEventLoop._write_to_self

def wake_and_linger(self):
    wake(self)
    time.sleep(0.2)  # the library's thread is here while the process ends

asyncio.SelectorEventLoop._write_to_self = wake_and_linger
open_client(parse_location(sys.argv[1])).head("x")
"""


def test_a_process_that_ends_right_after_an_answer_is_not_aborted() -> None:
    with tiny_s3() as store:
        command = [sys.executable, "-c", _ENDS_AT_ONCE, f"s3://http://127.0.0.1:{store.port}/bucket/models"]
        done = subprocess.run(command, env={**os.environ, **s3_environment()}, timeout=60, check=False)
    assert done.returncode == 0


def large_files(folder: Path) -> dict[str, Path]:
    """A file of four parts, and one sent whole."""
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(3 * PART + 1234))
    (folder / "small").write_bytes(b"small")
    return {"model.onnx": folder / "large", "golden.npz": folder / "small"}


def part_of(request: Request) -> bool:
    return request.method == "PUT" and "partNumber" in request.path


def test_an_upload_that_fails_midway_is_begun_anew_by_the_same_command(
    root: ObjectRepository, proxy: FaultProxy, tmp_path: Path
) -> None:
    files = large_files(tmp_path / "source")
    parts = [0]

    def plan(request: Request) -> Fault | None:
        parts[0] += part_of(request)
        return Fault(status=500) if parts[0] > 2 else None  # from the third part on every call fails

    proxy.arm(plan)
    with pytest.raises(RepositoryError, match="attempts in"):
        publish(root, "m", files, tiny_config(), {})
    proxy.arm()
    seen: list[int] = []
    assert publish(root, "m", files, tiny_config(), {}, progress=seen.append).version == 1
    assert sum(part_of(request) for request in proxy.requests) == 4
    assert not any(r.method == "PUT" and r.path.endswith("golden.npz") for r in proxy.requests)  # it was there already
    assert sum(seen) == 3 * PART + 1234 + len(b"small")
    assert verify(root, models=False) == ()


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.object_stores import tiny_config
from repo_manager.repository.location import parse_location
from repo_manager.repository.publish import publish
from repo_manager.repository.stores.objects import client
client.DEFAULT_OPTIONS = client.StoreOptions(part_bytes=5 << 20, workers=1)
place = Path(sys.argv[3])
files = {"model.onnx": place / "large", "golden.npz": place / "small"}
print("ready", flush=True)
sys.stdin.readline()
publish(parse_location(sys.argv[2]), "m", files, tiny_config(), {})
"""


def test_an_upload_whose_process_was_killed_goes_on(root: ObjectRepository, proxy: FaultProxy, tmp_path: Path) -> None:
    files = large_files(tmp_path / "source")
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent.parent), str(root), str(tmp_path / "source")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    parts = [0]

    def plan(request: Request) -> Fault | None:
        parts[0] += part_of(request)
        return Fault(kill_pid=child.pid) if parts[0] == 3 else None

    proxy.arm(plan)
    child.communicate("go\n", timeout=60)
    assert child.returncode == -9
    proxy.arm()
    assert find_problems(root) == ["version 1 is being published"]
    assert publish(root, "m", files, tiny_config(), {}).version == 1
    assert sum(part_of(request) for request in proxy.requests) == 4
    assert verify(root, models=False) == ()


def find_problems(root: ObjectRepository) -> list[str]:
    (problem,) = verify(root, models=False)
    return [problem.what[:28]]


def test_gc_gives_up_an_abandoned_upload(root: ObjectRepository, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.arm(lambda request: Fault(status=500) if "partNumber=4" in request.path else None)
    with pytest.raises(RepositoryError):
        publish(root, "m", large_files(tmp_path / "source"), tiny_config(), {})
    proxy.arm()
    assert gc(root).swept == ("m/1",)
    assert open_client(root).list("m") == Listing((), ())
    assert publish(root, "m", tiny_files(tmp_path / "next"), tiny_config(), {}).version == 2


def test_a_copy_to_disk_goes_on_where_the_connection_broke(
    root: ObjectRepository, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(client_module, "DEFAULT_OPTIONS", dataclasses.replace(QUICK, workers=1))
    publish(root, "m", large_files(tmp_path / "source"), tiny_config(), {})
    gets = [0]

    def reads(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith("/m/1/model.onnx")

    def plan(request: Request) -> Fault | None:
        gets[0] += reads(request)
        return Fault(cut_answer_at=MIB) if gets[0] > 2 and reads(request) else None

    proxy.arm(plan)
    with pytest.raises(RepositoryError, match=r"cannot read m/1/model\.onnx"):
        copy_version(root, "m", 1, tmp_path / "local")
    assert not (tmp_path / "local" / "m").exists()
    proxy.arm()
    copy_version(root, "m", 1, tmp_path / "local")
    assert sum(map(reads, proxy.requests)) == 2
    assert verify(tmp_path / "local", models=False) == ()
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "repo-manager" / "downloads").iterdir())


def test_a_download_is_the_same_however_it_is_cut(root: ObjectRepository, proxy: FaultProxy, tmp_path: Path) -> None:
    files = large_files(tmp_path / "source")
    path = publish(root, "m", files, tiny_config(), {}).path
    cuts = iter(range(0, 100 * MIB, 777_777))
    broken: set[str] = set()

    def plan(request: Request) -> Fault | None:
        key = f"{request.path} {len(broken)}"
        if request.method == "GET" and len(broken) < 6:
            broken.add(key)
            return Fault(cut_answer_at=next(cuts))
        return None

    proxy.arm(plan)
    with version_files(path) as folder:
        assert (folder / "model.onnx").read_bytes() == files["model.onnx"].read_bytes()
    assert len(broken) == 6
