"""One supervised tritonserver process: started, watched, stopped, its log read."""

from __future__ import annotations

import contextlib
import dataclasses
import marshal
import os
import re
import resource
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.errors import InputError, ServerError

__all__ = [
    "POLL_FAILED",
    "ServerProcess",
    "is_running",
    "log_end",
    "poll_failure",
    "reason_in_log",
    "shared_memory_prefix",
    "start_ticks",
    "sweep_shared_memory",
]

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = re.compile(r"repo_manager_(?P<namespace>\d+)_(?P<pid>\d+)_[0-9a-f]+_")
_LOG_REASON = re.compile(r"^(?:error: |E\d{4} \S+\s+\d+ \S+\] )(?P<reason>.*)$")
_OPEN_FILES = 256
POLL_FAILED = "failed to poll"
"""Triton's message for a load whose folder cannot be read, whatever the reason."""
_LOG_END_BYTES = 64 << 10
_PARSE_ERROR = re.compile(r"libprotobuf ERROR .*?\] (?:Error parsing text-format inference\.ModelConfig: )?(.*)$")
_NOTHING_IN_FLIGHT = "Found 0 model versions that have in-flight inferences"


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or `None` when it does not run.

    With the process id it names a process for good: ids are used again, start times are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def is_running(pid: int, ticks: int) -> bool:
    """Return whether the process started at `ticks` still runs under `pid`."""
    return start_ticks(pid) == ticks


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def shared_memory_prefix() -> str:
    """Return a prefix for the shared memory of one server: no other server on this machine has it."""
    return f"repo_manager_{_pid_namespace()}_{os.getpid()}_{secrets.token_hex(4)}_"


