"""Notice what the Python backend can suffer without Triton noticing: a stub that died while its version stays READY."""

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
# A version that is being loaded, dropped or resized lacks stubs for a moment, too.
_GRACE_S = 3.0
_UNLOAD_S = 3.0
_POLL_S = 0.05
READY = "READY"


@dataclasses.dataclass(frozen=True)
class _Stub:
    """The version that a stub serves, and its process."""

    model: str
    version: int
    pid: int


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
                # <stub> <repository>/<model>/<version>/<file> ...; from object storage it is a copy somewhere else.
                version = Path(arguments[1]).parent
                number = int(version.name) if version.name.isdecimal() else 0
                found.add(_Stub(version.parent.name, number, int(folder.name)))
    return frozenset(found)


class StubGuard:
    """Watches one server's stubs; call `check` every second or so.

    Args:
        server_pid: the tritonserver's process id.
        url: the server's URL.
        options: how to connect to it; `None` takes the defaults.
    """

    def __init__(self, server_pid: int, url: str, options: ClientOptions | None = None) -> None:
        self._options = options
        self._pid = server_pid
        self._url = url
        self._known: frozenset[_Stub] | None = None
        self._missing: dict[tuple[str, int], float] = {}

    def check(self) -> tuple[str, ...]:
        """Unload and load the models of which a stub has died; return their names.

        Triton keeps such a version READY and answers every request with an error; only this mends it.

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
            for model, version in due:
                del self._missing[model, version]
                if self._lacks_stubs(client, model, version) and model not in mended:
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

    def _lacks_stubs(self, client: TritonClient, model: str, version: int) -> bool:
        entry = client.versions(model).get(version)
        if entry is None or entry.state != READY:
            return False
        config = client.model_config(model, version)
        if config.backend != "python" and not config.runtime.endswith(".py"):
            return False  # a native backend has no stubs
        groups = config.instance_group
        wanted = sum(group.count * max(1, len(group.gpus)) for group in groups)
        stubs = stubs_of(self._pid)
        alive = sum(stub.model == model and stub.version == version for stub in stubs)
        if alive >= wanted:
            return False
        # Stubs of copies that Triton made of an object store's files do not tell which model they serve.
        served = {(entry.name, entry.version) for entry in client.repository_index()}
        return all((stub.model, stub.version) in served for stub in stubs)


def _reload(client: TritonClient, model: str) -> None:
    """Unload and load a model.

    Raises:
        ServerError: it does not come back.
    """
    client.unload(model)
    deadline = time.monotonic() + _UNLOAD_S
    # Triton may wait for the dead process for ever; a version that is UNLOADING does not hinder a load.
    while time.monotonic() < deadline:
        if all(entry.state not in {READY, "UNLOADING"} for entry in client.versions(model).values()):
            break
        time.sleep(_POLL_S)
    try:
        client.load(model)
    except ServerError as exc:
        raise ServerError(f"{model} lost a stub process and did not come back: {exc.message}", hint=exc.hint) from exc
