"""A repository to kill commands on: in a folder, where the n-th file-system call kills, or in a bucket, where the n-th
request does.

Disk: calls are counted by an audit hook (open, mkdir, rename, remove, rmdir, scandir, flock, ...) and, as Python does
not audit them, by wrappers around os.write and os.fsync. Dying before call n+1 is dying after call n, so the points
cover every state on disk; a write also dies half-way.

Objects: the store kills the process whose request arrives, before it does anything. A child uses the store only once it
is forked: its client has threads, and a fork of a process with them would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from support.object_stores import s3_environment
from support.tiny_s3 import State, TinyS3, tiny_s3

from repo_manager.repository.location import Location, ObjectRepository, parse_location
from repo_manager.repository.stores.objects.ledger import read_ledger
from repo_manager.repository.stores.objects.store import ObjectStore  # Here, because a child is killed at once.

Act = Callable[[], object]


class Place(Protocol):
    """A repository `root` and another one beside it, `production`; `work` is a folder for sources.

    Paths are relative to the repository, with `/`.
    """

    work: Path
    root: Location
    production: Location

    def read(self, path: str) -> bytes | None: ...

    def write(self, path: str, data: bytes) -> None: ...

    def delete(self, path: str) -> None: ...

    def rest(self) -> list[str]:
        """Stray content while no command runs."""

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Every path, a folder's with `/` at its end, and its content."""

    def keep(self, name: str) -> None:
        """Remember the present content."""

    def restore(self, name: str) -> None:
        """Put back the content remembered under this name."""

    def dies(self, act: Act, number: int) -> bool:
        """Do it in a child killed at its n-th call. Return whether it came so far."""

    def isolated(self, act: Act) -> None:
        """Do it where it cannot disturb a later child. Its errors become an AssertionError here."""

    def download(self, folder: Path) -> None:
        """Copy both repositories as a server would see them, without models under removal as a whole."""


def in_child(act: Act, before: Callable[[int], None] = lambda _: None, after: Act = lambda: None) -> bool:
    """Do it in a fork; say whether it was killed.

    `before` gets the child's id while it waits to begin; `after` runs while the id is still the child's.
    """
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.read(ready, 1)
            act()
            code = 0
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            os.write(2, f"{type(exc).__name__}: {exc}\n".encode())
        finally:
            os._exit(code)
    before(pid)
    os.write(go, b"x")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    after()
    _, status = os.waitpid(pid, 0)
    os.close(ready)
    os.close(go)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False


class Countdown:
    """Kills this process at the n-th counted call."""

    EVENTS = frozenset(
        {
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.scandir",
            "os.listdir",
            "fcntl.flock",
            "os.utime",
        }
    )

    def __init__(self, count: int) -> None:
        self.left = count
        self.real_write, self.real_fsync = os.write, os.fsync

    def arm(self) -> None:
        os.write, os.fsync = self.write, self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self.EVENTS:
            self.tick()

    def tick(self) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def write(self, descriptor: int, data: Any) -> int:
        self.tick()
        if self.left == 1 and len(data) > 1:
            self.real_write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real_write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self.tick()
        self.real_fsync(descriptor)


class DiskPlace:
    """A folder."""

    def __init__(self, work: Path, name: str = "place") -> None:
        self.work = work
        self.place = work / name
        self.place.mkdir(parents=True, exist_ok=True)
        self.root: Path = self.place / "models"
        self.production: Path = self.place / "production"

    def read(self, path: str) -> bytes | None:
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def delete(self, path: str) -> None:
        (self.root / path).unlink()

    def rest(self) -> list[str]:
        names = [path.name for path in (*self.place.iterdir(), *self.root.iterdir())]
        return [n for n in names if ("staging" in n or n.endswith("probe")) and "production" not in n]

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for path in self.place.rglob("*"):
            name = str(path.relative_to(self.place))
            if path.is_symlink():
                yield name, os.fsencode(path.readlink())
            else:
                yield (f"{name}/", b"") if path.is_dir() else (name, path.read_bytes())

    def keep(self, name: str) -> None:
        shutil.rmtree(self.work / f"kept-{name}", ignore_errors=True)
        shutil.copytree(self.place, self.work / f"kept-{name}")

    def restore(self, name: str) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.work / f"kept-{name}", self.place)

    def dies(self, act: Act, number: int) -> bool:
        def armed() -> None:
            Countdown(number).arm()
            act()

        return in_child(armed)

    def isolated(self, act: Act) -> None:
        act()

    def download(self, folder: Path) -> None:
        for source in (self.root, self.production):
            if source.is_dir():
                shutil.copytree(source, folder / source.name, symlinks=True)


class ObjectPlace:
    """A bucket in memory."""

    def __init__(self, work: Path, server: TinyS3) -> None:
        self.work, self.server = work, server
        base = f"s3://http://127.0.0.1:{server.port}/bucket"
        root = parse_location(f"{base}/models")
        assert isinstance(root, ObjectRepository)
        self.root: ObjectRepository = root
        self.production = parse_location(f"{base}/production")
        self.kept: dict[str, State] = {}

    def read(self, path: str) -> bytes | None:
        found = ObjectStore(self.root).client.get(path)
        return None if found is None else found[0]

    def write(self, path: str, data: bytes) -> None:
        ObjectStore(self.root).client.put(path, data)

    def delete(self, path: str) -> None:
        ObjectStore(self.root).client.delete([path])

    def rest(self) -> list[str]:
        """Versions still being published or removed, and objects below a number without a version."""
        client = ObjectStore(self.root).client
        found = []
        for name in client.list().folders:
            found += [f"{name}: {entry}" for entry in read_ledger(client, name).pending.values()]
            for number in client.list(name).folders:
                if number.isdecimal() and client.head(f"{name}/{number}/manifest.json") is None:
                    found.append(f"{name}/{number}")
        return found

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for key, (data, _) in self.server.objects.items():
            yield key, data

    def keep(self, name: str) -> None:
        self.kept[name] = dict(self.server.objects)

    def restore(self, name: str) -> None:
        self.server.objects = dict(self.kept[name])

    def dies(self, act: Act, number: int) -> bool:
        return in_child(act, lambda pid: self.server.kill(pid, number), self.server.spare)

    def isolated(self, act: Act) -> None:
        assert not in_child(act)

    def download(self, folder: Path) -> None:
        going = {key[: -len(".state")].replace(".repo-manager.", "") for key in self.server.objects if self._goes(key)}
        for key, (data, _) in self.server.objects.items():
            if "/".join(key.split("/")[:2]) not in going:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                (folder / key).write_bytes(data)

    def _goes(self, key: str) -> bool:
        if not key.endswith(".state"):
            return False
        pending = json.loads(self.server.objects[key][0])["pending"]
        return any(entry["whole"] for entry in pending.values())


@contextlib.contextmanager
def place_in(
    store: str, work: Path, set_variable: Callable[[str, str], object] = os.environ.__setitem__
) -> Iterator[Place]:
    """Give an empty place, `disk` or `objects`. `set_variable` sets the credentials in the environment."""
    work.mkdir(parents=True, exist_ok=True)
    if store == "disk":
        yield DiskPlace(work)
        return
    for name, value in s3_environment().items():
        set_variable(name, value)
    with tiny_s3() as running:
        yield ObjectPlace(work, running)