def sweep_shared_memory() -> tuple[str, ...]:
    """Remove the shared memory of servers whose owner and supervisor were both killed. Return the names."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(_SHARED_MEMORY.iterdir()):
            match = _PREFIX.match(path.name)
            # Processes of another container are invisible here, so their regions are left alone.
            if (
                match is None
                or int(match["namespace"]) != _pid_namespace()
                or start_ticks(int(match["pid"])) is not None
            ):
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return tuple(removed)


def _allow_open_files() -> None:
    """Raise the limit on open files as far as it goes where it is low: a tritonserver without them hangs, or misreads.

    Raises:
        InputError: the limit is too low for the server.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        raise InputError(
            f"a process may open {hard} files here, and tritonserver needs {_OPEN_FILES}",
            hint="Raise the limit of open files: ulimit -n 1024.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))


def reason_in_log(text: str) -> str | None:
    """Return Triton's own reason for ending: its last error, with its continuation lines."""
    lines = text.splitlines()
    for index in range(len(lines) - 1, -1, -1):
        match = _LOG_REASON.match(lines[index])
        if match:
            rest = [
                line for line in lines[index + 1 : index + 12] if line.strip() and not re.match(r"[IWE]\d{4} ", line)
            ]
            return "\n".join([match["reason"].strip('" '), *rest])
        if lines[index].startswith("Bad option: "):
            return " ".join(lines[index:]).strip()
    return None


def log_end(path: Path) -> str:
    """Return the end of a log. Empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def poll_failure(text: str, name: str) -> str | None:
    """Return why Triton could not read a model's folder, by its log, or `None` when the log does not say.

    Its answer to the load is "failed to poll from model repository" only. Where the folder's config.pbtxt cannot be
    parsed, protobuf has said in a line of its own the number of the faulty line.
    """
    lines = text.splitlines()
    for index in range(len(lines) - 1, -1, -1):
        match = re.search(rf"Poll failed for model directory '{re.escape(name)}': (?P<reason>.*?)\"?$", lines[index])
        if match:
            parsed = _PARSE_ERROR.search(lines[index - 1]) if index else None
            return match["reason"] + (f" ({parsed[1]})" if parsed else "")
    return None


@dataclasses.dataclass
class ServerProcess:
    """A tritonserver under a supervisor. See `supervisor.py` for the guarantees on its end.

    Attributes:
        pid: the tritonserver's process id, not its supervisor's.
        log: the file its output goes to.
    """

    pid: int
    log: Path
    _supervisor: subprocess.Popen[bytes]
    _offset: int
    _exit_code: int | None = None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        shm_prefix: str,
        hidden: Sequence[str] = (),
    ) -> ServerProcess:
        """Start a tritonserver.

        Args:
            command: command line of the server.
            environment: the server's whole environment. It inherits no other variable.
            log: the file its output is appended to.
            shm_prefix: beginning of its shared memory's names. At the end the supervisor removes all with such a name.
            hidden: more arguments, hidden from other users of the machine.

        Raises:
            ServerError: it cannot be started.
            InputError: it may not open enough files.
        """
        _allow_open_files()
        offset = log.stat().st_size if log.exists() else 0
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C reaches only this process. It stops the server in order.
            start_new_session=True,
        )
        spec = {
            "command": list(command),
            "environment": dict(environment),
            "log": str(log),
            "shm_prefix": shm_prefix,
            "hidden": list(hidden),
        }
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        try:
            # Sent through the pipe, because the environment may hold secrets and a command line is public.
            content = marshal.dumps(spec)
            supervisor.stdin.write(len(content).to_bytes(8, "little") + content)
            supervisor.stdin.flush()
            line = supervisor.stdout.readline()
            if not line:
                raise ServerError(f"The supervisor of {command[0]} ended at once", hint=f"Its log: {log}")
            return cls(int(line.split()[1]), log, supervisor, offset)
        except BaseException:
            supervisor.kill()
            supervisor.wait()
            supervisor.stdin.close()
            supervisor.stdout.close()
            raise

    def shows(self, text: str) -> bool:
        """Return whether the process list has a text among the server's arguments, for every user of the machine."""
        try:
            return os.fsencode(text) in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def poll(self) -> int | None:
        """Return the exit code when the server has ended (negative: killed by a signal), else `None`."""
        with self._lock:
            if self._exit_code is None and self._supervisor.poll() is not None:
                self._exit_code = self._read_exit_code()
            return self._exit_code

    def _read_exit_code(self) -> int:
        pipes = (self._supervisor.stdin, self._supervisor.stdout)
        assert pipes[1] is not None
        output = pipes[1].read()
        for pipe in pipes:
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for line in output.splitlines():
            if line.startswith(b"exit "):
                return int(line[5:])
        # The supervisor was killed, and the kernel then killed the server (PR_SET_PDEATHSIG).
        return -9

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the server's end. Return its exit code, or `None` after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(timeout_s)
        return self.poll()

    def stop(self, deadline_s: float, *, unload_s: float = 5.0) -> int:
        """End the server: SIGTERM, and SIGKILL to its whole group after a deadline. Return its exit code.

        Safe to call twice, and to interrupt: a second call goes on where the first one was cut off.

        Args:
            deadline_s: for everything, the end of in-flight requests included.
            unload_s: seconds for the unloads after the last request. Triton waits 30 s for a dead stub.
        """
        if self.poll() is None:
            deadline = time.monotonic() + deadline_s
            self._tell(f"TERM {deadline_s}")
            self.wait_for_log(_NOTHING_IN_FLIGHT, deadline_s)
            if self.poll() is None and time.monotonic() + unload_s < deadline:
                self._tell(f"KILL {unload_s}")
            if self.wait(deadline_s + 10.0) is None:
                self._supervisor.kill()
                self._supervisor.wait()
        code = self.poll()
        assert code is not None
        return code

    def _tell(self, command: str) -> None:
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._supervisor.stdin.write(command.encode() + b"\n")
            self._supervisor.stdin.flush()

    def read_log(self) -> str:
        """Return this run's output of the server so far."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._offset)
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def wait_for_log(self, text: str, timeout_s: float) -> bool:
        """Wait until this run has logged `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.read_log():
            if time.monotonic() > deadline or self.poll() is not None:
                return False
            time.sleep(0.02)
        return True
