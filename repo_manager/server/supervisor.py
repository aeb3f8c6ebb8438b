"""Run one tritonserver and outlive neither it nor its owner (a script: started with `python -I -S`).

It reads a length (8 bytes, little-endian) and as many bytes of `marshal` from standard input (a dict of `command`,
`environment`, `log`, `shm_prefix`, `hidden`) and writes `pid N`, later `exit N`, to standard output. Standard input
then stays open: its end means the owner is gone, however it died, and everything is killed at once. `TERM <seconds>`
asks for an orderly stop with a deadline, `KILL <seconds>` sets a nearer one.

Nothing is left behind. The server and its stubs share one process group, killed when the server ends. Orphaned stubs
become children of this process (PR_SET_CHILD_SUBREAPER, prctl(2)). Then the shared memory with the server's prefix is
removed.

Other users of the machine can neither read `hidden` arguments in the process list (see `hide_arguments`) nor open the
files (umask) and the shared memory (see `keep_memory_private`) made by the server.

The server starts only after this process. So it imports only the modules for the start, and the rest later: json and
pathlib alone would cost more than the interpreter.
"""

import ctypes
import marshal
import os

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 1, 2, 9, 13, 15, 17, 25
"""As Linux numbers them on every architecture Triton runs on. The signal module is not imported yet."""
SIG_DFL, SIG_IGN = 0, 1
SHARED_MEMORY = "/dev/shm"
POLL_S = 0.5

PTRACE_TRACEME, PTRACE_DETACH = 0, 17
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 4
SECCOMP_RET_ALLOW, SECCOMP_RET_SUCCESS = 0x7FFF0000, 0x00050000
SYSTEM_CALLS = {"x86_64": (0xC000003E, 317, 91), "aarch64": (0xC00000B7, 277, 52)}
"""For each machine Triton runs on: AUDIT_ARCH_*, and the numbers of seccomp and fchmod."""
PLACEHOLDER = "(hidden)"
HIDDEN_NAME = b"_REPO_MANAGER_HIDDEN_%d"
WORD = ctypes.sizeof(ctypes.c_void_p)


def spawn(spec: dict[str, object]) -> int:
    """Start the server. Return its process id.

    Hidden arguments stay visible where the system allows no tracing: the owner looks whether they are.
    """
    hidden = [os.fsencode(str(part)) for part in spec.get("hidden", ())]  # type: ignore[attr-defined]
    if not hidden:
        return start(spec, [], traced=False)
    pid = start(spec, hidden, traced=True)
    if hide_arguments(pid, hidden):
        return pid
    return start({**spec, "command": [*spec["command"], *map(os.fsdecode, hidden)]}, [], traced=False)  # type: ignore[misc]


def start(spec: dict[str, object], hidden: "list[bytes]", *, traced: bool) -> int:
    """Start the server in a process group of its own, its output in the log. Return its process id.

    Args:
        spec: as it came from the owner.
        hidden: arguments it finds in its environment at first, with placeholders at the end of its command line.
        traced: stop it before its first instruction.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (SIGHUP, SIGINT, SIGTERM):
        libc.signal(number, SIG_IGN)  # only the owner, or its end, stops the server
    command = [str(part) for part in spec["command"]]  # type: ignore[attr-defined]
    pid = os.fork()
    if pid:
        try:  # noqa: SIM105  # contextlib is not imported yet
            os.setpgid(pid, pid)  # parent and child both do this, so the order does not matter
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
            libc.signal(number, SIG_DFL)  # execve resets handlers but keeps ignored signals ignored
        os.umask(0o077)
        keep_memory_private(libc)
        if traced and libc.ptrace(PTRACE_TRACEME, 0, None, None) == -1:
            os._exit(126)
        environment = {**spec["environment"]}  # type: ignore[dict-item]
        for index, argument in enumerate(hidden):  # the last arguments, in this order
            environment[HIDDEN_NAME % index] = argument
        os.execve(command[0], command + [PLACEHOLDER] * len(hidden), environment)
    except OSError as exc:
        os.write(2, f"error: cannot start {command[0]}: {exc}\n".encode())
    os._exit(127)


def hide_arguments(pid: int, hidden: "list[bytes]") -> bool:
    """Give the server its last arguments without showing them. Return whether this was possible (else it is ended).

    Everyone may read a process's command line, and nobody but its owner its environment. execve puts both onto the new
    process's stack, and the vector of arguments is made of pointers to them. The server stops before its first
    instruction (ptrace), its last pointers are set to where the environment has the arguments, and it goes on: at no
    moment has the command line more than the placeholders. The variables become copies of another one, so the server's
    children do not inherit them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if not os.WIFSTOPPED(os.waitpid(pid, 0)[1]):
        return False
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        try:
            point_into_environment(memory, stack_of(pid), hidden)
        finally:
            os.close(memory)
        if libc.ptrace(PTRACE_DETACH, pid, None, None) == 0:
            return True
    except (OSError, ValueError, IndexError):
        pass
    os.kill(pid, SIGKILL)
    os.waitpid(pid, 0)
    return False


