"""Run one tritonserver and outlive neither it nor its owner (a script: started with `python -I -S`).

It reads one line of JSON from standard input (`command`, `environment`, `log`, `shm_prefix`) and
writes `{"pid": ...}`, later `{"exit": ...}`, to standard output. Standard input then stays open: its
end means that the owner is gone, however it died, and everything is killed at once. `TERM <seconds>`
asks for an orderly stop with a deadline, `KILL <seconds>` sets a nearer one.

Nothing is left behind: the server and its stubs share one process group, which is killed when the
server has ended for whatever reason; stubs that lost their parent become children of this process
(PR_SET_CHILD_SUBREAPER); then the shared memory with the server's prefix is removed.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY = pathlib.Path("/dev/shm")
POLL_S = 0.5


def spawn(spec: dict[str, object]) -> int:
    """Start the server in a process group of its own, its output in the log; return its process id."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = [str(part) for part in spec["command"]]  # type: ignore[attr-defined]
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # also done by the child: whoever comes first
        return pid
    try:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(str(spec["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.execve(command[0], command, spec["environment"])  # type: ignore[arg-type]
    except OSError as exc:
        os.write(2, f"error: cannot start {command[0]}: {exc}\n".encode())
    os._exit(127)


def watch(server: int, wakeup: int) -> int:
    """Wait for the server's end, obeying the owner; return its exit code (negative: the signal)."""
    owner = os.getppid()
    deadline = None
    pending = b""
    sources = [0, wakeup]
    while True:
        timeout = POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic()))
        readable, _, _ = select.select(sources, [], [], timeout)
        if wakeup in readable:
            os.read(wakeup, 4096)
        code = reap(server)
        if code is not None:
            return code
        if 0 in readable:
            data = os.read(0, 4096)
            pending += data
            if not data:
                os.killpg(server, signal.SIGKILL)
                sources = [wakeup]
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            deadline = time.monotonic() + float(line[5:])
            if line.startswith(b"TERM "):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGTERM)
        if os.getppid() != owner or (deadline is not None and time.monotonic() >= deadline):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server, signal.SIGKILL)


def reap(server: int) -> "int | None":
    """Collect every ended child; return the server's exit code when it was among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == server:
            code = os.waitstatus_to_exitcode(status)


def clean_up(server: int, shm_prefix: str) -> None:
    """Kill what is left of the server's process group and remove its shared memory."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            os.killpg(server, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        reap(server)
        time.sleep(0.005)
    for path in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def main() -> None:
    """Run one server from its start to its end."""
    # Standard input is read unbuffered: what follows the first line belongs to watch().
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    spec = json.loads(line)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = spawn(spec)
    report({"pid": server})
    code = watch(server, reader)
    clean_up(server, spec["shm_prefix"])
    report({"exit": code})


def report(message: dict[str, int]) -> None:
    """Tell the owner; an owner that is gone does not mind."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
    sys.exit(0)
