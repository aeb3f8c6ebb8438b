"""A command that is killed (SIGKILL) at its n-th request to the store, for every n.

The child is forked from a process that has everything imported and has not talked to a store yet. After each death:
what is served is whole, `verify` has no error, the same command works, `gc` leaves nothing behind.

Run by test_object_crash.py, one process an operation: the store's client has threads once it was used, and a fork of a
process with them would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from support.object_stores import s3_environment, tiny_config, tiny_files
from support.tiny_s3 import TinyS3, tiny_s3

from repo_manager.errors import RepositoryError
from repo_manager.repository import (
    ObjectRepository,
    adopt,
    change_config,
    gc,
    parse_location,
    publish,
    record_deployment,
    remove,
    scan,
    set_served_versions,
    set_tag,
    verify,
)
from repo_manager.repository.stores.objects.client import open_client
from repo_manager.repository.stores.objects.ledger import read_ledger

MAX_REQUESTS = 200


def add(root: ObjectRepository, work: Path, text: str, name: str = "m") -> int:
    config = tiny_config(name, labels={"y": ("a", "b")})
    return publish(root, name, tiny_files(work / text, text), config, {}).version


def two_versions(root: ObjectRepository, work: Path) -> None:
    add(root, work, "one")
    add(root, work, "two")


def tagged(root: ObjectRepository, work: Path) -> None:
    two_versions(root, work)
    set_tag(root, "m", "stable", 2)


def foreign(root: ObjectRepository, work: Path) -> None:
    store = open_client(root)
    store.put("m/1/model.onnx", b"theirs")
    store.put("m/config.pbtxt", tiny_config().text.encode())


def nothing(root: ObjectRepository, work: Path) -> None:
    pass


def again_or_gone(act: Callable[[], object]) -> None:
    """The same command once more: it works, or says that it was done."""
    with contextlib.suppress(RepositoryError):
        act()


Setup = Callable[[ObjectRepository, Path], None]
# name -> (what is there before, what is done, versions that exist after it was done once more)
OPERATIONS: dict[str, tuple[Setup, Setup, set[tuple[int, ...]]]] = {
    "first add": (nothing, lambda r, w: add(r, w, "new") and None, {(1,), (1, 2)}),
    "next add": (two_versions, lambda r, w: add(r, w, "new") and None, {(1, 2, 3), (1, 2, 3, 4)}),
    "remove": (two_versions, lambda r, w: remove(r, "m", 2) and None, {(1,)}),
    "remove a tagged one": (tagged, lambda r, w: remove(r, "m", 2, force=True) and None, {(1,)}),
    "remove a model": (tagged, lambda r, w: remove(r, "m", force=True) and None, {()}),
    "gc": (two_versions, lambda r, w: gc(r, keep=1) and None, {(1, 2)}),
    "config": (two_versions, lambda r, w: change_config(r, "m", {"instance_group.count": "3"}) and None, {(1, 2)}),
    "deploy": (two_versions, lambda r, w: _deploy(r), {(1, 2)}),
    "adopt": (foreign, lambda r, w: adopt(r) and None, {(1,)}),
}


def _deploy(root: ObjectRepository) -> None:
    set_served_versions(root, "m", [2])
    record_deployment(root, "m", 2)


def kill_everywhere(operation: str, store_server: TinyS3, work: Path) -> int:
    """Kill the operation at each of its requests; return how many there were."""
    before, act, expected = OPERATIONS[operation]
    root = parse_location(f"s3://http://127.0.0.1:{store_server.port}/bucket/models")
    assert isinstance(root, ObjectRepository)
    in_child(lambda: before(root, work))
    start = dict(store_server.objects)
    for number in range(1, MAX_REQUESTS):
        store_server.objects = dict(start)
        died = in_child(lambda: act(root, work), store_server, number)
        in_child(lambda: look(root, act, work, expected))
        if not died:
            return number - 1
    raise AssertionError(f"{operation} takes more than {MAX_REQUESTS} requests")


def in_child(act: Callable[[], object], server: TinyS3 | None = None, number: int = 0) -> bool:
    """Do it in a fork; say whether it was killed at its n-th request."""
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.read(ready, 1)
            act()
            code = 0
        except Exception as exc:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            os.write(2, f"{type(exc).__name__}: {exc}\n".encode())
        finally:
            os._exit(code)
    if server is not None:
        server.kill(pid, number)
    os.write(go, b"x")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if server is not None:
        server.spare()  # While the id is still the child's.
    _, status = os.waitpid(pid, 0)
    os.close(ready)
    os.close(go)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def look(root: ObjectRepository, act: Setup, work: Path, expected: set[tuple[int, ...]]) -> None:
    errors = [p for p in verify(root, models=False) if p.severity.value == "error"]
    assert errors == [], errors
    for entry in scan(root):
        assert entry.served_versions, f"{entry.name} serves nothing: {entry.problems}"
        for version in entry.versions:
            assert version.manifest is not None or act is OPERATIONS["adopt"][1]
    again_or_gone(lambda: act(root, work))
    gc(root, keep=100)
    assert verify(root, models=False) == (), verify(root, models=False)
    assert read_ledger(open_client(root), "m").pending == {}
    found = tuple(v.version for model in scan(root) for v in model.versions)
    assert found in expected, found
    store = open_client(root)
    there = {int(name) for name in store.list("m").folders}
    assert there == set(found), f"left behind: {there - set(found)}"


if __name__ == "__main__":
    os.environ.update(s3_environment())
    with tiny_s3() as running:
        print(kill_everywhere(sys.argv[1], running, Path(sys.argv[2])))
