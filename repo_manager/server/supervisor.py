"""Run one tritonserver and outlive neither it nor its owner (a script: started with `python -I -S`).

It reads a length (8 bytes, little-endian) and as many bytes of `marshal` from standard input (a dict of `command`,
`environment`, `log`, `shm_prefix`) and writes `pid N`, later `exit N`, to standard output. Standard input then stays
open: its end means that the owner is gone, however it died, and everything is killed at once. `TERM <seconds>` asks
for an orderly stop with a deadline, `KILL <seconds>` sets a nearer one.

Nothing is left behind: the server and its stubs share one process group, which is killed when the
server has ended for whatever reason; stubs that lost their parent become children of this process
(PR_SET_CHILD_SUBREAPER); then the shared memory with the server's prefix is removed.

Everybody waits for this process before the server even starts, so it imports only what the start needs, and the rest
when the server is on its way: json and pathlib alone would cost more than the interpreter.
"""

import ctypes
import marshal
import os

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 1, 2, 9, 13, 15, 17, 25
"""As Linux numbers them on every architecture that Triton runs on; the signal module is not imported yet."""
SIG_DFL, SIG_IGN = 0, 1
SHARED_MEMORY = "/dev/shm"
POLL_S = 0.5


def spawn(spec: dict[str, object]) -> int:
    """Start the server in a process group of its own, its output in the log; return its process id."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (SIGHUP, SIGINT, SIGTERM):
        libc.signal(number, SIG_IGN)  # the owner's word counts, or its end
    command = [str(part) for part in spec["command"]]  # type: ignore[attr-defined]
    pid = os.fork()
    if pid:
        try:  # noqa: SIM105  # contextlib is not imported yet
            os.setpgid(pid, pid)  # also done by the child: whoever comes first
        except OSError:
            pass
        return pid
    try:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(str(spec["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number in (SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGXFSZ):
            libc.signal(number, SIG_DFL)  # what is ignored stays so through execve; handlers do not
        os.execve(command[0], command, spec["environment"])  # type: ignore[arg-type]
    except OSError as exc:
        os.write(2, f"error: cannot start {command[0]}: {exc}\n".encode())
    os._exit(127)


def watch(server: int, wakeup: int) -> int:
    """Wait for the server's end, obeying the owner; return its exit code (negative: the signal)."""
    import contextlib
    import select
    import time

    owner = os.getppid()
    deadline = None
    pending = b""
    sources = [0, wakeup]
    while True:
        code = reap(server)  # before the first wait: the server may have ended before there was a wake-up
        if code is not None:
            return code
        timeout = POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic()))
        readable, _, _ = select.select(sources, [], [], timeout)
        if wakeup in readable:
            os.read(wakeup, 4096)
        if 0 in readable:
            data = os.read(0, 4096)
            pending += data
            if not data:
                os.killpg(server, SIGKILL)
                sources = [wakeup]
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            deadline = time.monotonic() + float(line[5:])
            if line.startswith(b"TERM "):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, SIGTERM)
        if os.getppid() != owner or (deadline is not None and time.monotonic() >= deadline):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server, SIGKILL)


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
    import contextlib
    import pathlib
    import time

    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            os.killpg(server, SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        reap(server)
        time.sleep(0.005)
    for path in pathlib.Path(SHARED_MEMORY).glob(f"{shm_prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def wake_on_ended_children() -> int:
    """Return a descriptor that is readable after a child's end."""
    import signal

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(SIGCHLD, lambda *_: None)
    return reader


def read_exactly(size: int) -> "bytes | None":
    """Read from standard input, unbuffered: what follows belongs to `watch`; `None` at its end."""
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            return None
        data += more
    return data


def main() -> None:
    """Run one server from its start to its end."""
    size = read_exactly(8)
    content = None if size is None else read_exactly(int.from_bytes(size, "little"))
    if content is None:
        return
    spec = marshal.loads(content)  # from our own process, the same Python
    server = spawn(spec)
    report(f"pid {server}")
    code = watch(server, wake_on_ended_children())
    clean_up(server, spec["shm_prefix"])
    report(f"exit {code}")


def report(message: str) -> None:
    """Tell the owner; an owner that is gone does not mind."""
    try:  # noqa: SIM105  # likewise
        os.write(1, f"{message}\n".encode())
    except OSError:
        pass


if __name__ == "__main__":
    main()
