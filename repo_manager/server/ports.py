"""Free TCP ports, and what to say about one that is taken."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from repo_manager.errors import ServerError

__all__ = ["check_port_is_free", "free_ports", "listening_ports"]

_LISTEN = "0A"


def free_ports(host: str, count: int) -> tuple[int, ...]:
    """Return `count` different ports that nobody listens on at `host` right now.

    Another process may take one before it is used: whoever binds them tries again with new ones.

    Args:
        host: the address to bind, `127.0.0.1` or `::1` for instance.
        count: how many.

    Raises:
        ServerError: the address is not one of this machine.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(_family(host), socket.SOCK_STREAM)) for _ in range(count)]
        try:
            for each in sockets:
                each.bind((host, 0))
        except OSError as exc:
            raise ServerError(
                f"The server cannot listen on {host}: {exc.strerror or exc}",
                hint="Give an address of this machine: 127.0.0.1, or 0.0.0.0 for all of its interfaces.",
            ) from exc
        return tuple(each.getsockname()[1] for each in sockets)


def check_port_is_free(host: str, port: int, purpose: str) -> None:
    """Check that a given port can be bound.

    Raises:
        ServerError: it is taken, or the address is not one of this machine.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        # As tritonserver does: a connection of an earlier server in TIME_WAIT does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ServerError(
                f"The {purpose} port {port} on {host} cannot be used: {exc.strerror or exc}",
                hint="Give another port, or 0 to take a free one.",
            ) from exc


def listening_ports(pid: int) -> set[int]:
    """Return the TCP ports that a process of this user listens on (from /proc; empty when it has ended)."""
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