def stack_of(pid: int) -> int:
    """Return the address of a freshly started process's arguments."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  # pathlib is not imported yet
        return int(file.read().rpartition(b")")[2].split()[25])


def point_into_environment(memory: int, stack: int, hidden: "list[bytes]") -> None:
    """Set the last pointers of the vector of arguments to the values of the last variables of the environment.

    The stack has a word with the number of arguments, as many pointers, a zero, and pointers to the variables.

    Args:
        memory: file descriptor of the process's memory.
        stack: address of the word with the number of arguments, from `stack_of`.
        hidden: the hidden arguments, the last ones of the command line.

    Raises:
        OSError: it cannot be read or written.
        ValueError: something else is there.
    """

    def word(address: int) -> int:
        return int.from_bytes(os.pread(memory, WORD, address), "little")

    count = word(stack)
    if not len(hidden) < count < 10_000 or word(stack + WORD * (count + 1)):
        raise ValueError("no vector of arguments")
    variables = stack + WORD * (count + 2)
    end = variables
    while word(end):
        end += WORD
    for index, argument in enumerate(hidden):
        place, pointer = (top - WORD * (len(hidden) - index) for top in (end, stack + WORD * (count + 1)))
        variable, start = HIDDEN_NAME % index + b"=" + argument + b"\0", word(place)
        if os.pread(memory, len(variable), start) != variable:
            raise ValueError("no such variable")
        os.pwrite(memory, (start + variable.index(b"=") + 1).to_bytes(WORD, "little"), pointer)
        os.pwrite(memory, word(variables).to_bytes(WORD, "little"), place)


def keep_memory_private(libc: ctypes.CDLL) -> None:
    """Let the shared memory of the server and of its stubs belong to their owner alone.

    Boost makes the regions with mode 0644 and then sets this mode once more with fchmod, against the umask. A filter
    for system calls (seccomp; children inherit it) has this one call succeed without an effect.
    """
    found = SYSTEM_CALLS.get(os.uname().machine)
    if found is None:
        return
    architecture, seccomp, fchmod = found
    load, equals, done = 0x20, 0x15, 0x06
    program = (  # code, steps when true, steps when false, value; 0, 4 and 24 are offsets in struct seccomp_data
        (load, 0, 0, 4), (equals, 0, 5, architecture),
        (load, 0, 0, 0), (equals, 0, 3, fchmod),
        (load, 0, 0, 24), (equals, 0, 1, 0o644),
        (done, 0, 0, SECCOMP_RET_SUCCESS),
        (done, 0, 0, SECCOMP_RET_ALLOW),
    )  # fmt: skip
    code = b"".join(
        op.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for op, yes, no, value in program
    )
    steps = ctypes.create_string_buffer(code, len(code))
    described = ctypes.create_string_buffer(
        len(program).to_bytes(WORD, "little") + ctypes.addressof(steps).to_bytes(WORD, "little"), 2 * WORD
    )
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, described)


def watch(server: int, wakeup: int) -> int:
    """Wait for the server's end, obeying the owner. Return its exit code (negative: the signal)."""
    import contextlib
    import select
    import time

    owner = os.getppid()
    deadline = None
    pending = b""
    sources = [0, wakeup]
    while True:
        code = reap(server)  # before the first wait: the server may end before wake-ups are set up
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
    """Collect every ended child. Return the server's exit code when it was among them."""
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
    """Kill the rest of the server's process group and remove its shared memory."""
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
    """Return a descriptor, readable after a child's end."""
    import signal

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(SIGCHLD, lambda *_: None)
    return reader


def read_exactly(size: int) -> "bytes | None":
    """Read from standard input, unbuffered: the rest belongs to `watch`. `None` at its end."""
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
    spec = marshal.loads(content)  # written by our own process with the same Python
    server = spawn(spec)
    report(f"pid {server}")
    code = watch(server, wake_on_ended_children())
    clean_up(server, spec["shm_prefix"])
    report(f"exit {code}")


def report(message: str) -> None:
    """Tell the owner. A vanished owner does not mind."""
    try:  # noqa: SIM105  # contextlib is not imported yet
        os.write(1, f"{message}\n".encode())
    except OSError:
        pass


if __name__ == "__main__":
    main()
