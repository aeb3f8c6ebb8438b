"""Notice a fault of the Python backend unnoticed by Triton: a dead stub whose version stays READY."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

from repo_manager.errors import ServerError
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions

__all__ = ["StubGuard", "stubs_of"]

_STUB = "triton_python_backend_stub"
_INSTANCE_AT = 8  # index in a stub's arguments (python_backend, stub_launcher.cc)
# While a version loads, unloads or changes its instances, stubs are also missing for a moment.
_GRACE_S = 3.0
_UNLOAD_S = 3.0
_POLL_S = 0.05
READY = "READY"


@dataclasses.dataclass(frozen=True)
class _Stub:
    """The version a stub serves as its path tells it, its instance's name, and its process."""

    model: str
    version: int
    pid: int
    instance: str


def stubs_of(server_pid: int) -> frozenset[_Stub]:
    """Return the living stubs of a tritonserver (from /proc: its children and their command lines)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            if int(parent) != server_pid or state in {"Z", "X"}:
                continue
            arguments = (folder / "cmdline").read_bytes().decode().split("\0")
            if arguments[0].endswith(_STUB):
                # <stub> <repository>/<model>/<version>/<file> ... <instance> <folder of the runtime>. From object
                # storage, the file is a copy, and its path contains no model name.
                version = Path(arguments[1]).parent
                number = int(version.name) if version.name.isdecimal() else 0
                instance = arguments[_INSTANCE_AT] if len(arguments) > _INSTANCE_AT else ""
                found.add(_Stub(version.parent.name, number, int(folder.name), instance))
    return frozenset(found)


class StubGuard:
    """Watches one server's stubs. Call `check` every second or so.

    Args:
        server_pid: process id of the tritonserver on this machine. Its child processes are the stubs.
        url: URL of the same server, as `TritonClient.connect` takes it.
        options: how to connect to it. `None` takes the defaults.
    """

    def __init__(
        self,
        server_pid: int,
        url: str,
        options: ClientOptions | None = None,
    ) -> None:
        self._options = options
        self._pid = server_pid
        self._url = url
        self._known: frozenset[_Stub] | None = None
        self._missing: dict[tuple[str, int], float] = {}

    def check(self) -> tuple[str, ...]:
        """Unload and load the models with a dead stub. Return their names.

        Triton keeps such a version READY and answers every request with an error. Only this repairs it.

        Raises:
            ServerError: the server does not answer, or a model does not come back.
        """
        stubs = stubs_of(self._pid)
        now = time.monotonic()
        if self._known is None:
            self._suspect_all(now)
            self._known = stubs
        for lost in self._known - stubs:
            self._missing.setdefault((lost.model, lost.version), now)
        self._known = stubs
        due = [key for key, since in self._missing.items() if now - since >= _GRACE_S]
        if not due:
            return ()
        mended = []
        with TritonClient.connect(self._url, self._options) as client:
            for key in due:
                del self._missing[key]
            for model, version in self._suspects(client, due):
                if model not in mended and self._lacks_stubs(client, model, version):
                    _reload(client, model)
                    mended.append(model)
        self._known = stubs_of(self._pid)
        return tuple(mended)

    def _suspect_all(self, now: float) -> None:
        """Look closer at every version once: a stub may have died before the first look at them."""
        with TritonClient.connect(self._url, self._options) as client:
            for entry in client.repository_index():
                if entry.version is not None and entry.state == READY:
                    self._missing[entry.name, entry.version] = now

    def _suspects(self, client: TritonClient, lost: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return the versions perhaps without a stub: those whose stubs are gone, or all where a path names no
        model."""
        index = client.repository_index()
        if {(entry.name, entry.version) for entry in index}.issuperset(lost):
            return lost
        return [(entry.name, entry.version) for entry in index if entry.version is not None and entry.state == READY]

    def _lacks_stubs(self, client: TritonClient, model: str, version: int) -> bool:
        served = {(each.name, each.version): each.state for each in client.repository_index()}
        if served.get((model, version)) != READY:
            return False
        config = client.model_config(model, version)
        if config.backend != "python" and not config.runtime.endswith(".py"):
            return False  # native backends have no stubs
        groups = config.instance_group
        wanted = sum(group.count * max(1, len(group.gpus)) for group in groups)
        stubs = stubs_of(self._pid)
        if all((stub.model, stub.version) in served for stub in stubs):
            return sum(stub.model == model and stub.version == version for stub in stubs) < int(wanted)
        # The paths are copies, so count the stubs of all versions of the model by instance name.
        names = {f"{group.name}_{number}" for group in groups for number in range(group.count)}
        versions = sum(name == model and state == READY for (name, _), state in served.items())
        return sum(stub.instance in names for stub in stubs) < int(wanted) * versions


def _reload(client: TritonClient, model: str) -> None:
    """Unload and load a model.

    Raises:
        ServerError: it does not come back.
    """
    client.unload(model)
    deadline = time.monotonic() + _UNLOAD_S
    # Triton may wait for the dead process forever (python_backend, `StubLauncher::TerminateStub`). A version still
    # UNLOADING does not block a load.
    while time.monotonic() < deadline:
        if all(entry.state not in {READY, "UNLOADING"} for entry in client.versions(model).values()):
            break
        time.sleep(_POLL_S)
    try:
        client.load(model)
    except ServerError as exc:
        raise ServerError(f"{model} lost a stub process and did not come back: {exc.message}", hint=exc.hint) from exc
