"""The process for foreign models, as its owner sees it: one for all models, started when one is needed.

ONNX Runtime neither ends an operator nor a load on request, allocates what a graph asks for, and may crash on one. So
it runs in a process of its own, killed by a deadline, a signal, or the end of its owner.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import dataclasses
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_manager.errors import InputError, ModelError, UsageError
from repo_manager.optional import deferred, is_installed, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = deferred("numpy")

__all__ = [
    "RuntimeLateError",
    "RuntimeLimits",
    "RuntimeProcess",
    "RuntimeRefusedError",
    "SessionSource",
    "end_runtime",
    "free_host_bytes",
    "runtime_limits",
    "runtime_process",
    "runtime_within",
    "start_runtime",
]

_LENGTH = struct.Struct("<Q")
_HEADER_BYTES = 64 << 20
_START_S = 120.0
_SHARE_OF_MEMORY = 0.75
_ALL_MEMORY = 1 << 60
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)(API|ACCESS|PRIVATE)_?KEY|_KEY$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RuntimeLimits:
    """Limits of a model while ONNX Runtime loads or runs it.

    Attributes:
        timeout_s: how long one load or one run may take.
        memory_bytes: how much memory all loaded models may have together. `None`: three quarters of the free memory.
    """

    timeout_s: float = 600.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise UsageError(f"--timeout {self.timeout_s:g}: expected seconds above 0")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise UsageError(f"--memory {self.memory_bytes} bytes: expected a size above 0")


@dataclasses.dataclass(frozen=True)
class SessionSource:
    """A model to load, and how.

    Attributes:
        model: its path, or its bytes.
        level: the name of ONNX Runtime's level of graph optimisation.
        entries: sets of configuration entries. The first the model loads with counts.
        arena: let memory be kept between runs.
        threads: within one operator. `None` leaves it to ONNX Runtime.
    """

    model: str | bytes
    level: str
    entries: tuple[Mapping[str, str], ...] = ({},)
    arena: bool = True
    threads: int | None = None


class RuntimeLateError(InputError):
    """A load or a run took too long. No `ModelError`: a probe of a batch takes that for a finding, and goes on."""


class RuntimeRefusedError(Exception):
    """ONNX Runtime refused something. The text is its own."""


_limits = RuntimeLimits()
_within: contextvars.ContextVar[float] = contextvars.ContextVar("_within", default=math.inf)


@contextlib.contextmanager
def runtime_limits(limits: RuntimeLimits) -> Iterator[None]:
    """Let these limits hold for every model loaded in the block, in all threads."""
    global _limits
    before, _limits = _limits, limits
    if before.memory_bytes != limits.memory_bytes:
        end_runtime()
    try:
        yield
    finally:
        _limits = before
        if before.memory_bytes != limits.memory_bytes:
            end_runtime()


@contextlib.contextmanager
def runtime_within(timeout_s: float) -> Iterator[None]:
    """Limit each load and each run in the block, in this thread, to this time, besides the other limits."""
    token = _within.set(min(timeout_s, _within.get()))
    try:
        yield
    finally:
        _within.reset(token)


class RuntimeProcess:
    """The process. Its methods may be called from any thread. One request runs at a time."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes, self.version, self.owner = memory_bytes, "", os.getpid()
        self._lock, self._numbers = threading.Lock(), iter(range(1 << 62))
        self._errors = os.fdopen(os.memfd_create("errors", os.MFD_CLOEXEC), "w+b")
        self._said = ""
        self._peer, theirs = socket.socketpair()
        with theirs:
            child = str(Path(__file__).with_name("runtime_child.py"))
            # A new session: Ctrl-C in the terminal reaches only the owner, and the owner kills the process.
            self._process = subprocess.Popen(
                [sys.executable, child, str(theirs.fileno()), str(memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env={name: value for name, value in os.environ.items() if not _SECRET.search(name)},
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        """Return whether it can still be asked."""
        return self._process.poll() is None and self._peer.fileno() >= 0

    def greet(self) -> None:
        """Wait until it has started."""
        with self._lock:
            if not self.version:
                answer, _ = self._exchange(None, [], _START_S, "starting ONNX Runtime")
                self.version = str(answer["version"])

    def open(self, source: SessionSource, where: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        """Load a model.

        Returns:
            Its number, and `inputs`, `outputs` and `initializers`, each with `name`, `type` and `shape`.

        Raises:
            RuntimeRefusedError: ONNX Runtime does not take it.
            RuntimeLateError: it takes too long.
            ModelError: the process died of it.
        """
        number = next(self._numbers)
        header = {
            "do": "open",
            "session": number,
            "path": str(Path(source.model).absolute()) if isinstance(source.model, str) else None,
            "level": source.level,
            "entries": [dict(entries) for entries in source.entries],
            "arena": source.arena,
            "threads": source.threads,
        }
        content = [np.frombuffer(source.model, dtype=np.uint8)] if isinstance(source.model, bytes) else []
        answer, _ = self._ask(header, content, f"{where}: loading it")
        return number, answer

    def run(self, number: int, inputs: Mapping[str, NDArray[Any]], where: str) -> list[NDArray[Any] | str]:
        """Run the loaded model `number` once, on `inputs` (name -> array). Errors name `where`, as `Session.run` does.

        Returns:
            Its outputs in order. For anything but a tensor the name of its type.

        Raises:
            RuntimeRefusedError: an input or an operator failed.
            RuntimeLateError: it takes too long.
            ModelError: the process died of it.
        """
        header = {"do": "run", "session": number, "names": list(inputs)}
        answer, arrays = self._ask(header, list(inputs.values()), f"{where}: running it")
        left = iter(arrays)
        return [next(left) if kind is None else str(kind) for kind in answer["kinds"]]

    def close(self, number: int) -> None:
        """Let a model go. Nothing happens when the process is gone."""
        with contextlib.suppress(OSError), self._lock:
            if self.is_alive and self.owner == os.getpid():
                self._peer.settimeout(1.0)
                _send(self._peer, {"do": "close", "session": number}, [], time.monotonic() + 1.0)

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self.owner == os.getpid() and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._peer.close()
        if not self._errors.closed:
            self._errors.seek(0)
            self._said = self._errors.read(1 << 16).decode("utf-8", "replace").strip()
            self._errors.close()

    def _ask(
        self, header: dict[str, Any], arrays: Sequence[NDArray[Any]], what: str
    ) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        with self._lock:
            if not self.is_alive:
                raise ModelError(f"{what} failed: the process of ONNX Runtime has ended before")
            answer, results = self._exchange(header, arrays, min(_limits.timeout_s, _within.get()), what)
        if "error" in answer:
            raise RuntimeRefusedError(str(answer["error"]))
        return answer, results

    def _exchange(
        self, header: dict[str, Any] | None, arrays: Sequence[NDArray[Any]], timeout_s: float, what: str
    ) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        """Ask and wait for the answer. Any interruption kills the process."""
        deadline = time.monotonic() + timeout_s
        try:
            if header is not None:
                _send(self._peer, header, arrays, deadline)
            return _receive(self._peer, self.memory_bytes, deadline)
        except TimeoutError:
            self.kill()
            hint = "Give it more time with --timeout SECONDS if the model is that slow."
            raise RuntimeLateError(f"{what} took ONNX Runtime more than {timeout_s:.3g} s", hint=hint) from None
        except (OSError, EOFError, ValueError, LookupError, TypeError, MemoryError) as exc:
            self.kill()
            raise ModelError(f"{what} failed: {self._end(exc)}") from None
        except BaseException:  # Ctrl-C or SIGTERM
            self.kill()
            raise

    def _end(self, exc: Exception) -> str:
        """Say how it ended."""
        code = self._process.returncode
        last = f": {self._said.splitlines()[-1][:300]}" if self._said else ""
        if not isinstance(exc, EOFError | ConnectionError):
            return f"what came back from ONNX Runtime is no answer ({type(exc).__name__})"
        if code == -signal.SIGKILL:
            return "the process of ONNX Runtime was killed, as when memory ends"
        how = f"crashed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"the process of ONNX Runtime {how}{last}"


_process: RuntimeProcess | None = None
_starting = threading.Lock()


def runtime_process() -> RuntimeProcess:
    """Return the process, started when there is none. It lives until this one ends.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ModelError: it does not start.
    """
    process = _started()
    process.greet()
    return process


def _started() -> RuntimeProcess:
    global _process
    with _starting:
        if _process is None or _process.owner != os.getpid() or not _process.is_alive:
            if not is_installed("onnxruntime"):
                require("onnxruntime")
            free = free_host_bytes()
            allowed = _ALL_MEMORY if free is None else int(free * _SHARE_OF_MEMORY)
            _process = RuntimeProcess(_limits.memory_bytes or allowed)
        return _process


def start_runtime() -> None:
    """Start the process where it will be needed: its imports then run beside this one's work."""
    _started()


def end_runtime() -> None:
    """End the process, if there is one, with all loaded models."""
    global _process
    found, _process = _process, None
    if found is not None:
        found.kill()


atexit.register(end_runtime)


def free_host_bytes() -> int | None:
    """Return the free memory of this machine or container, or `None` if the system does not report it."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    free = None if match is None else int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" is not a number: no limit
        left = limit - int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        free = left if free is None else min(free, left)
    return free


def _send(peer: socket.socket, header: Mapping[str, Any], arrays: Sequence[NDArray[Any]], deadline: float) -> None:
    """Send a message.

    Raises:
        TimeoutError: not in time.
        OSError: the process is gone.
    """
    contents: list[Any] = []
    described = []
    for array in arrays:
        if array.dtype.kind in "OUS":
            texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in array.flat]
            contents.append(json.dumps(texts).encode())
            described.append(["str", array.shape, len(contents[-1])])
        else:
            whole = np.ascontiguousarray(array)
            kind = whole.dtype.str if whole.dtype.kind != "V" else f"|V{whole.dtype.itemsize}"
            contents.append(whole.reshape(-1).view(np.uint8).data if whole.size else b"")
            described.append([kind, array.shape, whole.nbytes])
    text = json.dumps({**header, "arrays": described}).encode()
    for content in (_LENGTH.pack(len(text)) + text, *contents):
        peer.settimeout(_left_s(deadline))
        peer.sendall(content)


def _receive(peer: socket.socket, limit_bytes: int, deadline: float) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Return the next message. The process may say anything: a model may have taken it over.

    Raises:
        TimeoutError: not in time.
        OSError: the process is gone.
        EOFError: the process is gone.
        ValueError, LookupError, TypeError, MemoryError: it is no message.
    """
    length = _LENGTH.unpack(_read(peer, bytearray(_LENGTH.size), deadline))[0]
    if length > _HEADER_BYTES:
        raise ValueError(length)
    header = json.loads(bytes(_read(peer, bytearray(length), deadline)))
    arrays: list[NDArray[Any]] = []
    for kind, shape, size in header["arrays"]:
        if not 0 <= size <= limit_bytes:
            raise ValueError(size)
        if kind == "str":
            texts = json.loads(bytes(_read(peer, bytearray(size), deadline)))
            arrays.append(np.array(texts, dtype=object).reshape(shape))
            continue
        array = np.empty(size, dtype=np.uint8)
        _read(peer, array, deadline)
        arrays.append(array.view(np.dtype(str(kind))).reshape(shape))
    return header, arrays


def _read(peer: socket.socket, buffer: Any, deadline: float) -> Any:
    """Fill a buffer and return it."""
    view = memoryview(buffer)
    while len(view):
        peer.settimeout(_left_s(deadline))
        count = peer.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return buffer


def _left_s(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
